"""Micrometres per pixel: of the caller, a record, bins and spots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Identity, Scale, Translation, set_transformation

from pixnet_sd.errors import ElementError, ResolutionError
from pixnet_sd.slide import find_mpp
from pixnet_sd.slide.tables import select_tables

FULL = {"image_key": "sample_full_image", "coordinate_system": "sample"}
HE = {"image_key": "he", "coordinate_system": "sample"}


def turned(scale: float, angle: float, flip: bool = False) -> np.ndarray:
    cos, sin, sign = scale * np.cos(angle), scale * np.sin(angle), -1 if flip else 1
    return np.array([[cos, -sin * sign, 30.0], [sin, cos * sign, -20.0], [0, 0, 1]])


@pytest.mark.filterwarnings("error::UserWarning")
def test_caller_then_record_then_bins(visium_hd, image) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"other": 0.2}}
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.5)
    sdata.attrs["pixnet_sd"]["mpp"]["sample_full_image"] = 0.499
    assert find_mpp(sdata, **FULL)[0] == 0.499
    assert find_mpp(sdata, **FULL, mpp=0.503) == (0.503, "argument mpp=")  # a small disagreement is not warned about
    he = image(transformations={"sample": Scale([0.25, 0.25], axes=("x", "y"))})
    value, rule = find_mpp(SpatialData(images={"he": he}), **HE, mpp="coordinate_system")
    assert value == pytest.approx(0.25)
    assert "'sample'" in rule


@pytest.mark.parametrize("matrix", [None, turned(3, -2.0), turned(0.2, 0.4, flip=True)])
@pytest.mark.parametrize("drawn", [{}, {"circles": True}, {"labels": True}, {"dataset_id": ""}], ids=str)
def test_bins_under_any_similarity(visium_hd, matrix, drawn: dict[str, Any]) -> None:
    """By a table, by what is drawn, which may have holes, and by labels."""
    sdata = visium_hd(mpp=0.4, matrix=matrix, angle=0.3, keep=lambda row, col: (row * col) % 5 != 1, **drawn)
    system = drawn.get("dataset_id", "sample")
    place = {"image_key": f"{system}_full_image", "coordinate_system": system}
    if "labels" not in drawn:  # which the tables annotate then
        by_lattice = f"lattice pitch of the 16 µm bins '{system}_square_016um'"
        assert find_mpp(sdata, **place) == (pytest.approx(0.4, rel=1e-9), by_lattice)
    for key in list(sdata.tables):
        del sdata.tables[key]
    by_distance = f"neighbour distance of the 16 µm bins '{system}_square_016um'"
    assert find_mpp(sdata, **place) == (pytest.approx(0.4, rel=1e-6), by_distance)
    if "labels" in drawn:
        for key in list(sdata.shapes):
            del sdata.shapes[key]
        by_labels = "16 µm label pixels of 'sample_square_016um_labels'"
        assert find_mpp(sdata, **place) == (pytest.approx(0.4, rel=1e-6), by_labels)


def test_image_and_bins_with_different_transforms(visium_hd) -> None:
    sdata = visium_hd()
    for system in ("sample", "sample_downscaled_hires"):
        value, _ = find_mpp(sdata, image_key="sample_hires_image", coordinate_system=system)
        assert value == pytest.approx(0.5 / 0.25)
    with pytest.raises(ResolutionError, match="lowres"):  # a downscaled copy is named as the cause
        find_mpp(sdata, image_key="sample_lowres_image", coordinate_system="sample")


def test_bins_elsewhere_and_stretched_bins_are_passed_over(visium_hd) -> None:
    sdata = visium_hd()
    for key in list(sdata.tables):
        sdata.tables[key].uns["pixnet_sd"] = {}  # bins that pixnet annotated still tell their size
    assert "016um" in find_mpp(sdata, **FULL)[1]
    for place in ({"sample": Scale([1.0, 2.0], axes=("x", "y"))}, {"other": Identity()}):
        set_transformation(sdata.shapes["sample_square_016um"], place, set_all=True)
        value, rule = find_mpp(sdata, **FULL)
        assert value == pytest.approx(0.5, rel=1e-9)
        assert "008um" in rule


@pytest.mark.parametrize("diameter_um", [55.0, 65.0, 50.0, 80.0])
def test_visium_spots(visium, diameter_um: float) -> None:
    place = {"image_key": "tissue_full_image", "coordinate_system": "global"}
    sdata = visium(mpp=0.7, diameter_um=diameter_um)
    if diameter_um in (55.0, 65.0):
        by_spots = "100 µm pitch of Visium spots 'spots'"
        assert find_mpp(sdata, **place) == (pytest.approx(0.7, rel=1e-6), by_spots)
    else:  # spots of another assay
        with pytest.raises(ResolutionError, match="unknown"):
            find_mpp(sdata, **place)


SCATTERED = np.random.default_rng(0).uniform(10, 200, (60, 2))
GRID = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2)
HEX = np.stack([GRID[:, 0] + 0.5 * (GRID[:, 1] % 2), GRID[:, 1] * np.sqrt(3) / 2], axis=1)
NO_BINS = {
    "roi_100um": (np.array([[40, 80], [90, 80], [160, 80]]), 80.0),
    "cells_050um": (SCATTERED, 9.0),
    "cells_092um": (SCATTERED, np.random.default_rng(2).uniform(5, 9, 60)),
    "hex_100um": (HEX * 20 + 20, 10.0),
    "cores_096um": (GRID * 30 + 20, 9.0),  # a square lattice with gaps
    "over_080um": (GRID * 30 + 20, 20.0),  # and one that overlaps
    "row_064um": (np.stack([np.arange(12) * 16 + 20, np.full(12, 50)], axis=1), 8.0),
    "uneven_048um": (GRID * 30 + 20, np.where(np.arange(36) % 3, 15.0, 5.0)),
    "x_000um": (GRID * 30 + 20, 15.0),  # no size of a bin
    "spots": (GRID * 40 + 20, 11.0),  # a square lattice is not Visium
}


@pytest.mark.parametrize("key", NO_BINS)
def test_names_of_bins_decide_nothing(visium_hd, image, circles, table, key: str) -> None:
    """Whatever is named so and is no lattice of touching squares."""
    sdata = visium_hd(mpp=0.4)
    expected = find_mpp(sdata, **FULL)
    sdata[key] = circles(*NO_BINS[key])
    assert find_mpp(sdata, **FULL) == expected
    if key != "x_000um":
        sdata["t"] = table(key, np.arange(len(sdata[key])))
        assert select_tables(sdata) == ["square_008um", "square_016um"]
    with pytest.raises(ResolutionError, match=f"'he' are unknown.*'{key}'"):
        find_mpp(SpatialData(images={"he": image()}, shapes={key: sdata[key]}), **HE)


def test_labels_of_cells_are_no_bins(visium_hd) -> None:
    sdata = visium_hd(mpp=0.4)
    cells = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((8, 8), int))
    seeds = np.zeros((40, 40), int)
    seeds[2::9, 2::9] = np.arange(1, 26).reshape(5, 5)
    for key, pixels in (("cells_100um_labels", cells), ("seeds_090um_labels", seeds)):
        sdata[key] = Labels2DModel.parse(pixels, dims=("y", "x"), transformations={"sample": Identity()})
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.4)


def test_lattices_that_disagree(visium_hd) -> None:
    """Each is named with what it tells; regions that are meant are asked before others, and a number ends it."""
    sdata = visium_hd(mpp=0.5)
    sdata["b_square_008um"] = visium_hd(mpp=0.25, bins=(8,))["sample_square_008um"]
    with pytest.raises(ResolutionError, match=r"0\.5 µm.*'sample_square_016um'.*0\.25 µm.*'b_square_008um'.*mpp="):
        find_mpp(sdata, **FULL)
    assert find_mpp(sdata, **FULL, region_keys=["b_square_008um"])[0] == pytest.approx(0.25)
    assert find_mpp(sdata, **FULL, mpp=0.5)[0] == 0.5
    set_transformation(sdata["b_square_008um"], {"sample": Translation([5000, 0], axes=("x", "y"))}, set_all=True)
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.5)  # what lies beside the image is not asked


@pytest.mark.parametrize("recorded", [0.25, 0.51])
def test_record_that_the_lattice_contradicts(visium_hd, recorded: float) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"sample_full_image": recorded}}
    with pytest.raises(ResolutionError, match=rf"{recorded} µm/px.*'sample_square_016um'.*0\.5 µm/px.*mpp="):
        find_mpp(sdata, **FULL)
    with pytest.warns(UserWarning, match=rf"{recorded} µm/px.*0\.5 µm/px.*sample_square_016um"):
        assert find_mpp(sdata, **FULL, mpp=recorded)[0] == recorded


def test_bins_of_a_slide_tell_nothing_of_another_in_the_same_system(visium_hd, image) -> None:
    sdata = visium_hd()
    sdata["other"] = image(500, 600, seed=1)
    for key in ("other", "sample_full_image"):
        where = {"image_key": key, "coordinate_system": "sample"}
        with pytest.raises(ResolutionError, match=f"'{key}'.*mpp="):
            find_mpp(sdata, **where)
        with pytest.raises(ElementError, match=f"'{key}'.*'square_008um'.*table_key="):
            select_tables(sdata, **where)
        assert find_mpp(sdata, **where, region_keys=["sample_square_008um"])[0] == pytest.approx(0.5)


@pytest.mark.parametrize("mpp", [2.5, 0.0005, 0.0, -0.5, np.nan, np.inf])
def test_absurd_value_of_the_caller(image, visium_hd, mpp: float) -> None:
    """It is refused, if it is a number of µm only because of its size; and no disagreement with bins is told."""
    sdata = SpatialData(images={"he": image()})
    for end in (0.1, 2.0):  # of the range
        assert find_mpp(sdata, **HE, mpp=end)[0] == end
    if mpp in (2.5, 0.0005):
        assert find_mpp(sdata, **HE, mpp=mpp, allow_any_mpp=True)[0] == mpp
    else:
        sdata = SpatialData(images={"he": visium_hd()["sample_full_image"]})
    with pytest.raises(ResolutionError, match="mpp"):
        find_mpp(sdata, **HE, mpp=mpp, allow_any_mpp=mpp not in (2.5, 0.0005))
