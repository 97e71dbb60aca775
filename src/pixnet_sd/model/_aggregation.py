"""Exact aggregation without the full-resolution map: building the operator A of any regions.

Eq. 4 resizes the low-resolution gene map D W + b to the slide, Eq. 5 sums it over each region. Both are linear, so

    y = A (D W + b),    A = mask · R        (regions × low-resolution pixels, sparse)

with R the bilinear resize (half-pixel centres, clamped at the border). A region is a few runs of pixels and R is
separable: along a run its weights are differences of cumulated ones. So A costs the regions' outlines, not their
pixels. The regions of a lattice have one size, so all rows of A are computed at once as small blocks; where its squares
lie along rows and columns, A is the product of a matrix for the rows and one for the columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd.geometry import (
    SNAP_PX,
    Float,
    Grid,
    Int,
    LabelGrid,
    Lattice,
    Regions,
    Spans,
    Window,
    chunks,
    cumulated_weights,
    first_centre,
    ranges,
    reach,
    resize_taps,
)

from ._operators import Operator, SeparableOperator, SparseOperator

_LARGEST_PX = 80.0  # half a side; beyond it a region has so many low-resolution pixels that the general way is as good
_SMALLEST_PX = 0.75  # half a side; below it a region may hold no pixel centre
_FILLED = 0.25  # share of the lattice's box that has to be regions for two small matrices to pay
_FLAT = 1e-9  # slope, in lattice units a pixel, below which a side lies along the rows
_FAR = 1e6

Whole = NDArray[np.int32]
_STRIP_PX = 4096  # rows of a label image looked at together when counting pixels
_ROUNDING = 1e-9  # far above what sums of weights are off by, far below the smallest weight


def build_operator(
    regions: Regions,
    grid: Grid,
    *,
    window: Window | None = None,
    inside: Window | None = None,
    n_px: NDArray[Any] | None = None,
) -> Operator:
    """Build A = mask · R for regions, in pixels of the resized map, over (a window of) the low-resolution grid.

    Applied to D W + b the operator is Eq. 5 (Zhang et al., arXiv 2503.01347), divided by ``n_px`` it is the mean. The
    operators of windows that tile the grid add up to the operator of the whole grid, whatever the tiling.

    What lies outside the map, or outside the box `inside` of its pixels, does not count. A region that is inside but
    holds no pixel centre gets the map's bilinear value at its centre, weighted by its area (by 1 px² if it has none,
    such as a circle of radius 0). `n_px` is `count_pixels` of the regions, when already known.
    """
    window = grid.window if window is None else window
    box = slide = Window(0, grid.height * grid.stride, 0, grid.width * grid.stride)
    if inside is not None:
        box = Window(max(inside.row0, 0), min(inside.row1, box.row1), max(inside.col0, 0), min(inside.col1, box.col1))
    if isinstance(regions, Lattice) and (closed := _lattice_operator(regions, grid, window, box)) is not None:
        return closed
    rows = reach(window.row0, window.row1, grid.height, grid.stride)
    cols = reach(window.col0, window.col1, grid.width, grid.stride)
    spans = regions.spans(*rows, *cols).clipped(*box)
    if n_px is None:
        n_px = _count(spans, len(regions)) if window == grid.window else count_pixels(regions, slide.row1, slide.col1)
    n_px = np.array(n_px, dtype=np.float64)
    matrix = _sum_matrix(spans, len(regions), grid, window)
    empty = np.nonzero(n_px == 0)[0]
    if len(empty):
        points, n_px[empty] = _point_matrix(regions, empty, grid, window)
        matrix = sparse.csr_array(matrix + points)
    return SparseOperator(matrix, n_px)


def _column_steps(first: int, last: int, col0: int, col1: int, grid: Grid) -> sparse.csr_array:
    """Return C(p, c) - C(p, c - 1), shape (last - first + 1, col1 - col0 + 1), for positions p between pixels.

    A run [a, b) weighs on column c with C(b, c) - C(a, c), where C(p, c) cumulates the resize weights of c over the
    pixels before p. From column to column C changes only near p, so its differences are sparse. Left of the window C
    is taken as constant, which cancels between the ends of a run, and right of it as zero.
    """
    stride, n_cols = grid.stride, col1 - col0
    cumulated = np.pad(cumulated_weights(col0, col1, grid.width, stride), ((1, 1), (0, 0)))
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
    """Weigh runs for (region, low row) pairs; also return the pairs as ``region * window rows + row``, ascending."""
    n_rows, n_runs = window.shape[0], len(spans.row)
    low, high, weight = resize_taps(spans.row + 0.5, grid.height, grid.stride)
    tap = np.concatenate([low, high]) - window.row0
    value = np.concatenate([1 - weight, weight])
    keep = np.nonzero((tap >= 0) & (tap < n_rows) & (value != 0))[0]
    run = keep % max(n_runs, 1)
    pairs, pair = np.unique(spans.region[run] * n_rows + tap[keep], return_inverse=True)
    return sparse.csr_array((value[keep], (pair, run)), shape=(len(pairs), n_runs)), pairs


def _cumulated(steps: sparse.csr_array) -> sparse.csr_array:
    """Cumulate rows along their columns; each row of steps adds up to zero, so that it ends where it becomes zero."""
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
    """Make A of Eq. 5, restricted to the columns of a window, from the runs that can touch it."""
    n_rows, n_cols = window.shape
    first, last = reach(window.col0, window.col1, grid.width, grid.stride)
    rows, pairs = _across_rows(spans, window, grid)
    # Runs × positions between pixels: where a run starts (-1) and stops (1).
    signs, ends = np.tile([-1.0, 1.0], len(spans.row)), np.stack([spans.start, spans.stop], axis=1).ravel() - first
    shape = (len(spans.row), last - first + 1)
    edges = sparse.csr_array((signs, ends, np.arange(0, len(ends) + 1, 2)), shape=shape)
    blocks = _cumulated(rows @ edges @ _column_steps(first, last, window.col0, window.col1, grid))
    blocks.data[np.abs(blocks.data) < _ROUNDING] = 0.0
    # A (region, low row) pair holds the next stretch of its region's row of A: only the pointers change.
    column = np.repeat((pairs % n_rows) * n_cols, np.diff(blocks.indptr))
    column += blocks.indices
    indptr = blocks.indptr[np.searchsorted(pairs // n_rows, np.arange(n_regions + 1))]
    index = sparse.get_index_dtype(maxval=max(n_rows * n_cols, len(column)))  # 32 bits nearly always, half the memory
    csr = (blocks.data, column.astype(index), indptr.astype(index))
    matrix = sparse.csr_array(csr, shape=(n_regions, n_rows * n_cols))
    matrix.eliminate_zeros()  # holes, and between the parts of a region
    return matrix


def _count(spans: Spans, n_regions: int) -> Float:
    return np.bincount(spans.region, spans.stop - spans.start, n_regions).astype(np.float64)


def count_pixels(regions: Regions, height: int, width: int) -> Float:
    """Count the slide's pixels whose centre lies in each region, shape (n,)."""
    if isinstance(regions, LabelGrid):  # labels are read by windows, whatever the regions
        strips = (regions.spans(row, min(row + _STRIP_PX, height), 0, width) for row in range(0, height, _STRIP_PX))
        return np.asarray(sum((_count(spans, len(regions)) for spans in strips), np.zeros(len(regions))))
    total = np.zeros(len(regions))
    for place, chunk in chunks(regions):
        total[place] = _count(chunk.spans(0, height, 0, width), len(chunk))
    return total


