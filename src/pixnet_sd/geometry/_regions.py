"""Regions to aggregate over: circles, polygons and labels, all of which become runs of pixels (`Regions.spans`).

A pixel belongs to a region when its centre does. Coordinates are (x, y) in pixels of the grid that the regions live on;
pixel i covers [i, i + 1) and its centre is i + 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Index = NDArray[np.intp]

_STRIP_PX = 1024  # rows of a label image read at once
SNAP_PX = 1e-9  # neighbours share a side but for its rounding: a side as close to a pixel centre as this lies on it


class Spans(NamedTuple):
    """Runs of pixels ``[start, stop)`` of one row that lie in one region; four arrays of one length."""

    region: Int
    row: Int
    start: Int
    stop: Int

    def clipped(self, row0: int, row1: int, col0: int, col1: int) -> Spans:
        """Clip runs to a window and drop the empty ones."""
        start, stop = np.maximum(self.start, col0), np.minimum(self.stop, col1)
        keep = (stop > start) & (self.row >= row0) & (self.row < row1)
        return Spans(self.region[keep], self.row[keep], start[keep], stop[keep])


class Regions(Protocol):
    """A set of n regions, as the aggregation operator needs it."""

    if TYPE_CHECKING:

        @property
        def bounds(self) -> Float:
            """Bounding boxes, shape (n, 4): xmin, ymin, xmax, ymax."""

        @property
        def centre_xy(self) -> Float:
            """Centres, shape (n, 2)."""

        @property
        def area(self) -> Float:
            """Areas in px², shape (n,)."""

    def __len__(self) -> int: ...

    def transform(self, matrix: ArrayLike) -> Self:
        """Map the regions by a 3 × 3 affine map of (x, y, 1)."""

    def subset(self, index: ArrayLike) -> Self:
        """Pick regions by an integer or boolean index, in that order."""

    def spans(self, row0: int, row1: int, col0: int, col1: int) -> Spans:
        """Return the runs of the window's pixels whose centre lies in a region."""

    def touching(self, x0: float, y0: float, x1: float, y1: float) -> Index:
        """Return the regions whose bounding box meets a closed box, ascending."""
        left, top, right, bottom = self.bounds.T
        return np.flatnonzero((right >= x0) & (left <= x1) & (bottom >= y0) & (top <= y1))

    def within(self, x0: float, y0: float, x1: float, y1: float) -> Index:
        """Return the regions whose bounding box lies inside a closed box, ascending."""
        left, top, right, bottom = self.bounds.T
        return np.flatnonzero((left >= x0) & (right <= x1) & (top >= y0) & (bottom <= y1))


def chunks(regions: Regions, size: int = 2**16) -> Iterator[tuple[slice, Regions]]:
    """Yield consecutive regions and their place among all, so that nothing is made for millions at once."""
    for start in range(0, len(regions), size):
        place = slice(start, min(start + size, len(regions)))
        yield place, regions.subset(np.arange(place.start, place.stop))


def _apply(matrix: ArrayLike, xy: Float) -> Float:
    m = np.asarray(matrix, dtype=np.float64)
    return np.asarray(xy @ m[:2, :2].T + m[:2, 2])


def ranges(first: Int, length: Int) -> tuple[Int, Int]:
    """Concatenate ``first[k] + arange(length[k])``; also return the k of each entry."""
    owner = np.repeat(np.arange(len(first)), length)
    value = (first - (np.cumsum(length) - length))[owner]
    value += np.arange(len(owner))
    return value, owner


def first_centre(coordinate: Float) -> Int:
    """Return the index of the first pixel whose centre is at or after a coordinate."""
    return np.ceil(coordinate - (0.5 + SNAP_PX)).astype(np.int64)


