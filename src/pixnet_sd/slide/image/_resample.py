"""Exact separable resampling: every output pixel is the same number however the output is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Weights are whole numbers of 1/4096 and the picture between the two passes whole numbers of 1/16 grey level. Every
# sum then stays below 2**24, so float32 holds it without rounding and the order in which BLAS adds cannot matter.
_WEIGHT_ONE = 4096
_BETWEEN = 16
_BLOCK = 16  # output pixels per matrix product: small enough that the band is mostly full


@dataclass(frozen=True, eq=False)
class Taps:
    """Which source pixels ``start .. stop - 1`` make each of n output pixels of one axis."""

    start: int
    stop: int
    first: np.ndarray  # (n,) first source pixel of each output pixel
    weights: np.ndarray  # (n, k) float32, of source pixels first .. first + k - 1, in 1/4096; each row sums to 4096

    @property
    def is_copy(self) -> bool:
        """Whether the output pixels are the source pixels."""
        return self.weights.shape[1] == 1 and self.stop - self.start == len(self.first)


def make_taps(dst0: int, dst1: int, scale: float, src_size: int, origin: float = 0.0) -> Taps:
    """Weights of source pixels for output pixels ``dst0 .. dst1 - 1`` of one axis, ``scale`` source pixels each.

    The centre of output pixel i is at ``(i + 0.5) * scale - origin``, of source pixel j at ``j + 0.5``. Weights fall
    linearly to 0 at ``max(1, scale)`` source pixels from it: bilinear to enlarge, an antialiasing triangle to reduce.
    """
    if origin == 0 and abs(scale - 1) * src_size < 0.05:  # over the whole axis less than 1/20 px: a copy
        first = np.clip(np.arange(dst0, dst1), 0, src_size - 1)
        return Taps(int(first[0]), int(first[-1]) + 1, first, np.full((len(first), 1), _WEIGHT_ONE, np.float32))
    support = max(1.0, scale)
    n_taps = min(int(np.ceil(2 * support)) + 1, src_size)
    # The outermost output pixels may have their centres just beyond the image: its edge stands in for them.
    centre = np.clip((np.arange(dst0, dst1) + 0.5) * scale - origin, 0, src_size)
    first = np.clip(np.floor(centre - support + 0.5).astype(np.int64), 0, src_size - n_taps)
    distance = np.abs(first[:, None] + np.arange(n_taps) + 0.5 - centre[:, None])
    running = np.cumsum(np.maximum(0.0, 1 - distance / support), axis=1)
    whole = np.rint(running * (_WEIGHT_ONE / running[:, -1:]))  # so that rows of their differences sum to 4096 exactly
    weights = np.diff(whole, axis=1, prepend=0.0).astype(np.float32)
    return Taps(int(first[0]), int(first[-1]) + n_taps, first, weights)


def resample(source: np.ndarray, rows: Taps, cols: Taps) -> np.ndarray:
    """Resample (h, w, 3) uint8, the source pixels that ``rows`` and ``cols`` need, to (n rows, n cols, 3) uint8."""
    if rows.is_copy and cols.is_copy:
        return np.ascontiguousarray(source)
    planes = np.moveaxis(source, -1, 0)
    between = np.empty((3, len(rows.first), source.shape[1]), np.float32)  # in units of 1/16 grey level
    for lo, hi, start, stop, band in _bands(rows):
        np.matmul(band, planes[:, start:stop].astype(np.float32), out=between[:, lo:hi])
    between += _WEIGHT_ONE / _BETWEEN / 2
    between *= _BETWEEN / _WEIGHT_ONE
    np.floor(between, out=between)
    out = np.empty((*between.shape[:2], len(cols.first)), np.uint8)
    unit = np.float32(1 / (_BETWEEN * _WEIGHT_ONE))
    for lo, hi, start, stop, band in _bands(cols):
        summed = between[..., start:stop] @ band.T
        summed += _BETWEEN * _WEIGHT_ONE / 2
        summed *= unit
        out[..., lo:hi] = summed
    return np.ascontiguousarray(np.moveaxis(out, 0, -1))


def _bands(taps: Taps) -> list[tuple[int, int, int, int, np.ndarray]]:
    """Blocks of output pixels: output range, source range within what was read, dense weights (out, source)."""
    n_taps = taps.weights.shape[1]
    blocks = []
    for lo in range(0, len(taps.first), _BLOCK):
        hi = min(lo + _BLOCK, len(taps.first))
        first = taps.first[lo:hi]
        band = np.zeros((hi - lo, int(first[-1] - first[0]) + n_taps), np.float32)
        np.put_along_axis(band, (first - first[0])[:, None] + np.arange(n_taps), taps.weights[lo:hi], axis=1)
        start = int(first[0]) - taps.start
        blocks.append((lo, hi, start, start + band.shape[1], band))
    return blocks