def _point_matrix(regions: Regions, empty: Int, grid: Grid, window: Window) -> tuple[sparse.csr_array, Float]:
    """Make rows for regions that hold no pixel centre: the resized map at their centre times their area."""
    picked = regions.subset(empty)
    x, y = picked.centre_xy.T
    inside = (x >= 0) & (y >= 0) & (x < grid.width * grid.stride) & (y < grid.height * grid.stride)
    x, y = np.where(inside, x, 0.0), np.where(inside, y, 0.0)  # an absent label has NaN
    area = np.where(inside, np.where(picked.area > 0, picked.area, 1.0), 0.0)
    low_x, high_x, weight_x = resize_taps(x, grid.width, grid.stride)
    low_y, high_y, weight_y = resize_taps(y, grid.height, grid.stride)
    n_rows, n_cols = window.shape
    # The four taps of each point: (n, row, column).
    row = np.stack([low_y, high_y], axis=1)[:, :, None] - window.row0
    col = np.stack([low_x, high_x], axis=1)[:, None] - window.col0
    value = np.stack([1 - weight_y, weight_y], axis=1)[:, :, None] * np.stack([1 - weight_x, weight_x], axis=1)[:, None]
    keep = inside[:, None, None] & (row >= 0) & (row < n_rows) & (col >= 0) & (col < n_cols)
    region = np.broadcast_to(empty[:, None, None], keep.shape)[keep]
    values = (value * area[:, None, None])[keep]
    return sparse.csr_array((values, (region, (row * n_cols + col)[keep])), shape=(len(regions), n_rows * n_cols)), area


