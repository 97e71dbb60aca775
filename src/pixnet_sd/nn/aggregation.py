"""Exact aggregation without the full-resolution map.

Eq. 4 resizes the low-resolution gene map D W + b to the slide, Eq. 5 sums it over each region. Both are linear, so

    y = A (D W + b),    A = mask · R        (regions × low-resolution pixels, sparse)

with R the bilinear resize (half-pixel centres, clamped at the border) and mask the pixels of each region. A region is a
few runs of pixels, and R is separable: along a run the weights are differences of the cumulated column resize, across
rows they are the row resize. So building A costs the ends of the runs, the regions' outlines, and not their pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .grid import Grid, Window, cumulated_weights, reach, resize_taps
from .lattice import Lattice
from .lattice_operator import lattice_operator
from .operators import Operator, SparseOperator
from .regions import Float, Int, LabelGrid, Regions, Spans, chunks, ranges

__all__ = ["build_operator", "count_pixels"]

_STRIP_PX = 4096  # rows of a label image looked at together when counting pixels
_ROUNDING = 1e-9  # far above what sums of weights are off by, far below the smallest weight


def _column_steps(first: int, last: int, col0: int, col1: int, grid: Grid) -> sparse.csr_array:
    """How each position between pixels, as the end of a run, changes A from one column of the window to the next.

    A run [a, b) weighs on column c with C(b, c) - C(a, c), where C(p, c) cumulates the resize weights of c over the
    pixels before p. From column to column C changes only near p, so its differences are sparse. Left of the window C
    is taken as constant, which cancels between the ends of a run, and right of it as zero.

    Returns
    -------
    C(p, c) - C(p, c - 1), shape (last - first + 1, col1 - col0 + 1).
    """
    stride, n_cols = grid.stride, col1 - col0
    cumulated = np.zeros((n_cols + 2, 3 * stride + 1))
    cumulated[1:-1] = cumulated_weights(col0, col1, grid.width, stride)
    cumulated[0] = stride

    position = np.arange(first, last + 1)[:, None]
    column = position // stride + np.arange(-2, 3)
    reached = np.clip(position - (column - 1) * stride, 0, 3 * stride)
    step = np.diff(cumulated[np.clip(column - col0 + 1, 0, n_cols + 1), reached], axis=1)
    column = column[:, 1:] - col0
    keep = (column >= 0) & (column <= n_cols) & (step != 0)
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return sparse.csr_array((step[keep], column[keep], indptr), shape=(len(position), n_cols + 1))


def _across_rows(spans: Spans, window: Window, grid: Grid) -> tuple[sparse.csr_array, Int]:
    """Row weights: (region, low row) pairs × runs, and the pairs as ``region * window rows + row``, ascending."""
    n_rows, n_runs = window.shape[0], len(spans.row)
    low, high, weight = resize_taps(spans.row + 0.5, grid.height, grid.stride)
    tap = np.concatenate([low, high]) - window.row0
    value = np.concatenate([1 - weight, weight])
    keep = np.nonzero((tap >= 0) & (tap < n_rows) & (value != 0))[0]
    run = keep % max(n_runs, 1)
    pairs, pair = np.unique(spans.region[run] * n_rows + tap[keep], return_inverse=True)
    return sparse.csr_array((value[keep], (pair, run)), shape=(len(pairs), n_runs)), pairs


def _ends(spans: Spans, first: int, last: int) -> sparse.csr_array:
    """Runs × positions between the pixels [first, last): one where a run stops, minus one where it starts."""
    n_runs = len(spans.row)
    position = np.stack([spans.start, spans.stop], axis=1).ravel() - first
    parts = (np.tile([-1.0, 1.0], n_runs), position, np.arange(0, 2 * n_runs + 1, 2))
    return sparse.csr_array(parts, shape=(n_runs, last - first + 1))


def _cumulated(steps: sparse.csr_array) -> sparse.csr_array:
    """Rows cumulated along their columns; each row of steps adds up to zero, so that it ends where it becomes zero."""
    steps.sort_indices()
    occupied = np.nonzero(np.diff(steps.indptr))[0]
    begin, end = np.zeros((2, steps.shape[0]), np.int64)
    begin[occupied] = steps.indices[steps.indptr[occupied]]
    end[occupied] = steps.indices[steps.indptr[occupied + 1] - 1]
    column = ranges(begin, end - begin)[0]
    indptr = np.concatenate([[0], np.cumsum(end - begin)])
    # The rows lie end to end: the last step of one, back to zero, falls on the first of the next.
    place = steps.indices + np.repeat(indptr[:-1] - begin, np.diff(steps.indptr))
    value = np.cumsum(np.bincount(place, steps.data, len(column) + 1))[:-1]
    return sparse.csr_array((value, column, indptr), shape=steps.shape)


def _sum_matrix(spans: Spans, n_regions: int, grid: Grid, window: Window) -> sparse.csr_array:
    """A of Eq. 5 restricted to the columns of a window, from the runs that can touch it."""
    n_rows, n_cols = window.shape
    first, last = reach(window.col0, window.col1, grid.width, grid.stride)
    rows, pairs = _across_rows(spans, window, grid)
    blocks = _cumulated(rows @ _ends(spans, first, last) @ _column_steps(first, last, window.col0, window.col1, grid))
    blocks.data[np.abs(blocks.data) < _ROUNDING] = 0.0
    # A (region, low row) pair holds the next stretch of its region's row of A: only the pointers change.
    column = np.repeat((pairs % n_rows) * n_cols, np.diff(blocks.indptr))
    column += blocks.indices
    indptr = blocks.indptr[np.searchsorted(pairs // n_rows, np.arange(n_regions + 1))]
    kind = sparse.get_index_dtype(maxval=max(n_rows * n_cols, len(column)))  # 32 bits nearly always, half the memory
    parts = (blocks.data, column.astype(kind), indptr.astype(kind))
    matrix = sparse.csr_array(parts, shape=(n_regions, n_rows * n_cols))
    matrix.eliminate_zeros()  # holes, and between the parts of a region
    return matrix


def _count(spans: Spans, n_regions: int) -> Float:
    return np.bincount(spans.region, spans.stop - spans.start, n_regions).astype(np.float64)


def count_pixels(regions: Regions, height: int, width: int) -> Float:
    """Pixels of the slide whose centre lies in each region.

    Parameters
    ----------
    regions
        Regions in pixels of the slide.
    height, width
        Size of the slide, px.

    Returns
    -------
    Counts, shape (n,).
    """
    if isinstance(regions, LabelGrid):  # it is read by windows, whatever the regions
        strips = (regions.spans(row, min(row + _STRIP_PX, height), 0, width) for row in range(0, height, _STRIP_PX))
        return np.asarray(sum((_count(spans, len(regions)) for spans in strips), np.zeros(len(regions))))
    total = np.zeros(len(regions))
    for place, some in chunks(regions):
        total[place] = _count(some.spans(0, height, 0, width), len(some))
    return total


def _point_matrix(regions: Regions, empty: Int, grid: Grid, window: Window) -> tuple[sparse.csr_array, Float]:
    """Rows for regions that hold no pixel centre: the resized map at their centre times their area."""
    picked = regions.subset(empty)
    x, y = picked.centre_xy.T
    inside = (x >= 0) & (y >= 0) & (x < grid.width * grid.stride) & (y < grid.height * grid.stride)
    x, y = np.where(inside, x, 0.0), np.where(inside, y, 0.0)  # what is nowhere has NaN
    area = np.where(inside, np.where(picked.area > 0, picked.area, 1.0), 0.0)
    columns, rows = (resize_taps(v, size, grid.stride) for v, size in ((x, grid.width), (y, grid.height)))
    entries: list[tuple[Int, Int, Float]] = []
    for row, row_weight in ((rows[0], 1 - rows[2]), (rows[1], rows[2])):
        for col, col_weight in ((columns[0], 1 - columns[2]), (columns[1], columns[2])):
            r, c = row - window.row0, col - window.col0
            keep = inside & (r >= 0) & (r < window.shape[0]) & (c >= 0) & (c < window.shape[1])
            entries.append((empty[keep], (r * window.shape[1] + c)[keep], (area * row_weight * col_weight)[keep]))
    region, column, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    shape = (len(regions), window.shape[0] * window.shape[1])
    return sparse.csr_array((value, (region, column)), shape=shape), area


def build_operator(
    regions: Regions,
    grid: Grid,
    *,
    window: Window | None = None,
    inside: Window | None = None,
    n_px: NDArray[Any] | None = None,
) -> Operator:
    """Build A = mask · R for regions over (a window of) the low-resolution grid.

    The operators of windows that tile the grid add up to the operator of the whole grid, whatever the tiling. Lattices
    get theirs in closed form: two small matrices when aligned with the grid, a sparse one otherwise.

    Parameters
    ----------
    regions
        Regions in pixels of the resized map. What lies outside the map does not count. A region that is inside but
        holds no pixel centre gets the map's bilinear value at its centre, weighted by its area (by 1 px² if it has
        none, such as a circle of radius 0).
    grid
        The whole low-resolution grid and its stride.
    window
        Part of the grid to build columns for; default: all of it.
    inside
        Pixels of the resized map that count; default: all of them.
    n_px
        `count_pixels` of the regions, when already known.

    Returns
    -------
    The operator; applied to D W + b it is Eq. 5, divided by ``n_px`` it is the mean.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 4–5.
    """
    window = grid.window if window is None else window
    slide = grid.window.times(grid.stride)
    box = slide if inside is None else Window(*_overlap(slide, inside))
    if isinstance(regions, Lattice):
        found = lattice_operator(regions, grid, window, box)
        if found is not None:
            return found
    return _general_operator(regions, grid, window, box, n_px)


def _overlap(a: Window, b: Window) -> tuple[int, int, int, int]:
    return max(a.row0, b.row0), min(a.row1, b.row1), max(a.col0, b.col0), min(a.col1, b.col1)


def _general_operator(
    regions: Regions, grid: Grid, window: Window, box: Window, n_px: NDArray[Any] | None
) -> SparseOperator:
    """From the runs of pixels of any regions."""
    rows = reach(window.row0, window.row1, grid.height, grid.stride)
    cols = reach(window.col0, window.col1, grid.width, grid.stride)
    spans = regions.spans(*rows, *cols).clipped(*box)
    if n_px is None and window == grid.window:
        n_px = _count(spans, len(regions))
    elif n_px is None:
        n_px = count_pixels(regions, grid.height * grid.stride, grid.width * grid.stride)
    n_px = np.array(n_px, dtype=np.float64)
    matrix = _sum_matrix(spans, len(regions), grid, window)
    empty = np.nonzero(n_px == 0)[0]
    if len(empty):
        points, n_px[empty] = _point_matrix(regions, empty, grid, window)
        matrix = sparse.csr_array(matrix + points)
    return SparseOperator(matrix, n_px)
