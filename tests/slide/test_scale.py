"""Micrometres per pixel: of the caller, a record, bins and spots."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Identity, Scale, Translation, set_transformation
from tests.slide.conftest import make_circles

from pixnet_sd.errors import ElementError, ResolutionError
from pixnet_sd.slide import find_mpp
from pixnet_sd.slide.tables import select_tables

FULL = {"image_key": "sample_full_image", "coordinate_system": "sample"}
HE = {"image_key": "he", "coordinate_system": "sample"}


def turned(scale: float, angle: float, flip: bool = False) -> np.ndarray:
    cos, sin, sign = scale * np.cos(angle), scale * np.sin(angle), -1 if flip else 1
    return np.array([[cos, -sin * sign, 30.0], [sin, cos * sign, -20.0], [0, 0, 1]])


def test_caller_then_record_then_bins(visium_hd, image) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"other": 0.2}}
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.5)
    sdata.attrs["pixnet_sd"]["mpp"]["sample_full_image"] = 0.499
    assert find_mpp(sdata, **FULL)[0] == 0.499
    assert find_mpp(sdata, **FULL, mpp=0.503) == (0.503, "argument mpp=")  # a small disagreement is not warned about
    he = image(transformations={"sample": Scale([0.25, 0.25], axes=("x", "y"))})
    assert find_mpp(SpatialData(images={"he": he}), **HE, mpp="coordinate_system")[0] == pytest.approx(0.25)


@pytest.mark.parametrize("matrix", [None, turned(3, -2.0), turned(0.2, 0.4, flip=True)])
@pytest.mark.parametrize("drawn", [{}, {"circles": True}, {"labels": True}, {"dataset_id": ""}], ids=str)
def test_bins_under_any_similarity(visium_hd, matrix, drawn: dict[str, Any]) -> None:
    """By a table, by what is drawn, which may have holes, and by labels."""
    sdata = visium_hd(mpp=0.4, matrix=matrix, angle=0.3, keep=lambda row, col: (row * col) % 5 != 1, **drawn)
    system = drawn.get("dataset_id", "sample")
    bins = f"16 µm bins '{system}_square_016um'"
    by_table = sdata.tables, 1e-9, f"lattice pitch of the {bins}"
    by_shapes = sdata.shapes, 1e-6, f"neighbour distance of the {bins}"
    by_labels = sdata.labels, 1e-6, "16 µm label pixels of 'sample_square_016um_labels'"
    for elements, rel, rule in (by_shapes, by_labels) if "labels" in drawn else (by_table, by_shapes):
        found = find_mpp(sdata, image_key=f"{system}_full_image", coordinate_system=system)
        assert found == (pytest.approx(0.4, rel=rel), rule)
        copy = find_mpp(sdata, image_key=f"{system}_hires_image", coordinate_system=system)
        assert copy == (pytest.approx(1.6, rel=rel), rule)
        elements.clear()


def test_bins_elsewhere_and_stretched_bins_are_passed_over(visium_hd) -> None:
    sdata = visium_hd()
    for table in sdata.tables.values():
        table.uns["pixnet_sd"] = {}  # bins that pixnet annotated still tell their size
    assert "016um" in find_mpp(sdata, **FULL)[1]
    for place in ({"sample": Scale([1.0, 2.0], axes=("x", "y"))}, {"other": Identity()}):
        set_transformation(sdata.shapes["sample_square_016um"], place, set_all=True)
        by_others = "lattice pitch of the 8 µm bins 'sample_square_008um'"
        assert find_mpp(sdata, **FULL) == (pytest.approx(0.5, rel=1e-9), by_others)


@pytest.mark.parametrize("diameter_um", [55.0, 65.0, 50.0, 80.0])
def test_visium_spots(visium, diameter_um: float) -> None:
    sdata = visium(mpp=0.7, diameter_um=diameter_um)
    is_visium = diameter_um in (55.0, 65.0)  # else spots of another assay
    with nullcontext() if is_visium else pytest.raises(ResolutionError, match="unknown.*'spots'"):
        value, rule = find_mpp(sdata, image_key="tissue_full_image", coordinate_system="global")
        assert (value, rule) == (pytest.approx(0.7, rel=1e-6), "100 µm pitch of Visium spots 'spots'")


def labels(pixels: np.ndarray) -> Any:
    return Labels2DModel.parse(pixels, dims=("y", "x"), transformations={"sample": Identity()})


SCATTERED = np.random.default_rng(0).uniform(10, 200, (60, 2))
GRID = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2)
HEX = np.stack([GRID[:, 0] + 0.5 * (GRID[:, 1] % 2), GRID[:, 1] * np.sqrt(3) / 2], axis=1)
LABELS = np.arange(1, 26).reshape(5, 5)
NO_BINS = {
    "roi_100um": make_circles([[40, 80], [90, 80], [160, 80]], 80.0),
    "cells_050um": make_circles(SCATTERED, 9.0),
    "hex_100um": make_circles(HEX * 20 + 20, 10.0),
    "cores_096um": make_circles(GRID * 30 + 20, 9.0),  # a square lattice with gaps
    "over_080um": make_circles(GRID * 30 + 20, 20.0),  # and one that overlaps
    "row_064um": make_circles([[16 * k + 20, 50] for k in range(12)], 8.0),
    "uneven_048um": make_circles(GRID * 30 + 20, np.where(np.arange(36) % 3, 15.0, 5.0)),
    "x_000um": make_circles(GRID * 30 + 20, 15.0),  # no size of a bin
    "spots": make_circles(GRID * 40 + 20, 11.0),  # a square lattice is not Visium
    "cells_100um_labels": labels(np.kron(LABELS, np.ones((8, 8), int))),
    "seeds_090um_labels": labels(np.kron(LABELS, np.pad([[1]], ((2, 6), (2, 6))))),
}


@pytest.mark.parametrize(("key", "element"), NO_BINS.items(), ids=NO_BINS)
def test_names_of_bins_decide_nothing(visium_hd, image, table, key: str, element) -> None:
    """Whatever is named so and is no lattice of touching squares."""
    sdata = visium_hd(mpp=0.4)
    expected = find_mpp(sdata, **FULL)
    sdata[key] = element
    assert find_mpp(sdata, **FULL) == expected
    sdata["t"] = table(key, [1, 2])
    assert select_tables(sdata) == ["square_008um", "square_016um"]
    with pytest.raises(ResolutionError, match="'he' are unknown"):
        find_mpp(SpatialData.init_from_elements({"he": image(), key: element}), **HE)


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


def test_absurd_value_of_the_caller(image, visium_hd) -> None:
    he, bins = SpatialData(images={"he": image()}), visium_hd()
    for end in (0.1, 2.0):  # of the range
        assert find_mpp(he, **HE, mpp=end)[0] == end
    for mpp in (2.5, 0.0005):
        assert find_mpp(he, **HE, mpp=mpp, allow_any_mpp=True)[0] == mpp
        with pytest.raises(ResolutionError, match=f"mpp = {mpp}"):
            find_mpp(he, **HE, mpp=mpp)
    for mpp in (0.0, -0.5, np.nan, np.inf):  # and no disagreement with bins is told
        with pytest.raises(ResolutionError, match=f"mpp = {mpp}"):
            find_mpp(bins, **FULL, mpp=mpp, allow_any_mpp=True)
