"""Regions say which pixels are theirs, and the same after being moved, picked and cut into windows."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.geometry.strategies import KINDS, Float, grid_and_regions, polygons_of, regions_on, similarities
from tests.model.literal import masks, rings

from pixnet_sd.geometry import Circles, Grid, LabelGrid, Polygons, Regions, Spans, squares

SLIDE = Grid(20, 25, 1)
BOX = np.array([(2, 2), (12, 2), (12, 8), (2, 8)], float)
HOLE = np.array([(4, 3), (4, 6), (9, 6), (9, 3)], float)
FAR = np.array([(15, 10), (19, 10), (17, 16)], float)
EXAMPLES = polygons_of([[BOX, HOLE], [BOX], [FAR, BOX, HOLE]])
LABELS = np.array([[0, 7, 7], [2, 2, 7]])


def painted(spans: Spans, n: int, height: int, width: int) -> NDArray[np.int64]:
    """How often each pixel is in each region, (n, height, width)."""
    count = np.zeros((n, height, width), int)
    for region, row, start, stop in zip(*spans, strict=True):
        assert 0 <= start < stop <= width
        count[region, row, start:stop] += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_spans_are_the_pixels_inside(kind: str, data: st.DataObject) -> None:
    """On the whole slide and in windows; and every such pixel lies within the region's bounds."""
    grid, regions = data.draw(grid_and_regions(kind))
    height, width = grid.height * grid.stride, grid.width * grid.stride
    expected = masks(regions, height, width)
    np.testing.assert_array_equal(painted(regions.spans(0, height, 0, width), len(regions), height, width), expected)
    for box, mask in zip(regions.bounds, expected, strict=True):
        row, col = np.nonzero(mask)
        assert ((col + 0.5 >= box[0]) & (col + 0.5 <= box[2]) & (row + 0.5 >= box[1]) & (row + 0.5 <= box[3])).all()
    row0, row1 = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    col0, col1 = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width))))
    in_window = painted(regions.spans(row0, row1, col0, col1), len(regions), height, width)
    expected[:, :row0], expected[:, row1:], expected[:, :, :col0], expected[:, :, col1:] = 0, 0, 0, 0
    np.testing.assert_array_equal(in_window, expected)


@settings(deadline=None, max_examples=40)
@given(regions_on(SLIDE), st.data())
def test_subset_picks_and_orders(regions: Regions, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, len(regions) - 1), max_size=5, unique=True)), int)
    if data.draw(st.booleans()):
        chosen = np.isin(np.arange(len(regions)), index)
        picked, index = regions.subset(chosen), np.flatnonzero(chosen)
    else:
        picked = regions.subset(index)
    assert len(picked) == len(index)
    for name in ("bounds", "centre_xy", "area"):
        # a product with a matrix may round otherwise for fewer rows
        np.testing.assert_allclose(getattr(picked, name), getattr(regions, name)[index], rtol=1e-12, atol=1e-12)
    count = painted(regions.spans(0, 20, 0, 25), len(regions), 20, 25)
    np.testing.assert_array_equal(painted(picked.spans(0, 20, 0, 25), len(index), 20, 25), count[index])


