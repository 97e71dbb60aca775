"""The factorised map: what it gives is what the map would have, for both links."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd

import pixnet_sd as ps
from pixnet_sd.errors import StoreError

BINS = "sample_square_008um"


@pytest.fixture(params=["fitted", "counted"])
def backed(request) -> sd.SpatialData:
    """Backed slide with a model recorded, of logarithms or of counts."""
    return request.getfixturevalue(request.param)


def assert_same_image(found, expected) -> None:
    """Every level within 1e-5 of its range, and lying on the same pixels."""
    assert list(found) == list(expected)
    for level in expected:
        a, b = found[level]["image"], expected[level]["image"]
        assert a.dims == b.dims
        np.testing.assert_array_equal(a.c, b.c)
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.y, b.y)
        spread = np.ptp(b.values, axis=(1, 2), keepdims=True)
        assert (np.abs(a.values - b.values) <= 1e-5 * spread).all()


@pytest.mark.parametrize("in_memory", [False, True])
def test_factors_give_the_map(backed, predict, in_memory) -> None:
    sdata = backed
    if in_memory:
        elements = {name: element for _, name, element in backed.gen_elements()}
        sdata = sd.SpatialData.init_from_elements(elements, attrs=dict(backed.attrs))
    predict(sdata)
    predict(sdata, write="factors", key_added="lean")
    full = sdata.images["pixnet_map"]
    genes = [str(gene) for gene in full["scale0"]["image"].c.values]
    for wanted in (None, genes[::-2]):
        expected = ps.get.gene_map(sdata, wanted)
        assert_same_image(ps.get.gene_map(sdata, wanted, key_added="lean"), expected)
    assert_same_image(expected, full.map_over_datasets(lambda level: level.sel(c=genes[::-2]) if level else level))
    np.testing.assert_array_equal(
        sdata.labels["lean_factors_tissue"]["scale0"]["image"], sdata.labels["pixnet_map_tissue"]["scale0"]["image"]
    )


def test_read_back_and_kept_as_an_element(backed, predict) -> None:
    predict(backed, write="factors")
    gene = ps.PixNet.load(backed.attrs["pixnet_sd"]["model"]).genes[1]
    again = sd.read_zarr(backed.path)
    expected = ps.get.gene_map(backed, gene)
    assert_same_image(ps.get.gene_map(again, gene), expected)
    again.images["gene"] = ps.get.gene_map(again, gene)
    again.write_element("gene")
    assert_same_image(sd.read_zarr(backed.path).images["gene"], expected)
    systems = sd.transformations.get_transformation(again.images["gene"], get_all=True)
    assert set(systems) == set(sd.transformations.get_transformation(again.images["sample_full_image"], get_all=True))


def test_regions_and_map_come_from_factors(backed, predict, forward_passes) -> None:
    predict(backed, shapes_key=BINS, key_added="direct")
    predict(backed, write="factors")
    del forward_passes[:]
    predict(backed, shapes_key=BINS)
    assert not forward_passes
    assert_same_image(backed.images["pixnet_map"], backed.images["direct_map"])
    found, expected = (backed.tables[f"{key}_{BINS}"].X for key in ("pixnet", "direct"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    predict(backed, map_um=8, key_added="pixnet", overwrite=True)
    assert not forward_passes


def test_all_genes_whatever_regions_are_predicted_for(fitted, predict) -> None:
    genes = ps.PixNet.load(fitted.attrs["pixnet_sd"]["model"]).genes
    predict(fitted, write="factors", genes=genes[:1], shapes_key=BINS)
    assert list(fitted.tables[f"pixnet_{BINS}"].var_names) == genes[:1]
    assert list(ps.get.gene_map(fitted)["scale0"]["image"].c.values) == genes


def test_a_table_of_the_name_of_its_weights_is_not_replaced(fitted, predict) -> None:
    fitted.tables["pixnet_factors_head"] = fitted.tables["square_008um"]
    with pytest.raises(StoreError, match="pixnet_factors_head"):
        predict(fitted, write="factors")
