"""Aggregation operators of lattices, in closed form.

Every region of a lattice has the same size, so it covers at most K rows of pixels, each in one run, and touches a block
of at most L × L low-resolution pixels: A's rows have one length, and are computed for all regions at once, without
sorting edges. Where the sides of the squares lie along rows and columns, A is even the product of a matrix for the rows
and one for the columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .grid import Grid, Window, cumulated_weights, resize_taps
from .lattice import Lattice
from .operators import Operator, SeparableOperator, SparseOperator
from .regions import SNAP_PX, Float, Int

__all__ = ["lattice_operator"]

_LARGEST_PX = 80.0  # half a side; beyond it a region has so many low-resolution pixels that the general way is as good
_SMALLEST_PX = 0.75  # half a side; below it a region may hold no pixel centre
_FILLED = 0.25  # share of the lattice's box that has to be regions for two small matrices to pay
_FLAT = 1e-9  # slope, in lattice units a pixel, below which a side lies along the rows
_FAR = 1e6

Whole = NDArray[np.int32]


class _Runs(NamedTuple):
    """Runs of pixels ``[start, stop)`` on K rows from `row0` on, of every region; empty ones stop where they start."""

    row0: Whole
    start: Whole
    stop: Whole


def lattice_operator(lattice: Lattice, grid: Grid, window: Window, inside: Window) -> Operator | None:
    """Operator of a lattice over a window, or None where the general way has to be gone.

    Parameters
    ----------
    lattice
        In pixels of the resized map.
    grid
        The whole low-resolution grid and its stride.
    window
        Part of the grid.
    inside
        Pixels of the resized map that count.

    Returns
    -------
    The operator; None for regions too small or too large for the closed form, or one that holds no pixel centre.
    """
    smallest = lattice.reach if lattice.radius is not None else lattice.pitch / 2
    if not len(lattice) or smallest < _SMALLEST_PX or lattice.reach > _LARGEST_PX or min(grid.height, grid.width) < 2:
        return None
    small = _separable(lattice, grid, window, inside) if lattice.is_aligned else None
    found = _sparse(lattice, grid, window, inside) if small is None else small
    return found if found.n_px.all() else None


def _first_centre(coordinate: Float) -> Float:
    """Index of the first pixel whose centre is at or after a coordinate."""
    return np.ceil(coordinate - (0.5 + SNAP_PX))


def _separable(lattice: Lattice, grid: Grid, window: Window, inside: Window) -> SeparableOperator | None:
    """Two small matrices, where enough of the lattice's box is regions."""
    (row0, row1), (col0, col1) = ((int(v.min()), int(v.max()) + 1) for v in (lattice.row, lattice.col))
    n_rows, n_cols = row1 - row0, col1 - col0
    if len(lattice) < _FILLED * n_rows * n_cols:
        return None
    rows, row_px = _one_axis(
        lattice.to_grid[1, [1, 2]], row0, row1, inside[:2], (grid.height, *window[:2]), grid.stride
    )
    cols, col_px = _one_axis(lattice.to_grid[0, [0, 2]], col0, col1, inside[2:], (grid.width, *window[2:]), grid.stride)
    r, c = (lattice.row - row0).astype(np.int64), (lattice.col - col0).astype(np.int64)
    return SeparableOperator(rows, cols, c * n_rows + r, row_px[r] * col_px[c])


def _one_axis(
    line: Float, first: int, last: int, inside: tuple[int, int], axis: tuple[int, int, int], stride: int
) -> tuple[sparse.csr_array, Float]:
    """Weights of the intervals [k, k + 1) of one axis of a lattice on low-resolution pixels, and pixels in each."""
    size, low0, low1 = axis
    edge = np.clip(_first_centre(line[0] * np.arange(first, last + 1) + line[1]), *inside).astype(np.int64)
    cumulated = cumulated_weights(low0, low1, size, stride)
    low = np.arange(low1 - low0)
    before = cumulated[low, np.clip(edge[:, None] - (low0 + low - 1) * stride, 0, 3 * stride)]
    return sparse.csr_array(np.diff(before, axis=0)), np.diff(edge).astype(np.float64)


def _sparse(lattice: Lattice, grid: Grid, window: Window, inside: Window) -> SparseOperator:
    runs = (_circle_runs if lattice.radius is not None else _square_runs)(lattice)
    runs = _clipped(runs, inside)
    blocks, first_row, first_col = _blocks(runs, grid)
    return SparseOperator(_placed(blocks, first_row, first_col, window), (runs.stop - runs.start).sum(1).astype(float))


def _rows(lattice: Lattice) -> tuple[Whole, Float]:
    """First row of pixels of each region, and the centres of the K rows from there on, (n, K)."""
    n_rows = int(np.ceil(2 * lattice.reach)) + 1
    row0 = _first_centre(lattice.centre_xy[:, 1] - lattice.reach).astype(np.int32)
    return row0, row0[:, None] + (np.arange(n_rows) + 0.5)


