"""Exact aggregation without the full-resolution map.

Eq. 4 resizes the low-resolution gene map D W + b to the slide, Eq. 5 sums it over each region. Both are linear, so

    y = A (D W + b),    A = mask · R        (regions × low-resolution pixels, sparse)

with R the bilinear resize (half-pixel centres, clamped at the border) and mask the pixels of each region. A region is a
few runs of pixels, and R is separable: along a run the weights are differences of the cumulated column resize, across
rows they are the row resize. So A costs the regions' outlines, not their areas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from .regions import Float, Int, Regions, Spans, _ranges

__all__ = ["Grid", "Operator", "Window", "aggregate", "build_operator", "count_pixels"]

_CHUNK_PX = 4_000_000  # rows × regions looked at together when counting pixels


class Window(NamedTuple):
    """A rectangle of low-resolution pixels, ends excluded."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.row1 - self.row0, self.col1 - self.col0


@dataclass(frozen=True)
class Grid:
    """The low-resolution grid that is resized by `stride` to the slide.

    Parameters
    ----------
    height, width
        Low-resolution pixels; the resized map has ``height * stride`` by ``width * stride``.
    stride
        Pixels of the resized map per low-resolution pixel.
    """

    height: int
    width: int
    stride: int

    @property
    def window(self) -> Window:
        """The whole grid."""
        return Window(0, self.height, 0, self.width)


class Operator(NamedTuple):
    """Aggregation operator of regions over a window.

    Attributes
    ----------
    matrix
        A, sparse, shape (regions, window rows * window columns), the weights of a sum over pixels.
    n_px
        Pixels of each region inside the slide, shape (regions,), by which a mean divides. 0: wholly outside.
    """

    matrix: sparse.csr_array
    n_px: Float


def _resize_taps(position: NDArray[np.floating[Any]], size: int, stride: int) -> tuple[Int, Int, Float]:
    """Two low-resolution neighbours of each resized pixel coordinate and the weight of the second."""
    source = np.clip(position / stride - 0.5, 0, size - 1)
    low = np.minimum(np.floor(source).astype(np.int64), max(size - 2, 0))
    return low, np.minimum(low + 1, size - 1), source - low


def _cumulative_resize(first: int, last: int, size: int, stride: int, col0: int, col1: int) -> Float:
    """Summed resize weights of the pixels [first, first + k), shape (last - first + 1, col1 - col0)."""
    low, high, weight = _resize_taps(np.arange(first, last) + 0.5, size, stride)
    total = np.zeros((last - first + 1, size if size < 3 else col1 - col0 + 2))
    offset = 0 if size < 3 else col0 - 1  # one column of slack on both sides of the window
    for tap, value in ((low, 1 - weight), (high, weight)):
        inside = (tap - offset >= 0) & (tap - offset < total.shape[1])
        np.add.at(total, (np.nonzero(inside)[0] + 1, tap[inside] - offset), value[inside])
    return np.cumsum(total, axis=0)[:, col0 - offset : col1 - offset]


def _reach(low0: int, low1: int, size: int, stride: int) -> tuple[int, int]:
    """Resized pixels whose weights touch the low-resolution pixels [low0, low1)."""
    return max(low0 - 1, 0) * stride, min(low1 + 1, size) * stride


