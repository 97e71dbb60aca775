"""Genes of a stored map, or of factors, as a lazy image; that both are the same is tested with `tl.predict`."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata.transformations import Scale

import pixnet_sd as ps
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.store.gene_map import FactorHead, factor_names, image_pyramid

RNG = np.random.default_rng(0)
TRANSFORMS = {"global": Scale([2, 2], axes=("x", "y"))}


def pyramid(values: np.ndarray, channels: list[str]):
    levels = [values, values.reshape(len(values), 4, 2, 6, 2).mean(axis=(2, 4))]
    return image_pyramid([da.from_array(level, chunks=(2, 2, 3)) for level in levels], channels, TRANSFORMS)


def with_factors() -> sd.SpatialData:
    head = FactorHead(["A", "B", "total_counts"], np.ones((3, 4), np.float32), np.zeros(3, np.float32))
    factors = pyramid(RNG.normal(size=(5, 8, 12)).astype(np.float32), factor_names(4))
    return sd.SpatialData(images={"pixnet_factors": factors}, tables={"pixnet_factors_head": head.table("u", "f")})


def level(found, k: int = 0):
    return found[f"scale{k}"]["image"]


def test_nothing_is_read_before_pixels_are() -> None:
    sdata = with_factors()
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


def test_the_map_is_taken_where_it_has_the_genes_and_else_the_factors() -> None:
    sdata, values = with_factors(), RNG.normal(size=(3, 8, 12)).astype(np.float32)
    sdata.images["pixnet_map"] = pyramid(values, ["A", "C", "D"])
    np.testing.assert_array_equal(level(ps.get.gene_map(sdata, ["D", "A", "D"])).values, values[[2, 0]])
    assert list(level(ps.get.gene_map(sdata, "B")).c.values) == ["B"]
    assert list(level(ps.get.gene_map(sdata)).c.values) == ["A", "B", "total_counts"]
    sdata.images["mine_map"] = sdata.images.pop("pixnet_map")
    with pytest.raises(DataError, match="'mine_map': 'B'"):
        ps.get.gene_map(sdata, "B", key_added="mine")


def test_refusals() -> None:
    sdata = with_factors()

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
