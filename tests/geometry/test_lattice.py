"""Lattices answer by arithmetic what the same squares and circles, one by one, answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.geometry.strategies import Float, lattices, similarities, turned

from pixnet_sd.geometry import Circles, Grid, Lattice, Polygons, Regions

GRID = Grid(7, 9, 4)
box = st.tuples(*[st.floats(-20, 60)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@settings(deadline=None, max_examples=60)
@given(lattice=lattices(GRID), matrix=similarities(GRID))
def test_geometry_is_that_of_the_plain_regions(lattice: Lattice, matrix: Float) -> None:
    plain = lattice.plain()
    assert isinstance(plain, Polygons if lattice.radius is None else Circles)
    for one, other in ((lattice, plain), (lattice.transform(matrix), plain.transform(matrix))):
        for name in ("bounds", "centre_xy", "area"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-8)


@settings(deadline=None)
@given(lattice=lattices(GRID), box=box)
def test_boxes_are_found_by_arithmetic(lattice: Lattice, box: tuple[float, float, float, float]) -> None:
    np.testing.assert_array_equal(lattice.touching(*box), Regions.touching(lattice, *box))
    np.testing.assert_array_equal(lattice.within(*box), Regions.within(lattice, *box))


def test_empty_lattice() -> None:
    nothing = Lattice(np.empty(0), np.empty(0), np.eye(3))
    assert len(nothing) == len(nothing.touching(0, 0, 9, 9)) == len(nothing.within(0, 0, 9, 9)) == 0


@pytest.mark.parametrize(("degrees", "mirror"), [(0, 1), (0, -1), (1e-6, 1), (90, 1)])
def test_alignment(degrees: float, mirror: int) -> None:
    matrix = turned(5, np.deg2rad(degrees), (0, 0), mirror)
    assert Lattice([0], [0], matrix).is_aligned == ((degrees, mirror) == (0, 1))
    assert not Lattice([0], [0], matrix, 1.0).is_aligned