def _along_runs(spans: Spans, first: int, cumulative: Float, col0: int, grid: Grid) -> sparse.csr_array:
    """Column weights of every run, shape (runs, window columns)."""
    n_cols = cumulative.shape[1]
    left = np.clip(spans.start // grid.stride - 1 - col0, 0, n_cols)
    right = np.clip((spans.stop - 1) // grid.stride + 2 - col0, left, n_cols)
    col, run = _ranges(left, right - left)
    value = cumulative[spans.stop[run] - first, col] - cumulative[spans.start[run] - first, col]
    indptr = np.concatenate([[0], np.cumsum(right - left)])
    return sparse.csr_array((value, col, indptr), shape=(len(spans.row), n_cols))


def _across_rows(spans: Spans, window: Window, grid: Grid) -> tuple[sparse.csr_array, Int]:
    """Row weights: (region, low row) pairs × runs, and the pairs as ``region * window rows + row``, ascending."""
    n_rows = window.shape[0]
    low, high, weight = _resize_taps(spans.row + 0.5, grid.height, grid.stride)
    tap = np.concatenate([low, high]) - window.row0
    run = np.tile(np.arange(len(low)), 2)
    value = np.concatenate([1 - weight, weight])
    keep = (tap >= 0) & (tap < n_rows) & (value != 0)
    pair = np.tile(spans.region, 2)[keep] * n_rows + tap[keep]
    pairs, place = np.unique(pair, return_inverse=True)
    return sparse.csr_array((value[keep], (place, run[keep])), shape=(len(pairs), len(low))), pairs


def _sum_matrix(regions: Regions, grid: Grid, window: Window) -> sparse.csr_array:
    """A of Eq. 5 restricted to the columns of a window."""
    n_rows, n_cols = window.shape
    row_reach = _reach(window.row0, window.row1, grid.height, grid.stride)
    first, last = _reach(window.col0, window.col1, grid.width, grid.stride)
    spans = regions.spans(*row_reach, first, last)
    cumulative = _cumulative_resize(first, last, grid.width, grid.stride, window.col0, window.col1)
    rows, pairs = _across_rows(spans, window, grid)
    blocks = sparse.csr_array(rows @ _along_runs(spans, first, cumulative, window.col0, grid))
    # A (region, low row) pair holds the next stretch of its region's row of A: only the pointers change.
    column = blocks.indices + np.repeat((pairs % n_rows) * n_cols, np.diff(blocks.indptr))
    ends = np.searchsorted(pairs // n_rows, np.arange(len(regions) + 1))
    return sparse.csr_array((blocks.data, column, blocks.indptr[ends]), shape=(len(regions), n_rows * n_cols))


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
    total = np.zeros(len(regions))
    step = max(_CHUNK_PX // max(len(regions), 1), 256)
    for row0 in range(0, height, step):
        spans = regions.spans(row0, min(row0 + step, height), 0, width)
        total += np.bincount(spans.region, spans.stop - spans.start, len(regions))
    return total


def _point_matrix(regions: Regions, empty: Int, grid: Grid, window: Window) -> tuple[sparse.csr_array, Float]:
    """Rows for regions that hold no pixel centre: the resized map at their centre times their area."""
    picked = regions.subset(empty)
    x, y = picked.centre_xy.T
    area = np.where(picked.area > 0, picked.area, 1.0)
    inside = (x >= 0) & (y >= 0) & (x < grid.width * grid.stride) & (y < grid.height * grid.stride)
    area = np.where(inside, area, 0.0)
    columns, rows = (_resize_taps(v, size, grid.stride) for v, size in ((x, grid.width), (y, grid.height)))
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
    regions: Regions, grid: Grid, *, window: Window | None = None, n_px: NDArray[Any] | None = None
) -> Operator:
    """Build A = mask · R for regions over (a window of) the low-resolution grid.

    The operators of windows that tile the grid add up to the operator of the whole grid, whatever the tiling.

    Parameters
    ----------
    regions
        Regions in pixels of the resized map. What lies outside the map does not count. A region that is inside but
        holds no pixel centre gets the map's bilinear value at its centre, weighted by its area.
    grid
        The whole low-resolution grid and its stride.
    window
        Part of the grid to build columns for; default: all of it.
    n_px
        `count_pixels` of the regions, when already known.

    Returns
    -------
    The operator; ``matrix @ (D W + b)`` is Eq. 5, divided by ``n_px`` it is the mean.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 4–5.
    """
    window = grid.window if window is None else window
    if n_px is None:
        n_px = count_pixels(regions, grid.height * grid.stride, grid.width * grid.stride)
    n_px = np.array(n_px, dtype=np.float64)
    matrix = _sum_matrix(regions, grid, window)
    empty = np.nonzero(n_px == 0)[0]
    if len(empty):
        points, n_px[empty] = _point_matrix(regions, empty, grid, window)
        matrix = sparse.csr_array(matrix + points)
    return Operator(matrix, n_px)


class _SparseProduct(torch.autograd.Function):
    """A @ x for a constant sparse A; the gradient is Aᵀ @ g."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(transposed)
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (transposed,) = ctx.saved_tensors
        return None, None, transposed @ grads[0].contiguous()


def _to_torch(matrix: sparse.csr_array, device: torch.device) -> Tensor:
    parts = (torch.from_numpy(matrix.indptr.astype(np.int64)), torch.from_numpy(matrix.indices.astype(np.int64)))
    values = torch.from_numpy(matrix.data.astype(np.float32))
    return torch.sparse_csr_tensor(*parts, values, matrix.shape, device=device)


def aggregate(features: Tensor, matrix: sparse.csr_array) -> Tensor:
    """Apply a sparse operator to feature rows, differentiable in the features.

    Parameters
    ----------
    features
        Rows to combine, shape (pixels, C), float32.
    matrix
        Constant sparse operator, shape (regions, pixels).

    Returns
    -------
    Shape (regions, C), float32.
    """
    device = features.device
    forward, backward = _to_torch(matrix, device), _to_torch(sparse.csr_array(matrix.T), device)
    with torch.autocast(device.type, enabled=False):
        return _SparseProduct.apply(forward, backward, features.float())
