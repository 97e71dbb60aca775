"""The low-resolution grid of the gene map, windows of it, and the bilinear resize to the slide's pixels (Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._regions import Float, Int

STRIDES = (4, 8, 16, 32)
"""Slide pixels per pixel of each level of the feature pyramid F_1..F_L."""

MAP_STRIDE = STRIDES[0]
"""Working pixels per pixel of the gene map: the finest stride of the pyramid."""


class Window(NamedTuple):
    """A rectangle of pixels, ends excluded."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.row1 - self.row0, self.col1 - self.col0


class RegionShare(NamedTuple):
    """One window's share of the sums over k regions that it touches."""

    window: Window  # map pixels
    index: NDArray[np.intp]  # type: ignore[assignment]  # the regions, ascending, shape (k,)
    sums: NDArray[np.float32]  # share of the sum over each region's pixels, shape (k, genes or channels of D)
    weight: NDArray[np.float64]  # share of the pixels by which a mean divides, shape (k,)
    complete: NDArray[np.bool_]  # whether the region lies wholly in the window, shape (k,)

    @classmethod
    def empty(cls, window: Window, n_columns: int) -> RegionShare:
        """Share of a window that touches no region."""
        none = np.empty(0)
        return cls(window, none.astype(np.intp), np.empty((0, n_columns), np.float32), none, none.astype(bool))


@dataclass(frozen=True)
class Grid:
    """The low-resolution grid; the resized map has ``height * stride`` by ``width * stride`` pixels."""

    height: int
    width: int
    stride: int

    @property
    def window(self) -> Window:
        """The whole grid."""
        return Window(0, self.height, 0, self.width)


def resize_taps(position: NDArray[np.floating[Any]], size: int, stride: int) -> tuple[Int, Int, Float]:
    """Return the two low-resolution neighbours of resized pixel coordinates and the weight of the second."""
    source = np.clip(position / stride - 0.5, 0, size - 1)
    low = np.minimum(np.floor(source).astype(np.int64), max(size - 2, 0))
    return low, np.minimum(low + 1, size - 1), source - low


def reach(low0: int, low1: int, size: int, stride: int) -> tuple[int, int]:
    """Return the resized pixels [first, last) whose weights touch the low-resolution pixels [low0, low1)."""
    return max(low0 - 1, 0) * stride, min(low1 + 1, size) * stride


def cumulated_weights(low0: int, low1: int, size: int, stride: int) -> Float:
    """Cumulate the resize weights of low-resolution pixels [low0, low1) of `size` over the 3 strides that touch each.

    Shape (low1 - low0, 3 stride + 1): entry (k, d) is the weight on ``low0 + k`` of all resized pixels before
    ``(low0 + k - 1) * stride + d``.
    """
    pixel = np.arange(*reach(low0, low1, size, stride))
    low, high, weight = resize_taps(pixel + 0.5, size, stride)
    cumulated = np.zeros((low1 - low0, 3 * stride + 1))
    for tap, value in ((low, 1 - weight), (high, weight)):
        inside = np.nonzero((tap >= low0) & (tap < low1))[0]
        np.add.at(cumulated, ((tap - low0)[inside], (pixel - (tap - 1) * stride + 1)[inside]), value[inside])
    return np.cumsum(cumulated, axis=1)