@dataclass(frozen=True)
class Circles(Regions):
    """Circles (x - cx)² + (y - cy)² ≤ r² (Eq. 5); px, `radius` one for all or of shape (n,)."""

    centre_xy: Float
    radius: Float

    def __post_init__(self) -> None:
        object.__setattr__(self, "centre_xy", np.asarray(self.centre_xy, np.float64).reshape(-1, 2))
        object.__setattr__(self, "radius", np.broadcast_to(np.asarray(self.radius, np.float64), len(self.centre_xy)))

    def __len__(self) -> int:
        return len(self.radius)

    @cached_property
    def bounds(self) -> Float:
        return np.concatenate([self.centre_xy - self.radius[:, None], self.centre_xy + self.radius[:, None]], axis=1)

    @property
    def area(self) -> Float:
        return np.pi * self.radius**2

    def transform(self, matrix: ArrayLike) -> Circles:
        """Map by a similarity: a circle stays a circle."""
        scale = np.sqrt(abs(np.linalg.det(np.asarray(matrix, np.float64)[:2, :2])))
        return Circles(_apply(matrix, self.centre_xy), self.radius * scale)

    def subset(self, index: ArrayLike) -> Circles:
        index = np.asarray(index)
        return Circles(self.centre_xy[index], self.radius[index])

    def spans(self, row0: int, row1: int, col0: int, col1: int) -> Spans:
        cx, cy = self.centre_xy.T
        first = np.clip(first_centre(cy - self.radius), row0, row1)
        last = np.clip(np.floor(cy + self.radius - (0.5 - SNAP_PX)).astype(np.int64) + 1, first, row1)
        row, region = ranges(first, last - first)
        cx, radius = cx[region], self.radius[region]
        dy2 = (row + 0.5 - cy[region]) ** 2
        half = np.sqrt(np.maximum(radius**2 - dy2, 0.0))
        start, stop = first_centre(cx - half), np.floor(cx + half - 0.5).astype(np.int64) + 1

        def inside(col: Int) -> NDArray[np.bool_]:
            return np.asarray((col + 0.5 - cx) ** 2 + dy2 <= radius**2)

        # The square root rounds; the literal inequality decides on both ends.
        start = np.where(inside(start - 1), start - 1, np.where(inside(start), start, start + 1))
        stop = np.where(inside(stop), stop + 1, np.where(inside(stop - 1), stop, stop - 1))
        return Spans(region, row, start, stop).clipped(row0, row1, col0, col1)


