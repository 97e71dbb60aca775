"""The factorised map: what it gives is what the map would have, for both links."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
import xarray as xr
from spatialdata.transformations import get_transformation

import pixnet_sd as ps
from pixnet_sd.errors import StoreError


@pytest.fixture(params=["fitted", "counted"])
def backed(request) -> sd.SpatialData:
    """Backed slide with a model recorded, of logarithms or of counts."""
    return request.getfixturevalue(request.param)


def assert_same_image(found, expected) -> None:
    """Every level within 1e-5 of each gene's range, and lying on the same pixels."""
    assert list(found) == list(expected)
    for level in expected:
        image = expected[level]["image"]
        spread = image.max(["x", "y"]) - image.min(["x", "y"])
        xr.testing.assert_allclose(found[level]["image"] / spread, image / spread, rtol=0, atol=1e-5)


def test_factors_give_the_map(backed, predict, forward_passes) -> None:
    predict(backed, key_added="direct")
    predict(backed, write="factors", genes=ps.PixNet.load(backed.attrs["pixnet_sd"]["model"]).genes[:1])  # all are kept
    again = sd.read_zarr(backed.path)
    full = backed.images["direct_map"]
    genes = [str(gene) for gene in full["scale0"]["image"].c.values]
    for sdata, wanted in ((backed, None), (again, genes[::-2])):
        expected = ps.get.gene_map(sdata, wanted, key_added="direct")
        assert_same_image(ps.get.gene_map(sdata, wanted), expected)
    assert_same_image(expected, full.map_over_datasets(lambda level: level.sel(c=genes[::-2]) if level else level))
    tissue, expected_tissue = (again.labels[f"{key}_tissue"]["scale0"] for key in ("pixnet_factors", "direct_map"))
    np.testing.assert_array_equal(tissue["image"], expected_tissue["image"])

    again.images["gene"] = ps.get.gene_map(again, genes[1])
    again.write_element("gene")
    kept = sd.read_zarr(backed.path).images["gene"]
    assert_same_image(kept, ps.get.gene_map(backed, genes[1]))
    image = again.images["sample_full_image"]
    assert set(get_transformation(kept, get_all=True)) == set(get_transformation(image, get_all=True))

    del forward_passes[:]
    predict(again)  # the map comes from the factors
    assert_same_image(again.images["pixnet_map"], full)
    predict(again, map_um=8, overwrite=True)
    assert not forward_passes


def test_a_table_of_the_name_of_its_weights_is_not_replaced(fitted, predict) -> None:
    fitted.tables["pixnet_factors_head"] = fitted.tables["square_008um"]
    with pytest.raises(StoreError, match="pixnet_factors_head"):
        predict(fitted, write="factors")