# Lattices, in closed form


def _lattice_operator(lattice: Lattice, grid: Grid, window: Window, inside: Window) -> Operator | None:
    """Build A of a lattice; None for regions too small or too large, or where one holds no pixel centre."""
    smallest = lattice.reach if lattice.radius is not None else lattice.pitch / 2
    if not len(lattice) or smallest < _SMALLEST_PX or lattice.reach > _LARGEST_PX or min(grid.height, grid.width) < 2:
        return None
    operator: Operator | None = _separable(lattice, grid, window, inside) if lattice.is_aligned else None
    if operator is None:
        row0, start, stop = _runs(lattice, inside)
        n_px = (stop - start).sum(axis=1).astype(np.float64)
        operator = SparseOperator(_placed(*_blocks(row0, start, stop, grid), window), n_px)
    return operator if operator.n_px.all() else None


def _separable(lattice: Lattice, grid: Grid, window: Window, inside: Window) -> SeparableOperator | None:
    """Build two small matrices, where enough of the lattice's box is regions."""
    (row0, row1), (col0, col1) = ((int(v.min()), int(v.max()) + 1) for v in (lattice.row, lattice.col))
    n_rows, n_cols = row1 - row0, col1 - col0
    if len(lattice) < _FILLED * n_rows * n_cols:
        return None
    # Along one axis of an aligned lattice, position k lies at pitch * k + offset.
    edges_y = lattice.to_grid[1, 1] * np.arange(row0, row1 + 1) + lattice.to_grid[1, 2]
    edges_x = lattice.to_grid[0, 0] * np.arange(col0, col1 + 1) + lattice.to_grid[0, 2]
    rows, row_px = _one_axis(edges_y, inside[:2], window[:2], grid.height, grid.stride)
    cols, col_px = _one_axis(edges_x, inside[2:], window[2:], grid.width, grid.stride)
    r, c = (lattice.row - row0).astype(np.int64), (lattice.col - col0).astype(np.int64)
    return SeparableOperator(rows, cols, c * n_rows + r, row_px[r] * col_px[c])


def _one_axis(
    edges: Float, inside: tuple[int, int], window: tuple[int, int], size: int, stride: int
) -> tuple[sparse.csr_array, Float]:
    """Weigh the intervals between edges, px, on the window's pixels of one axis; also count the pixels in each."""
    edge = np.clip(first_centre(edges), *inside)
    low = np.arange(*window)
    reached = np.clip(edge[:, None] - (low - 1) * stride, 0, 3 * stride)
    before = cumulated_weights(*window, size, stride)[low - window[0], reached]
    return sparse.csr_array(np.diff(before, axis=0)), np.diff(edge).astype(np.float64)


def _runs(lattice: Lattice, inside: Window) -> tuple[Whole, Whole, Whole]:
    """Find each region's first row, (n,), and starts and stops of its runs in a box of pixels, on K rows, (n, K)."""
    row0 = first_centre(lattice.centre_xy[:, 1] - lattice.reach).astype(np.int32)
    row: Whole = np.add(row0[:, None], np.arange(int(np.ceil(2 * lattice.reach)) + 1), dtype=np.int32)
    ends = (_square_ends if lattice.radius is None else _circle_ends)(lattice, row)
    start, stop = (np.clip(v, inside.col0, inside.col1) for v in ends)
    outside = (stop <= start) | (row < inside.row0) | (row >= inside.row1)
    return row0, start, np.where(outside, start, stop)