@dataclass(frozen=True)
class Polygons(Regions):
    """Polygons and multipolygons, filled even-odd.

    `vertices` has those of all rings, shape (v, 2), px, a ring's first one only once; `ring_offsets` is where each ring
    starts in them, and v at the end; `ring_region` is the region of each ring, ascending. Holes are rings of the same
    region, wound the other way round (only `area` looks at the winding).
    """

    vertices: Float
    ring_offsets: Int
    ring_region: Int
    n_regions: int

    def __len__(self) -> int:
        return self.n_regions

    @cached_property
    def _rings(self) -> Int:
        """First ring of each region, and the number of rings, shape (n + 1,)."""
        return np.searchsorted(self.ring_region, np.arange(self.n_regions + 1))

    @cached_property
    def _region_offsets(self) -> Int:
        """Place where each region starts in `vertices`, shape (n + 1,)."""
        return self.ring_offsets[self._rings]

    @cached_property
    def _edges(self) -> tuple[Float, Float]:
        """Each vertex and the next one of its ring, closing the ring."""
        after = np.arange(1, len(self.vertices) + 1)
        after[self.ring_offsets[1:] - 1] = self.ring_offsets[:-1]
        return self.vertices, self.vertices[after]

    @cached_property
    def _edge_region(self) -> Int:
        return np.repeat(np.arange(self.n_regions), np.diff(self._region_offsets))

    @cached_property
    def bounds(self) -> Float:
        starts = self._region_offsets[:-1]
        sides = [reduce.reduceat(self.vertices, starts) for reduce in (np.minimum, np.maximum)]
        return np.concatenate(sides, axis=1).reshape(-1, 4)

    @cached_property
    def _moments(self) -> tuple[Float, Float]:
        """Signed area and area-weighted centre of each region (shoelace, about the region's first vertex)."""
        origin = self.vertices[self._region_offsets[:-1]][self._edge_region]
        (a, b) = (vertices - origin for vertices in self._edges)
        cross = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
        area = np.bincount(self._edge_region, cross, self.n_regions) / 2
        first = [np.bincount(self._edge_region, (a + b)[:, k] * cross, self.n_regions) / 6 for k in (0, 1)]
        return area, np.stack(first, axis=1)

    @property
    def area(self) -> Float:
        return np.abs(self._moments[0])

    @property
    def centre_xy(self) -> Float:
        """Centroids, shape (n, 2); of a degenerate polygon the middle of its box."""
        area, first = self._moments
        flat = area == 0
        centroid = self.vertices[self._region_offsets[:-1]] + first / np.where(flat, 1.0, area)[:, None]
        middle = (self.bounds[:, :2] + self.bounds[:, 2:]) / 2
        return np.where(flat[:, None], middle, centroid)

    def transform(self, matrix: ArrayLike) -> Polygons:
        """Map by any affine map."""
        return Polygons(_apply(matrix, self.vertices), self.ring_offsets, self.ring_region, self.n_regions)

    def subset(self, index: ArrayLike) -> Polygons:
        picked = np.arange(self.n_regions)[np.asarray(index)]
        ring, owner = ranges(self._rings[picked], np.diff(self._rings)[picked])
        sizes = np.diff(self.ring_offsets)[ring]
        vertex, _ = ranges(self.ring_offsets[:-1][ring], sizes)
        return Polygons(self.vertices[vertex], np.concatenate([[0], np.cumsum(sizes)]), owner, len(picked))

    def spans(self, row0: int, row1: int, col0: int, col1: int) -> Spans:
        """Run scan lines through pixel centres, see `Regions.spans`."""
        a, b = self._edges
        low, high = np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 1], b[:, 1])
        first = np.clip(first_centre(low), row0, row1)
        row, edge = ranges(first, np.clip(first_centre(high), first, row1) - first)
        (x0, y0), (x1, y1) = a[edge].T, b[edge].T
        crossing = x0 + (row + 0.5 - y0) / (y1 - y0) * (x1 - x0)
        region = self._edge_region[edge]
        order = np.lexsort((crossing, row, region))
        enter, leave = order[::2], order[1::2]  # a closed ring crosses a line an even number of times
        start, stop = first_centre(crossing[enter]), first_centre(crossing[leave])
        return Spans(region[enter], row[enter], start, stop).clipped(row0, row1, col0, col1)


