"""Generated regions of every kind, on and around a small slide.

Coordinates are hundredths plus an odd fraction, sizes hundredths plus another: no pixel centre lies on an outline,
where the reference may decide otherwise. What happens there is tested by itself, with numbers that are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pixnet_sd.geometry import Circles, Grid, LabelGrid, Lattice, Polygons, Regions, squares

Float = NDArray[np.float64]

grids = st.builds(Grid, st.integers(1, 7), st.integers(1, 7), st.sampled_from([4, 4, 4, 1, 2, 3, 5, 8]))
angles = st.integers(1, 359).map(lambda degrees: np.radians(degrees + 0.0271828))
either_angle = st.one_of(st.just(0.0), angles)


def number(low: float, high: float, beside: float = 0.00314159) -> st.SearchStrategy[float]:
    """A number between two that is never a round one."""
    return st.integers(round(low * 100), round(high * 100)).map(lambda v: v / 100 + beside)


def half_size(low: float, high: float) -> st.SearchStrategy[float]:
    """A radius or half a side, that taken from a `number` leaves no round one."""
    return number(low, high, 0.00173205)


def points(grid: Grid, beyond: float = 12.0) -> st.SearchStrategy[Float]:
    """A point on the slide or up to `beyond` pixels off it."""
    height, width = grid.height * grid.stride, grid.width * grid.stride
    return st.tuples(number(-beyond, width + beyond), number(-beyond, height + beyond)).map(np.array)


def polygons_of(regions: Sequence[Sequence[Float]]) -> Polygons:
    """Polygons from the rings of each region."""
    rings = [np.asarray(ring, np.float64) for region in regions for ring in region]
    owner = np.repeat(np.arange(len(regions)), [len(region) for region in regions])
    offsets = np.cumsum([0] + [len(ring) for ring in rings])
    return Polygons(np.concatenate(rings), offsets, owner, len(regions))


@st.composite
def circles(draw: st.DrawFn, grid: Grid) -> Circles:
    each = st.tuples(points(grid), st.one_of(st.just(0.0), half_size(0.01, 0.8), half_size(0.8, 30)))
    centre, radius = zip(*draw(st.lists(each, min_size=1, max_size=4)), strict=True)
    return Circles(np.stack(centre), np.array(radius))


@st.composite
def any_squares(draw: st.DrawFn, grid: Grid) -> Polygons:
    centres = draw(st.lists(points(grid), min_size=1, max_size=4))
    return squares(np.stack(centres), 2 * draw(half_size(0.05, 12)), draw(either_angle))


@st.composite
def stars(draw: st.DrawFn) -> Float:
    """A simple ring around the origin, anticlockwise in (x, y)."""
    n = draw(st.integers(3, 7))
    turn = draw(angles) + np.arange(n) * 2 * np.pi / n
    radius = draw(arrays(np.float64, n, elements=number(0.3, 15)))
    return np.stack([np.cos(turn), np.sin(turn)], axis=1) * radius[:, None]


@st.composite
def holed(draw: st.DrawFn, grid: Grid) -> list[Float]:
    """Rings of a polygon that may have a hole."""
    ring, centre = draw(stars()), draw(points(grid))
    hole = [ring[::-1] * draw(st.sampled_from([0.21, 0.53, 0.87])) + centre] if draw(st.booleans()) else []
    return [ring + centre, *hole]


@st.composite
def multipolygons(draw: st.DrawFn, grid: Grid) -> Polygons:
    region = st.lists(holed(grid), min_size=1, max_size=2).map(lambda parts: [ring for part in parts for ring in part])
    return polygons_of(draw(st.lists(region, min_size=1, max_size=3)))


@st.composite
def similarities(draw: st.DrawFn, grid: Grid) -> Float:
    """Rotation, scale, perhaps a mirror, and a shift of some pixels."""
    angle, scale, mirror = draw(either_angle), draw(number(0.3, 5)), draw(st.sampled_from([1, -1]))
    return turned(scale, angle, draw(points(grid, beyond=4.0)), mirror)


def turned(pitch: float, angle: float, origin: tuple[float, float], mirror: int = 1) -> Float:
    """From lattice coordinates (col, row, 1) to pixels."""
    matrix = np.eye(3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[:2, :2], matrix[:2, 2] = pitch * turn @ np.diag([1, mirror]), origin
    return matrix


@st.composite
def lattices(draw: st.DrawFn, grid: Grid) -> Lattice:
    """Squares or circles on some points of a lattice that is turned a little, much, or not at all."""
    n_rows, n_cols, row0, col0 = draw(st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(-3, 3)] * 2))
    row, col = (part.ravel() for part in np.mgrid[row0 : row0 + n_rows, col0 : col0 + n_cols])
    order = np.array(draw(st.permutations(range(len(row)))))[: draw(st.integers(1, len(row)))]
    small_angle = st.integers(-300, 300).map(lambda v: np.deg2rad(v / 100 + 0.00271828))
    angle = draw(st.one_of(st.just(0.0), small_angle, angles, st.just(np.pi / 2)))
    origin = draw(points(grid, beyond=4.0))
    pitch = 2 * draw(half_size(0.6, 7))
    radius = draw(st.one_of(st.none(), half_size(0.5, 6)))
    return Lattice(row[order], col[order], turned(pitch, angle, origin, draw(st.sampled_from([1, -1]))), radius)


@st.composite
def label_grids(draw: st.DrawFn, grid: Grid) -> LabelGrid:
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    labels = draw(arrays(np.int32, shape, elements=st.sampled_from([0, 3, 5, 8])))
    ids = draw(st.permutations([3, 5, 8, 11]))  # 11 is nowhere, and 0 is no region
    return LabelGrid(labels, np.array(ids[: draw(st.integers(1, 4))]), draw(similarities(grid)))


KINDS = {"circles": circles, "squares": any_squares, "multipolygons": multipolygons, "labels": label_grids}


def regions_on(grid: Grid) -> st.SearchStrategy[Regions]:
    """Regions of any kind."""
    return st.one_of(*(kind(grid) for kind in KINDS.values()))


@st.composite
def grid_and_regions(draw: st.DrawFn, kind: str | None = None) -> tuple[Grid, Regions]:
    """A grid with regions of one kind, or of any."""
    grid = draw(grids)
    return grid, draw(regions_on(grid) if kind is None else KINDS[kind](grid))
