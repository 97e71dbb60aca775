"""Bins from the indices of their table."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pixnet_sd.geometry import Circles, LabelGrid, Polygons
from pixnet_sd.slide import regions_sha256
from pixnet_sd.slide.elements import bins_of_table, fit_lattice, regions_of, table_link

TABLE, SHAPES = "square_008um", "sample_square_008um"
PLACE = {"coordinate_system": "sample", "from_system": np.diag([2.0, 2.0, 1.0])}


@given(
    st.floats(0.5, 50),
    st.floats(-np.pi, np.pi),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=3, max_size=30, unique=True),
)
def test_fit_with_any_gaps(pitch: float, angle: float, points: list[tuple[int, int]]) -> None:
    col_row = np.array(points, dtype=float)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = fit_lattice(col_row, col_row @ turn.T * pitch + [7, 9])
    spans = np.linalg.matrix_rank(col_row[1:] - col_row[0]) == 2
    assert (matrix is not None) == spans
    if spans:
        np.testing.assert_allclose(matrix[:2, :2], turn * pitch, atol=1e-6 * pitch)


def bins(sdata):
    return bins_of_table(sdata, table_link(sdata, table_key=TABLE), **PLACE)


@pytest.mark.parametrize(("angle", "circles"), [(0.0, False), (-0.4, True), (1.6, False), (3.0, True)])
@pytest.mark.parametrize("keep", [None, lambda row, col: (row + 2 * col) % 5 > 1], ids=["all", "gaps"])
def test_bins_lie_on_their_centres_and_are_turned(visium_hd, circles: bool, angle: float, keep) -> None:
    sdata = visium_hd(angle=angle, circles=circles, keep=keep, bins=(8,))
    order = np.random.default_rng(0).permutation(sdata.tables[TABLE].n_obs)  # of the table's rows
    sdata.tables[TABLE] = sdata.tables[TABLE][order].copy()
    found = bins(sdata)
    obs = sdata.tables[TABLE].obs.iloc[found.rows]
    assert len(found.lattice) == len(sdata.shapes[SHAPES])
    np.testing.assert_array_equal(found.lattice.row, obs["array_row"])
    np.testing.assert_array_equal(found.lattice.col, obs["array_col"])
    np.testing.assert_array_equal(found.instances, obs["location_id"])
    assert (np.diff(found.lattice.row * 1000 + found.lattice.col) > 0).all()
    drawn = sdata.shapes[SHAPES].geometry.loc[found.instances].to_numpy()
    np.testing.assert_allclose(found.lattice.centre_xy, 2 * shapely.get_coordinates(shapely.centroid(drawn)), atol=1e-6)
    np.testing.assert_allclose(found.lattice.area, (2 * 8 / 0.5) ** 2)
    turn = found.lattice.to_grid[:2, 0]
    assert np.arctan2(turn[1], turn[0]) == pytest.approx(angle, abs=1e-9)
    regions, ids = regions_of(sdata, SHAPES, **PLACE)
    assert regions_sha256(regions) == regions_sha256(found.lattice)
    np.testing.assert_array_equal(ids, found.instances)


def swapped(obs) -> None:
    obs[["array_row", "array_col"]] = obs[["array_col", "array_row"]].sample(frac=1, random_state=0).to_numpy()


SPOILT = {
    "swapped": swapped,
    "halved": lambda obs: obs.update({"array_row": obs["array_row"] // 2}),
    "fraction": lambda obs: obs.isetitem(obs.columns.get_loc("array_row"), obs["array_row"] + 0.5),
    "text": lambda obs: obs.isetitem(obs.columns.get_loc("array_row"), obs["array_row"].astype(str)),
    "twice": lambda obs: obs.update(obs[["array_row", "array_col"]].iloc[:1].set_index(obs.index[1:2])),
    "missing": lambda obs: obs.isetitem(obs.columns.get_loc("array_col"), obs["array_col"].where(obs["array_col"] > 0)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_wrong_indices_fall_back_to_what_is_drawn(visium_hd, spoil) -> None:
    for drawn, kind in (({}, Polygons), ({"circles": True}, Circles), ({"labels": True}, LabelGrid)):
        sdata = visium_hd(bins=(8,), **drawn)
        spoil(sdata.tables[TABLE].obs)
        assert bins(sdata) is None
        regions, ids = regions_of(sdata, f"{SHAPES}_labels" if kind is LabelGrid else SHAPES, **PLACE)
        assert isinstance(regions, kind)
        assert len(ids) == len(sdata.shapes[SHAPES])
    sdata.tables[TABLE] = visium_hd(bins=(8,)).tables[TABLE][5:].copy()  # of some bins
    assert isinstance(regions_of(sdata, SHAPES, **PLACE)[0], Polygons)


def test_lattices_that_are_none_of_touching_squares(visium_hd, visium) -> None:
    apart = visium_hd(circles=True)
    apart.shapes[SHAPES]["radius"] *= 0.5
    assert bins(apart) is None
    spots = visium()
    row, col = (index.ravel() for index in np.mgrid[:6, :6])
    spots.tables["table"].obs["array_row"], spots.tables["table"].obs["array_col"] = row, 2 * col + row % 2
    link = table_link(spots, table_key="table")
    assert bins_of_table(spots, link, coordinate_system="global", from_system=np.eye(3)) is None