def _square_ends(lattice: Lattice, row: Whole) -> Iterable[Whole]:
    """Cut rows of pixels, (n, K), by the four lines that bound each square: where runs start and stop."""
    y, low, high = row + 0.5, np.full(row.shape, -_FAR), np.full(row.shape, _FAR)
    inverse = np.linalg.inv(lattice.to_grid)
    for (slope, by_row, offset), position in ((inverse[0], lattice.col), (inverse[1], lattice.row)):
        at_x0 = y * by_row
        at_x0 += offset - position[:, None]  # lattice coordinate at x = 0, from the square's own corner
        if abs(slope) < _FLAT:
            high[np.floor(at_x0 + SNAP_PX) != 0] = -_FAR
        else:
            enter = -at_x0 / slope
            leave = enter + 1 / slope
            np.maximum(low, np.minimum(enter, leave), out=low)
            np.minimum(high, np.maximum(enter, leave), out=high)
    return (np.clip(first_centre(v), -_FAR, _FAR).astype(np.int32) for v in (low, high))


def _circle_ends(lattice: Lattice, row: Whole) -> Iterable[Whole]:
    """Put the runs of the literal inequality of Eq. 5, by `Circles`, into rows."""
    ends = np.zeros((2, *row.shape), np.int32)
    far = int(_FAR)
    region, y, *found = lattice.plain().spans(-far, far, -far, far)
    ends[:, region, y - row[region, 0]] = found
    return ends


def _blocks(row0: Whole, start: Whole, stop: Whole, grid: Grid) -> tuple[NDArray[np.float32], Int, Int]:
    """Weigh each region on a block of low-resolution pixels, (n, L, L); also return the block's row and column."""
    stride, n_rows = grid.stride, start.shape[1]
    side = (n_rows - 1) // stride + 3
    offset = np.arange(side, dtype=np.int32)
    row = np.clip(row0[:, None] + np.arange(n_rows), 0, grid.height * stride - 1)
    low, high, weight = resize_taps(row + 0.5, grid.height, stride)
    first_row = low[:, :1]
    share = weight.astype(np.float32)[:, :, None]
    down = (offset == (low - first_row)[:, :, None]) * (1 - share)
    down += (offset == (high - first_row)[:, :, None]) * share

    empty = stop == start
    leftmost = np.where(empty, np.iinfo(np.int32).max, start).min(axis=1)
    first_col = resize_taps(np.where(empty.all(axis=1), 0, leftmost) + 0.5, grid.width, stride)[0]
    column = (first_col[:, None, None] + offset).astype(np.int32)
    cumulated = cumulated_weights(0, grid.width, grid.width, stride).astype(np.float32)
    cumulated = np.pad(cumulated, ((0, side), (0, 0)))  # blocks reach beyond the grid
    before, after = (
        cumulated.take(np.clip(position[:, :, None] - (column - 1) * stride, 0, 3 * stride) + column * (3 * stride + 1))
        for position in (start, stop)
    )
    return np.matmul(down.transpose(0, 2, 1), after - before), first_row[:, 0], first_col


def _placed(blocks: NDArray[np.float32], first_row: Int, first_col: Int, window: Window) -> sparse.csr_array:
    """Lay blocks out as rows of A; what lies outside the window weighs nothing."""
    n, side, _ = blocks.shape
    row, col = first_row[:, None] + np.arange(side) - window.row0, first_col[:, None] + np.arange(side) - window.col0
    n_rows, n_cols = window.shape
    for position, size, axis in ((row, n_rows, 2), (col, n_cols, 1)):
        outside = (position < 0) | (position >= size)
        if outside.any():
            blocks = blocks * np.expand_dims(~outside, axis)
            np.clip(position, 0, size - 1, out=position)
    index: Any = sparse.get_index_dtype(maxval=max(n_rows * n_cols, blocks.size))
    column = ((row * n_cols).astype(index)[:, :, None] + col.astype(index)[:, None]).ravel()
    indptr = np.arange(0, blocks.size + 1, side * side, dtype=index)
    return sparse.csr_array((blocks.ravel(), column, indptr), shape=(n, n_rows * n_cols))
