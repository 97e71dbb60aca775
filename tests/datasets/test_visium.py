from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd

from pixnet_sd import datasets
from pixnet_sd.errors import DataError, StoreError

SMALL = {"size_um": 600.0, "mpp": 1.5, "n_genes": 36, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return datasets.write_visium(tmp_path_factory.mktemp("visium") / "out", **SMALL)


@pytest.fixture(scope="module")
def as_read(folder) -> sd.SpatialData:
    spatialdata_io = pytest.importorskip("spatialdata_io")
    return spatialdata_io.visium(folder, fullres_image_file="sample_tissue_image.tif")


def test_elements(as_read):
    assert set(as_read.images) == {"sample_full_image", "sample_hires_image", "sample_lowres_image"}
    circles, table = as_read.shapes["sample"], as_read.tables["table"]
    np.testing.assert_allclose(circles["radius"], 27.5 / 1.5)
    np.testing.assert_allclose(table.obsm["spatial"], np.column_stack([circles.geometry.x, circles.geometry.y]))
    assert table.var["spatially_varying"].dtype == bool


def test_image_is_that_of_the_sample(as_read):
    sample = datasets.sample(**SMALL, bin_um=(16,))
    ours, theirs = (sd.get_pyramid_levels(s.images["sample_full_image"], n=0).to_numpy() for s in (sample, as_read))
    np.testing.assert_array_equal(ours, theirs)


def test_spots_lie_on_a_hexagonal_lattice(folder):
    spots = pd.read_csv(folder / "spatial" / "tissue_positions.csv")
    assert ((spots["array_row"] + spots["array_col"]) % 2 == 0).all()
    xy = spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy() * 1.5
    apart = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_allclose(apart.min(axis=1), 100)
    assert (np.abs(apart - 100) < 1e-6).sum(axis=1).max() == 6
    assert 0 < spots["in_tissue"].mean() < 1
    assert spots["barcode"].is_unique


def test_counts_follow_what_lies_under_the_spots(as_read):
    table = as_read.tables["table"]
    truth = datasets.sample_truth(**SMALL, pitch_um=1.0)
    x, y = np.meshgrid(truth["x"], truth["y"])
    inside = [np.hypot(x - cx, y - cy) <= 27.5 for cx, cy in table.obsm["spatial"] * 1.5]
    lies_there = np.stack([truth.to_numpy()[:, mask].sum(axis=1) for mask in inside])
    total, expected = np.asarray(table.X.sum(axis=1)).ravel(), lies_there.sum(axis=1)
    assert total.sum() == pytest.approx(expected.sum(), rel=0.25)
    # library sizes: totals vary far more than Poisson draws of hundreds would, shares of genes do not
    assert 0.2 < np.log(total / expected).std() < 0.8
    shares = table.X.toarray() / total[:, None]
    error = (shares - lies_there / expected[:, None]) * np.sqrt(total)[:, None]
    assert np.sqrt((error**2).sum(axis=1).mean()) == pytest.approx(1, abs=0.1)


def test_an_empty_dataset_id(tmp_path):
    spatialdata_io = pytest.importorskip("spatialdata_io")
    path = datasets.write_visium(tmp_path / "out", size_um=300, mpp=2, dataset_id="")
    sdata = spatialdata_io.visium(path, dataset_id="other", fullres_image_file="tissue_image.tif")
    assert set(sdata.shapes) == {"other"}


def test_a_folder_is_not_overwritten(folder):
    with pytest.raises(StoreError, match="exists already"):
        datasets.write_visium(folder, **SMALL)


def test_arguments_out_of_range_are_refused(tmp_path):
    with pytest.raises(DataError, match="mpp"):
        datasets.write_visium(tmp_path / "out", mpp=20)
