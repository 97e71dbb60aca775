from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Identity, Scale, Translation, set_transformation

from pixnet_sd.errors import ResolutionError
from pixnet_sd.slide import find_mpp
from pixnet_sd.slide.tables import select_tables

HE = "he"


@pytest.fixture
def um_per_unit(image):
    """What elements of an object tell of the unit of a coordinate system; None if they tell nothing."""

    def told(sdata: SpatialData, system: str) -> tuple[float, str] | None:
        alone = SpatialData(shapes=dict(sdata.shapes), labels=dict(sdata.labels), tables=dict(sdata.tables))
        alone[HE] = image(transformations={system: Identity()})
        try:
            return find_mpp(alone, image_key=HE, coordinate_system=system, allow_any_mpp=True)
        except ResolutionError as error:
            if "unknown" not in str(error):
                raise
            return None

    return told


@pytest.mark.parametrize("circles", [False, True])
@pytest.mark.parametrize("dataset_id", ["sample", ""])
def test_bins_by_their_lattice(um_per_unit, visium_hd, dataset_id: str, circles: bool) -> None:
    value, how = um_per_unit(visium_hd(dataset_id=dataset_id, mpp=0.4, circles=circles), dataset_id)
    assert value == pytest.approx(0.4, rel=1e-9)
    assert how == f"lattice pitch of the 16 µm bins '{dataset_id}_square_016um'"


def test_sparse_bins_do_not_mislead(um_per_unit, visium_hd) -> None:
    def every_other(row, col):
        return (row % 2 == 0) & (col % 2 == 0)

    sdata = visium_hd(mpp=0.4, bins=(8,), keep=every_other)
    assert um_per_unit(sdata, "sample")[0] == pytest.approx(0.4, rel=1e-9)
    del sdata.tables["square_008um"]
    assert um_per_unit(sdata, "sample") is None  # squares that do not touch


@pytest.mark.parametrize("circles", [False, True])
def test_bins_without_a_table_by_their_neighbours(um_per_unit, visium_hd, circles: bool) -> None:
    sdata = visium_hd(mpp=0.4, circles=circles)
    for key in list(sdata.tables):
        del sdata.tables[key]
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-6)
    assert how == "neighbour distance of the 16 µm bins 'sample_square_016um'"


def test_shuffled_table_rows_are_joined_by_id(um_per_unit, visium_hd) -> None:
    sdata = visium_hd(mpp=0.4, bins=(8,))
    order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
    sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-9)
    assert "lattice" in how


def test_labels_of_bins(um_per_unit, visium_hd) -> None:
    sdata = visium_hd(mpp=0.4, labels=True)
    for key in list(sdata.shapes):
        del sdata.shapes[key]
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.4, rel=1e-6)
    assert how == "16 µm label pixels of 'sample_square_016um_labels'"


def test_the_unit_is_that_of_the_coordinate_system(um_per_unit, visium_hd) -> None:
    assert um_per_unit(visium_hd(), "sample_downscaled_hires")[0] == pytest.approx(0.5 / 0.25, rel=1e-9)


def test_stretched_bins_are_passed_over(um_per_unit, visium_hd, caplog) -> None:
    caplog.set_level("INFO", "pixnet_sd")
    sdata = visium_hd()
    stretch = {"sample": Scale([1.0, 2.0], axes=("x", "y"))}
    set_transformation(sdata.shapes["sample_square_016um"], stretch, set_all=True)
    value, how = um_per_unit(sdata, "sample")
    assert value == pytest.approx(0.5, rel=1e-9)
    assert "008um" in how
    assert "singular values" in caplog.text


@pytest.mark.parametrize("diameter_um", [55.0, 65.0])
def test_visium_spots(um_per_unit, visium, diameter_um: float) -> None:
    value, how = um_per_unit(visium(mpp=0.7, diameter_um=diameter_um), "global")
    assert value == pytest.approx(0.7, rel=1e-6)
    assert "Visium spots 'spots'" in how


@pytest.mark.parametrize("diameter_um", [30.0, 50.0, 80.0, 100.0])
def test_spots_of_another_assay(um_per_unit, visium, diameter_um: float) -> None:
    assert um_per_unit(visium(diameter_um=diameter_um), "global") is None


def test_square_lattice_is_not_visium(um_per_unit, circles) -> None:
    xy = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) * 100.0
    assert um_per_unit(SpatialData(shapes={"spots": circles(xy, 27.5)}), "sample") is None


def test_nothing_of_known_size(um_per_unit, circles) -> None:
    sdata = SpatialData(shapes={"few": circles([[1, 2], [3, 4]]), "x_000um": circles([[1, 2], [3, 4]])})
    assert um_per_unit(sdata, "sample") is None
    assert um_per_unit(sdata, "elsewhere") is None


def test_bins_that_pixnet_annotated_still_tell_their_size(um_per_unit, visium_hd) -> None:
    sdata = visium_hd()
    for key in list(sdata.tables):
        predicted = sdata.tables.pop(key)
        predicted.uns["pixnet_sd"] = {}
        sdata.tables[f"pixnet_{key}"] = predicted
    assert "016um" in um_per_unit(sdata, "sample")[1]


def test_identity_moves_nothing(um_per_unit, visium_hd) -> None:
    sdata = visium_hd()
    set_transformation(sdata.shapes["sample_square_016um"], {"other": Identity()}, set_all=True)
    assert "008um" in um_per_unit(sdata, "sample")[1]
    assert "016um" in um_per_unit(sdata, "other")[1]


