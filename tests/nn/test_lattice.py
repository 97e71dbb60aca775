"""Lattices answer by arithmetic what the same squares and circles, one by one, answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.strategies import lattices, similarities

from pixnet_sd.geometry import Circles, Grid, Lattice, Polygons

GRID = Grid(7, 9, 4)
box = st.tuples(*[st.floats(-20, 60)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@settings(deadline=None)
@given(lattice=lattices(GRID))
def test_geometry_is_that_of_the_plain_regions(lattice: Lattice) -> None:
    plain = lattice.plain()
    assert isinstance(plain, Polygons if lattice.radius is None else Circles)
    for name in ("bounds", "centre_xy", "area"):
        np.testing.assert_allclose(getattr(lattice, name), getattr(plain, name), atol=1e-9)


@settings(deadline=None)
@given(lattice=lattices(GRID), data=st.data())
def test_transform_commutes_with_plain(lattice: Lattice, data: st.DataObject) -> None:
    matrix = data.draw(similarities(GRID))
    one, other = lattice.transform(matrix), lattice.plain().transform(matrix)
    np.testing.assert_allclose(one.centre_xy, other.centre_xy, atol=1e-8)
    np.testing.assert_allclose(one.area, other.area)
    np.testing.assert_allclose(one.bounds, other.bounds, atol=1e-8)


@settings(deadline=None)
@given(lattice=lattices(GRID), box=box)
def test_boxes_are_found_by_arithmetic(lattice: Lattice, box: tuple[float, float, float, float]) -> None:
    plain = lattice.subset(np.arange(len(lattice)))
    x0, y0, x1, y1 = plain.bounds.T
    left, top, right, bottom = box
    touching = (x1 >= left) & (x0 <= right) & (y1 >= top) & (y0 <= bottom)
    within = (x0 >= left) & (x1 <= right) & (y0 >= top) & (y1 <= bottom)
    np.testing.assert_array_equal(lattice.touching(*box), np.flatnonzero(touching))
    np.testing.assert_array_equal(lattice.within(*box), np.flatnonzero(within))


@given(lattice=lattices(GRID))
def test_index_of_is_the_inverse_of_row_and_col(lattice: Lattice) -> None:
    np.testing.assert_array_equal(lattice.index_of(lattice.row, lattice.col), np.arange(len(lattice)))
    every = {(int(r), int(c)) for r, c in zip(lattice.row, lattice.col, strict=True)}
    row, col = np.mgrid[-30:30, -30:30]
    found = lattice.index_of(row, col)
    assert found.shape == row.shape
    np.testing.assert_array_equal(found >= 0, [[(r, c) in every for c in range(-30, 30)] for r in range(-30, 30)])


def test_empty_lattice() -> None:
    nothing = Lattice(np.empty(0), np.empty(0), np.eye(3))
    assert len(nothing) == len(nothing.touching(0, 0, 9, 9)) == len(nothing.within(0, 0, 9, 9)) == 0
    assert nothing.index_of(3, 4) == -1


@pytest.mark.parametrize(
    ("angle", "mirror", "aligned"), [(0, 1, True), (0, -1, False), (1e-6, 1, False), (90, 1, False)]
)
def test_alignment(angle: float, mirror: int, aligned: bool) -> None:
    turn = np.deg2rad(angle)
    matrix = np.eye(3)
    matrix[:2, :2] = 5 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * [1, mirror]
    assert Lattice([0], [0], matrix).is_aligned == aligned
    assert not Lattice([0], [0], matrix, 1.0).is_aligned