def squares(centre_xy: ArrayLike, side: float, angle: float = 0.0) -> Polygons:
    """Make squares of one side (px) and one rotation (radians, from x towards y) around centres, shape (n, 2)."""
    centre_xy = np.asarray(centre_xy, np.float64).reshape(-1, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2 @ turn
    n = len(centre_xy)
    vertices = (centre_xy[:, None] + corners).reshape(-1, 2)
    return Polygons(vertices, np.arange(0, 4 * n + 1, 4), np.arange(n), n)


@dataclass(frozen=True)
class LabelGrid(Regions):
    """Regions given by a label image, a numpy or zarr array that is sliced lazily: region k equals ``ids[k]``.

    `to_grid` maps label pixels (x, y) to the pixels of the grid that regions are asked for on; `extent` is area, centre
    and box of each region in label pixels, which are read from the labels on first need where it is None.
    """

    labels: Any
    ids: Int
    to_grid: Float = field(default_factory=lambda: np.eye(3))
    extent: tuple[Float, Float, Float] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _sorted_ids(self) -> tuple[Int, Int]:
        order = np.argsort(self.ids, kind="stable")
        return self.ids[order], order

    def _region_of(self, values: NDArray[Any]) -> Int:
        """Return the region of each label value, -1 for values that are no region."""
        ids, order = self._sorted_ids
        if not len(ids):
            return np.full(values.shape, -1)
        place = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
        return np.where(ids[place] == values, order[place], -1)

    @cached_property
    def _extent(self) -> tuple[Float, Float, Float]:
        """Area, mean centre and box of every region in label pixels, read in strips."""
        if self.extent is not None:
            return self.extent
        n = len(self)
        area, total = np.zeros(n), np.zeros((n, 2))
        box = np.tile([np.inf, np.inf, -np.inf, -np.inf], (n, 1))
        for top in range(0, self.labels.shape[0], _STRIP_PX):
            region = self._region_of(np.asarray(self.labels[top : top + _STRIP_PX]))
            row, col = np.nonzero(region >= 0)
            k, xy = region[row, col], np.stack([col, row + top], axis=1).astype(np.float64)
            area += np.bincount(k, minlength=n)
            total += np.stack([np.bincount(k, xy[:, axis] + 0.5, n) for axis in (0, 1)], axis=1)
            np.minimum.at(box[:, :2], k, xy)
            np.maximum.at(box[:, 2:], k, xy + 1)
        absent = area == 0
        box[absent] = np.nan
        return area, total / np.where(absent, np.nan, area)[:, None], box

    @property
    def area(self) -> Float:
        """Areas, px² of the grid."""
        return self._extent[0] * abs(np.linalg.det(self.to_grid[:2, :2]))

    @property
    def centre_xy(self) -> Float:
        """Mean of each region's pixel centres, shape (n, 2); NaN for a label that the image does not hold."""
        return _apply(self.to_grid, self._extent[1])

    @cached_property
    def bounds(self) -> Float:
        """Boxes around the regions (around their boxes, when the grid is rotated), shape (n, 4); NaN as the centre."""
        x0, y0, x1, y1 = self._extent[2].T
        corners = np.stack([_apply(self.to_grid, np.stack(c, 1)) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))])
        return np.concatenate([corners.min(axis=0), corners.max(axis=0)], axis=1)

    def transform(self, matrix: ArrayLike) -> LabelGrid:
        """Map by any affine map; the label image itself is not touched."""
        return LabelGrid(self.labels, self.ids, np.asarray(matrix, np.float64) @ self.to_grid, self._extent)

    def subset(self, index: ArrayLike) -> LabelGrid:
        area, centre, box = (values[np.asarray(index)] for values in self._extent)
        return LabelGrid(self.labels, self.ids[np.asarray(index)], self.to_grid, (area, centre, box))

    def spans(self, row0: int, row1: int, col0: int, col1: int) -> Spans:
        """Look up the label under each pixel centre, see `Regions.spans`."""
        x, y = np.meshgrid(np.arange(col0, col1) + 0.5, np.arange(row0, row1) + 0.5)
        xy = _apply(np.linalg.inv(self.to_grid), np.stack([x.ravel(), y.ravel()], axis=1))
        xy = np.floor(xy + SNAP_PX).astype(np.int64)
        height, width = self.labels.shape
        inside = np.all((xy >= 0) & (xy < (width, height)), axis=1)
        flat = np.full(len(xy), -1)
        if inside.any():
            (left, top), (right, bottom) = xy[inside].min(axis=0), xy[inside].max(axis=0) + 1
            block = np.asarray(self.labels[top:bottom, left:right])
            flat[inside] = self._region_of(block[xy[inside, 1] - top, xy[inside, 0] - left])
        region = flat.reshape(row1 - row0, col1 - col0)
        edge = np.ones((region.shape[0], region.shape[1] + 1), bool)  # a run ends where the region changes
        edge[:, 1:-1] = region[:, 1:] != region[:, :-1]
        row, col = np.nonzero(edge[:, :-1])
        stop = np.nonzero(edge[:, 1:])[1] + 1
        keep = (k := region[row, col]) >= 0
        return Spans(k[keep], row[keep] + row0, col[keep] + col0, stop[keep] + col0)
