"""The factorised map: what it gives is what the map would have, for both links."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
import xarray as xr
from spatialdata.transformations import get_transformation

import pixnet_sd as ps
from pixnet_sd.errors import DataError, StoreError


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


@pytest.mark.parametrize("write", ["map", "factors"])
def test_scatter_is_that_of_counts_in_a_pixel_of_each_level(counted, predict, write) -> None:
    predict(counted, write=write, bin_um=64, map_um=8 if write == "map" else None, genes=None)
    var = counted.tables["pixnet_bins_64um"].var
    genes, columns = list(var.index[::-1]), [column for column in var if column.startswith("dispersion_")]
    areas = [float(column.removeprefix("dispersion_").removesuffix("um2")) for column in columns]
    pitch_um = 8 if write == "map" else 4
    sdata = sd.read_zarr(counted.path)
    mean, found = (ps.get.gene_map(sdata, genes, what=what) for what in ("mean", "sd"))
    for k, level in enumerate(mean):
        density, area = mean[level]["image"].values, float((pitch_um * 2**k) ** 2)
        place = np.interp(np.log(area), np.log(areas), np.arange(len(areas)))
        logs = np.log(var.loc[genes, columns].to_numpy())
        alpha = np.exp([np.interp(place, np.arange(len(areas)), row) for row in logs])[:, None, None]
        variance = density * area + alpha * (density * area) ** 2  # of counts
        np.testing.assert_allclose(found[level]["image"], np.sqrt(variance) / area, rtol=2e-3, atol=1e-9)
    assert list(ps.get.gene_map(sdata, what="sd")["scale0"]["image"].c.values) == genes[::-1]  # not the total
    with pytest.raises(DataError, match="total_counts"):
        ps.get.gene_map(sdata, "total_counts", what="sd")
    if write == "map":  # channels that were picked and turned round since
        whole = sdata.images["pixnet_map"]
        sdata.images["pixnet_map"] = whole.map_over_datasets(lambda each: each.isel(c=[1, 0]) if each else each)
        image = ps.get.gene_map(sdata, genes[-1], what="sd")["scale0"]["image"]
        np.testing.assert_array_equal(image[0], found["scale0"]["image"].sel(c=genes[-1]))


def test_logarithms_have_no_scatter(fitted, predict) -> None:
    predict(fitted)
    with pytest.raises(DataError, match="nb_pcc"):
        ps.get.gene_map(fitted, what="sd")
