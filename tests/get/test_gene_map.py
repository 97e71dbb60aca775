"""Genes of a stored map, or of factors, as a lazy image."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import torch
from spatialdata.transformations import Scale, get_transformation

import pixnet_sd as ps
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.model import Head
from pixnet_sd.store.gene_map import FactorHead, factor_names, image_pyramid

RNG = np.random.default_rng(0)
TRANSFORMS = {"global": Scale([2, 2], axes=("x", "y"))}


def pyramid(values: np.ndarray, channels: list[str]):
    levels = [values, values.reshape(len(values), 4, 2, 6, 2).mean(axis=(2, 4))]
    return image_pyramid([da.from_array(level, chunks=(2, 2, 3)) for level in levels], channels, TRANSFORMS)


def with_factors(link: str) -> tuple[sd.SpatialData, FactorHead]:
    tissue = np.ones((8, 12), np.float32)
    tissue[:3, :5] = 0
    factors = np.concatenate([RNG.normal(size=(4, 8, 12)) * tissue, tissue[None]]).astype(np.float32)
    weight, bias = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=3).astype(np.float32)
    unit = np.array([0.5, 2, 3], np.float32) if link == "softplus" else None
    head = FactorHead(["A", "B", "total_counts"], weight, bias, unit)
    elements = {"pixnet_factors": pyramid(factors, factor_names(4)), "pixnet_factors_head": head.table("u", "f")}
    return sd.SpatialData.init_from_elements(elements), head


def level(found, k: int = 0):
    return found[f"scale{k}"]["image"]


@pytest.mark.parametrize("link", ["identity", "softplus"])
def test_genes_of_factors(link) -> None:
    """`model.Head` at every pixel, 0 off tissue: the torch-free way is the same function."""
    sdata, made = with_factors(link)
    factors = level(sdata.images["pixnet_factors"]).values
    network = Head(4, 3, link)
    network.weight.data, network.bias.data = torch.from_numpy(made.weight), torch.from_numpy(made.bias)
    if made.unit is not None:
        network.unit.copy_(torch.from_numpy(made.unit))
    values = network(torch.from_numpy(factors[:-1]).permute(1, 2, 0)).permute(2, 0, 1)
    expected = values.detach().numpy() * factors[-1]
    found = ps.get.gene_map(sdata)
    np.testing.assert_allclose(level(found).values, expected, rtol=1e-5, atol=1e-6)
    halved = expected.reshape(3, 4, 2, 6, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(level(found, 1).values, halved, rtol=1e-5, atol=1e-6)
    assert list(level(found, 1).c.values) == made.genes
    assert get_transformation(found, get_all=True).keys() == {"global"}
    one = level(ps.get.gene_map(sdata, "B"))
    assert one.dtype == np.float32
    np.testing.assert_allclose(one.values, expected[[1]], rtol=1e-5, atol=1e-6)


def test_nothing_is_read_before_pixels_are() -> None:
    sdata, _ = with_factors("identity")
    read = []

    def noted(block):
        read.append(block.shape)
        return block

    for k in range(2):
        image = level(sdata.images["pixnet_factors"], k)
        image.data = image.data.map_blocks(noted, meta=np.empty((0, 0, 0), np.float32))
    found = level(ps.get.gene_map(sdata, ["A"]))
    assert not read
    found[:, :2, :3].compute()
    assert sum(shape[0] for shape in read) == 5  # all channels of one block
    assert {shape[1:] for shape in read} == {(2, 3)}


def test_genes_of_a_map() -> None:
    values = RNG.normal(size=(3, 8, 12)).astype(np.float32)
    sdata = sd.SpatialData.init_from_elements({"mine_map": pyramid(values, ["A", "B", "C"])})
    found = ps.get.gene_map(sdata, ["C", "A", "C"], key_added="mine")
    np.testing.assert_array_equal(level(found).values, values[[2, 0]])
    with pytest.raises(DataError, match="'mine_map': 'D'"):
        ps.get.gene_map(sdata, "D", key_added="mine")


def test_factors_have_what_the_map_lacks() -> None:
    sdata, made = with_factors("identity")
    stored = RNG.normal(size=(1, 8, 12)).astype(np.float32)
    sdata.images["pixnet_map"] = pyramid(stored, ["A"])
    np.testing.assert_array_equal(level(ps.get.gene_map(sdata, "A")).values, stored)
    assert list(level(ps.get.gene_map(sdata, "B")).c.values) == ["B"]
    assert list(level(ps.get.gene_map(sdata)).c.values) == made.genes


def test_refusals() -> None:
    sdata, _ = with_factors("identity")

    def refused(error: type[Exception], says: str, gene: str = "A", **options: str) -> None:
        with pytest.raises(error, match=says):
            ps.get.gene_map(sdata, gene, **options)

    refused(ElementError, "'other_map'.*'other_factors'.*key_added=", key_added="other")
    refused(DataError, "Z", gene="Z")
    sdata.tables["pixnet_factors_head"] = sdata.tables["pixnet_factors_head"][:, :2].copy()
    refused(DataError, "weights for the 5 channels")
    del sdata.tables["pixnet_factors_head"]
    refused(ElementError, "'pixnet_factors_head'")
    sdata.images["pixnet_map"] = level(sdata.images.pop("pixnet_factors"))
    refused(ElementError, "multiscale")