def scattered(seed: int, n: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).uniform(10, 200, (n, 2))


GRID = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2)
HEX = np.stack([GRID[:, 0] + 0.5 * (GRID[:, 1] % 2), GRID[:, 1] * np.sqrt(3) / 2], axis=1)
NO_BINS = {
    "roi_100um": (np.array([[40, 80], [90, 80], [160, 80]]), 80.0),
    "cells_050um": (scattered(0), 9.0),
    "cells_092um": (scattered(1), np.random.default_rng(2).uniform(5, 9, 60)),
    "hex_100um": (HEX * 20 + 20, 10.0),
    "cores_096um": (GRID * 30 + 20, 9.0),  # a square lattice with gaps
    "over_080um": (GRID * 30 + 20, 20.0),  # and one that overlaps
    "row_064um": (np.stack([np.arange(12) * 16 + 20, np.full(12, 50)], axis=1), 8.0),
    "uneven_048um": (GRID * 30 + 20, np.where(np.arange(36) % 3, 15.0, 5.0)),
}


@pytest.mark.parametrize("key", NO_BINS)
def test_names_of_bins_decide_nothing(um_per_unit, visium_hd, circles, table, key: str) -> None:
    """R4: whatever is named so and is no lattice of touching squares."""
    sdata = visium_hd(mpp=0.4)
    sdata[key] = circles(*NO_BINS[key])
    expected = um_per_unit(visium_hd(mpp=0.4), "sample")
    assert um_per_unit(sdata, "sample") == expected
    sdata["t"] = table(key, np.arange(len(sdata[key])))
    assert select_tables(sdata) == ["square_008um", "square_016um"]
    assert um_per_unit(SpatialData(shapes={key: sdata[key]}), "sample") is None


def test_indices_of_three_circles_are_no_lattice(um_per_unit, circles, table) -> None:
    shapes = {"roi_100um": circles([[50, 50], [150, 50], [50, 150]], 50.0)}
    indices = {"array_row": [0, 0, 1], "array_col": [0, 1, 0]}
    sdata = SpatialData(shapes=shapes, tables={"t": table("roi_100um", range(3), obs=indices)})
    assert um_per_unit(sdata, "sample") is None


def test_labels_of_cells_are_no_bins(um_per_unit, visium_hd) -> None:
    sdata = visium_hd(mpp=0.4)
    cells = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((8, 8), int))
    seeds = np.zeros((40, 40), int)
    seeds[2::9, 2::9] = np.arange(1, 26).reshape(5, 5)
    for key, pixels in (("cells_100um_labels", cells), ("seeds_090um_labels", seeds)):
        sdata[key] = Labels2DModel.parse(pixels, dims=("y", "x"), transformations={"sample": Identity()})
    assert um_per_unit(sdata, "sample")[0] == pytest.approx(0.4)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.785])
def test_lattice_without_a_table_may_be_turned_and_have_holes(um_per_unit, visium_hd, angle: float) -> None:
    sdata = visium_hd(mpp=0.4, bins=(8,), angle=angle, keep=lambda row, col: (row * col) % 5 != 1)
    del sdata.tables["square_008um"]
    assert um_per_unit(sdata, "sample")[0] == pytest.approx(0.4, rel=1e-6)


def test_lattices_that_disagree(um_per_unit, visium_hd) -> None:
    """R7: each is named with what it tells; regions that are meant are asked before others, and a number ends it."""
    sdata = visium_hd(mpp=0.5)
    sdata["b_square_008um"] = visium_hd(mpp=0.25, bins=(8,))["sample_square_008um"]
    with pytest.raises(ResolutionError, match=r"0\.5 µm.*'sample_square_016um'.*0\.25 µm.*'b_square_008um'.*mpp="):
        um_per_unit(sdata, "sample")
    where = {"image_key": "sample_full_image", "coordinate_system": "sample"}
    assert find_mpp(sdata, **where, region_keys=["b_square_008um"])[0] == pytest.approx(0.25)
    assert find_mpp(sdata, **where, mpp=0.5)[0] == 0.5
    far = {"sample": Translation([5000, 0], axes=("x", "y"))}
    set_transformation(sdata["b_square_008um"], far, set_all=True)
    assert find_mpp(sdata, **where)[0] == pytest.approx(0.5)  # what lies beside the image is not asked


@pytest.mark.parametrize("recorded", [0.25, 0.45, 0.51])
def test_record_that_the_lattice_contradicts(visium_hd, recorded: float) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"sample_full_image": recorded}}
    where = {"image_key": "sample_full_image", "coordinate_system": "sample"}
    with pytest.raises(ResolutionError, match=rf"{recorded} µm/px.*'sample_square_016um'.*0\.5 µm/px.*mpp="):
        find_mpp(sdata, **where)
    with pytest.warns(UserWarning, match="sample_square_016um"):
        assert find_mpp(sdata, **where, mpp=recorded)[0] == recorded


def test_bins_of_a_slide_tell_nothing_of_another_in_the_same_system(visium_hd, image) -> None:
    sdata = visium_hd()
    sdata["other"] = image(500, 600, seed=1)
    for key in ("other", "sample_full_image"):
        where = {"image_key": key, "coordinate_system": "sample"}
        with pytest.raises(ResolutionError, match=f"'{key}'.*mpp="):
            find_mpp(sdata, **where)
        assert find_mpp(sdata, **where, region_keys=["sample_square_008um"])[0] == pytest.approx(0.5)
