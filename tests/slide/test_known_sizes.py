from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Scale, set_transformation

from pixnet_sd.slide._known_sizes import um_per_unit


@pytest.mark.parametrize("circles", [False, True])
@pytest.mark.parametrize("dataset_id", ["sample", ""])
def test_bins_by_their_lattice(visium_hd, dataset_id: str, circles: bool) -> None:
    value, how = um_per_unit(visium_hd(dataset_id=dataset_id, mpp=0.4, circles=circles), dataset_id)
    assert value == pytest.approx(0.4, rel=1e-9)
    assert how == f"lattice pitch of the 16 µm bins '{dataset_id}_square_016um'"


def test_sparse_bins_do_not_mislead(visium_hd) -> None:
    def every_other(row, col):
        return (row % 2 == 0) & (col % 2 == 0)

    sdata = visium_hd(mpp=0.4, bins=(8,), keep=every_other)
    assert um_per_unit(sdata, "sample")[0] == pytest.approx(0.4, rel=1e-9)
    del sdata.tables["square_008um"]
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-9)
    assert "edge length" in how


@pytest.mark.parametrize("circles", [False, True])
def test_bins_without_a_table_by_their_neighbours(visium_hd, circles: bool) -> None:
    sdata = visium_hd(mpp=0.4, circles=circles)
    for key in list(sdata.tables):
        del sdata.tables[key]
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-6)
    assert how == "neighbour distance of the 16 µm bins 'sample_square_016um'"


def test_shuffled_table_rows_are_joined_by_id(visium_hd) -> None:
    sdata = visium_hd(mpp=0.4, bins=(8,))
    order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
    sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-9)
    assert "lattice" in how


def test_labels_of_bins(visium_hd) -> None:
    sdata = visium_hd(mpp=0.4, labels=True)
    for key in list(sdata.shapes):
        del sdata.shapes[key]
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-6)
    assert how == "16 µm label pixels of 'sample_square_016um_labels'"


def test_the_unit_is_that_of_the_coordinate_system(visium_hd) -> None:
    assert um_per_unit(visium_hd(), "sample_downscaled_hires")[0] == pytest.approx(0.5 / 0.25, rel=1e-9)


def test_stretched_bins_are_passed_over(visium_hd, caplog) -> None:
    caplog.set_level("INFO", "pixnet_sd")
    sdata = visium_hd()
    stretch = {"sample": Scale([1.0, 2.0], axes=("x", "y"))}
    set_transformation(sdata.shapes["sample_square_016um"], stretch, set_all=True)
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.5, rel=1e-9)
    assert "008um" in how
    assert "singular values" in caplog.text


@pytest.mark.parametrize("diameter_um", [55.0, 65.0])
def test_visium_spots(visium, diameter_um: float) -> None:
    value, how = um_per_unit(visium(mpp=0.7, diameter_um=diameter_um), "global")
    assert value == pytest.approx(0.7, rel=1e-6)
    assert "Visium spots 'spots'" in how


@pytest.mark.parametrize("diameter_um", [30.0, 50.0, 80.0, 100.0])
def test_spots_of_another_assay(visium, diameter_um: float) -> None:
    assert um_per_unit(visium(diameter_um=diameter_um), "global") is None


def test_square_lattice_is_not_visium(circles) -> None:
    xy = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) * 100.0
    assert um_per_unit(SpatialData(shapes={"spots": circles(xy, 27.5)}), "sample") is None


def test_nothing_of_known_size(circles) -> None:
    sdata = SpatialData(shapes={"few": circles([[1, 2], [3, 4]]), "x_000um": circles([[1, 2], [3, 4]])})
    assert um_per_unit(sdata, "sample") is None
    assert um_per_unit(sdata, "elsewhere") is None


def test_bins_that_pixnet_annotated_still_tell_their_size(visium_hd) -> None:
    sdata = visium_hd()
    for key in list(sdata.tables):
        predicted = sdata.tables.pop(key)
        predicted.uns["pixnet_sd"] = {}
        sdata.tables[f"pixnet_{key}"] = predicted
    assert "016um" in um_per_unit(sdata, "sample")[1]


def test_identity_moves_nothing(visium_hd) -> None:
    sdata = visium_hd()
    set_transformation(sdata.shapes["sample_square_016um"], {"other": Identity()}, set_all=True)
    assert "008um" in um_per_unit(sdata, "sample")[1]
    assert "016um" in um_per_unit(sdata, "other")[1]