def _square_runs(lattice: Lattice) -> _Runs:
    """Where the rows of pixels lie between the four lines that bound each square."""
    row0, y = _rows(lattice)
    low, high = np.full(y.shape, -_FAR), np.full(y.shape, _FAR)
    inverse = np.linalg.inv(lattice.to_grid)
    for (slope, by_row, offset), position in ((inverse[0], lattice.col), (inverse[1], lattice.row)):
        here = y * by_row
        here += offset - position[:, None]  # lattice coordinate at x = 0, from the square's own corner
        if abs(slope) < _FLAT:
            high[np.floor(here + SNAP_PX) != 0] = -_FAR
        else:
            enter = -here / slope
            leave = enter + 1 / slope
            np.maximum(low, np.minimum(enter, leave), out=low)
            np.minimum(high, np.maximum(enter, leave), out=high)
    return _Runs(row0, *(np.clip(_first_centre(v), -_FAR, _FAR).astype(np.int32) for v in (low, high)))


def _circle_runs(lattice: Lattice) -> _Runs:
    """The literal inequality of Eq. 5, by `Circles`, put into rows."""
    row0, y = _rows(lattice)
    start = np.zeros(y.shape, np.int32)
    stop = start.copy()
    far = int(_FAR)
    spans = lattice.plain().spans(-far, far, -far, far)
    place = spans.region, spans.row - row0[spans.region]
    start[place], stop[place] = spans.start, spans.stop
    return _Runs(row0, start, stop)


def _clipped(runs: _Runs, inside: Window) -> _Runs:
    """What lies inside a box of pixels."""
    start, stop = (np.clip(v, inside.col0, inside.col1) for v in (runs.start, runs.stop))
    row = runs.row0[:, None] + np.arange(start.shape[1], dtype=np.int32)
    outside = (stop <= start) | (row < inside.row0) | (row >= inside.row1)
    return _Runs(runs.row0, start, np.where(outside, start, stop))


def _blocks(runs: _Runs, grid: Grid) -> tuple[NDArray[np.float32], Int, Int]:
    """Weights of each region on a block of low-resolution pixels, (n, L, L), and the block's first row and column."""
    n_rows = runs.start.shape[1]
    side = (n_rows - 1) // grid.stride + 3
    row = np.clip(runs.row0[:, None] + np.arange(n_rows), 0, grid.height * grid.stride - 1)
    low, high, weight = resize_taps(row + 0.5, grid.height, grid.stride)
    first_row = low[:, :1]
    offset = np.arange(side)
    share = weight.astype(np.float32)[:, :, None]
    down = (offset == (low - first_row)[:, :, None]) * (1 - share)
    down += (offset == (high - first_row)[:, :, None]) * share
    empty = runs.stop == runs.start
    leftmost = np.where(empty, np.iinfo(np.int32).max, runs.start).min(axis=1)
    first_col = resize_taps(np.where(empty.all(axis=1), 0, leftmost) + 0.5, grid.width, grid.stride)[0]
    across = _between(runs, first_col, side, grid)
    return np.matmul(down.transpose(0, 2, 1), across), first_row[:, 0], first_col


def _between(runs: _Runs, first_col: Int, side: int, grid: Grid) -> NDArray[np.float32]:
    """Weight of each run on the low-resolution columns of its block, (n, K, L)."""
    stride = grid.stride
    cumulated = _columns(grid, side)
    column = (first_col[:, None] + np.arange(side)).astype(np.int32)
    row = (column * (3 * stride + 1))[:, None]
    base = ((column - 1) * stride)[:, None]

    def before(position: Whole) -> NDArray[np.float32]:
        place = position[:, :, None] - base
        np.clip(place, 0, 3 * stride, out=place)
        place += row
        return cumulated.take(place)

    return before(runs.stop) - before(runs.start)


def _columns(grid: Grid, side: int) -> NDArray[np.float32]:
    """`cumulated_weights` of all columns, and zeros for those that blocks reach beyond the grid."""
    cumulated = cumulated_weights(0, grid.width, grid.width, grid.stride)
    return np.pad(cumulated, ((0, side), (0, 0))).astype(np.float32)


def _placed(blocks: NDArray[np.float32], first_row: Int, first_col: Int, window: Window) -> sparse.csr_array:
    """Blocks as rows of A; what lies outside the window weighs nothing."""
    n, side, _ = blocks.shape
    row, col = first_row[:, None] + np.arange(side) - window.row0, first_col[:, None] + np.arange(side) - window.col0
    n_rows, n_cols = window.shape
    for position, size, axis in ((row, n_rows, 2), (col, n_cols, 1)):
        outside = (position < 0) | (position >= size)
        if outside.any():
            blocks = blocks * np.expand_dims(~outside, axis)
            np.clip(position, 0, size - 1, out=position)
    kind: Any = sparse.get_index_dtype(maxval=max(n_rows * n_cols, blocks.size))
    column = ((row * n_cols).astype(kind)[:, :, None] + col.astype(kind)[:, None]).ravel()
    indptr = np.arange(0, blocks.size + 1, side * side, dtype=kind)
    return sparse.csr_array((blocks.ravel(), column, indptr), shape=(n, n_rows * n_cols))