@settings(deadline=None, max_examples=40)
@given(regions_on(SLIDE), similarities(SLIDE))
def test_transform_moves_area_and_centre(regions: Regions, matrix: Float) -> None:
    moved = regions.transform(matrix)
    np.testing.assert_allclose(moved.area, regions.area * abs(np.linalg.det(matrix[:2, :2])), rtol=1e-6, atol=1e-9)
    expected = regions.centre_xy @ matrix[:2, :2].T + matrix[:2, 2]
    np.testing.assert_allclose(moved.centre_xy, expected, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(moved.transform(np.linalg.inv(matrix)).area, regions.area, rtol=1e-9)


def test_a_circle_holds_its_outline() -> None:
    """Eq. 5 says ≤: with exact numbers, the 12 pixel centres at distance 5 (3-4-5 and along the axes) are inside."""
    circles = Circles([[10.5, 10.5]], 5.0)
    count = painted(circles.spans(0, 20, 0, 25), 1, 20, 25)
    assert count.sum() == 81  # Gauss's circle problem
    np.testing.assert_array_equal(count, masks(circles, 20, 25))
    np.testing.assert_allclose([*circles.bounds[0], *circles.area], [5.5, 5.5, 15.5, 15.5, 25 * np.pi])


@pytest.mark.parametrize("angle", [0.0, np.pi / 2, 0.3, np.arctan(0.5)])
def test_touching_squares_share_no_pixel_and_leave_none(angle: float) -> None:
    """Also where their sides run through pixel centres, as those of bins do."""
    row, col = np.mgrid[-8:9, -8:9]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centres = np.stack([col.ravel(), row.ravel()], axis=1) * 3.0 @ turn + (10.0, 10.0)
    tiles = squares(centres, 3.0, angle)
    corners = tiles.vertices.reshape(-1, 4, 2)
    right = (corners[:, 1] + corners[:, 2]) / 2 - centres
    np.testing.assert_allclose(right / 1.5, np.broadcast_to([np.cos(angle), np.sin(angle)], right.shape), atol=1e-9)
    count = painted(tiles.spans(0, 20, 0, 20), len(tiles), 20, 20)
    np.testing.assert_array_equal(count.sum(axis=0), 1)


def test_polygon_geometry_is_shapelys() -> None:
    holed = shapely.Polygon(BOX, [HOLE])
    shapes = [holed, shapely.Polygon(BOX), shapely.MultiPolygon([shapely.Polygon(FAR), holed])]
    np.testing.assert_allclose(EXAMPLES.area, shapely.area(shapes))
    np.testing.assert_allclose(EXAMPLES.bounds, shapely.bounds(shapes))
    np.testing.assert_allclose(EXAMPLES.centre_xy, shapely.get_coordinates(shapely.centroid(shapes)))
    picked = EXAMPLES.subset([2, 0, 2])
    assert [len(rings(picked, k)) for k in range(3)] == [3, 2, 3]
    np.testing.assert_allclose(picked.area, EXAMPLES.area[[2, 0, 2]])


def test_nothing_and_flat_regions() -> None:
    line = polygons_of([[np.array([(2, 2), (6, 4), (2, 2)], float)]])
    np.testing.assert_array_equal([*line.area, *line.centre_xy[0]], [0, 4, 3])  # the middle of its box
    none = Polygons(np.empty((0, 2)), np.zeros(1, int), np.empty(0, int), 0)
    assert (none.bounds.shape, none.centre_xy.shape) == ((0, 4), (0, 2))
    for regions in (line, none, LabelGrid(LABELS, np.empty(0, int))):
        assert len(regions.spans(0, 2, 0, 3).row) == 0
    assert len(LabelGrid(LABELS, np.array([7])).spans(1, 1, 0, 3).row) == 0


def test_label_geometry() -> None:
    """Also of an image so tall that it is read in strips, with a region that reaches into two of them."""
    matrix = np.array([[2.0, 0, 10], [0, 2.0, 0], [0, 0, 1]])
    for above in (0, 1023):
        labels = LabelGrid(np.vstack([np.zeros((above, 3), int), LABELS]), np.array([7, 2, 4]), matrix)
        down = np.array([0, 2 * above])
        np.testing.assert_array_equal(labels.area, [12, 8, 0])
        np.testing.assert_allclose(labels.centre_xy - down, [[10 + 13 / 3, 5 / 3], [12, 3], [np.nan, np.nan]])
        np.testing.assert_allclose(labels.bounds - np.tile(down, 2), [[12, 0, 16, 4], [10, 2, 14, 4], [np.nan] * 4])


def test_labels_are_read_where_they_are_needed() -> None:
    """A window's spans read a window of the labels, not all of them."""

    class Recorder:
        shape = (1000, 1000)
        read: list[tuple[slice, slice]] = []  # noqa: RUF012

        def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.int64]:
            self.read.append(key)
            return np.ones((key[0].stop - key[0].start, key[1].stop - key[1].start), int)

    LabelGrid(Recorder(), np.array([1])).spans(100, 110, 300, 320)
    assert Recorder.read == [(slice(100, 110), slice(300, 320))]
