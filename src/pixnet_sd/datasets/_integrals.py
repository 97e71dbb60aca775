"""Integrals of densities over turned squares, disks, and the pixels of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from ._expression import DENSITY_PITCH_UM
from ._noise import FloatArray

__all__ = ["integrate_disks", "integrate_on_grid", "integrate_squares"]


def integrate_squares(
    density: FloatArray, x_um: NDArray[np.float64], y_um: NDArray[np.float64], side_um: float, angle: float
) -> NDArray[np.float64]:
    """Integral of each source over turned squares, (n, sources).

    Centres count from the upper left corner of ``density``, which has a pitch of 1 µm and is read between its
    samples; each square is covered by a midpoint rule of step 1 µm or less.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = _midpoints(side_um)
    total = np.zeros((len(x_um), len(density)))
    for x, y in zip(u * cos - v * sin, u * sin + v * cos, strict=True):
        total += _read(density, x_um + x, y_um + y)
    return total * (side_um**2 / len(u))


def integrate_disks(
    density: FloatArray, x_um: NDArray[np.float64], y_um: NDArray[np.float64], radius_um: float
) -> NDArray[np.float64]:
    """Integral of each source over disks, (n, sources), by the rule of :func:`integrate_squares`."""
    u, v = _midpoints(2 * radius_um)
    inside = np.hypot(u, v) <= radius_um
    total = np.zeros((len(x_um), len(density)))
    for x, y in zip(u[inside], v[inside], strict=True):
        total += _read(density, x_um + x, y_um + y)
    return total * (np.pi * radius_um**2 / inside.sum())


def _midpoints(side_um: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps = int(np.ceil(side_um / DENSITY_PITCH_UM - 1e-6))
    offset = ((np.arange(steps) + 0.5) / steps - 0.5) * side_um
    u, v = np.meshgrid(offset, offset)
    return u.ravel(), v.ravel()


def _read(density: FloatArray, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> FloatArray:
    where = [y_um / DENSITY_PITCH_UM - 0.5, x_um / DENSITY_PITCH_UM - 0.5]
    return np.stack([map_coordinates(plane, where, order=1, mode="nearest") for plane in density], axis=1)


def integrate_on_grid(density: Any, size_um: float, pitch_um: float, rows: range, cols: range) -> FloatArray:
    """Integral of each source over pixels of a grid in the image's frame, (sources, rows, cols).

    ``density`` is that of the whole slide, an array or a zarr array of which only what is needed is read; ``rows`` and
    ``cols`` choose pixels of the grid of ``pitch_um`` that begins at the slide's upper left corner.
    """
    down, across = (_Intervals.over(density.shape[1], size_um, pitch_um, pixels) for pixels in (rows, cols))
    box = np.asarray(density[:, down.samples, across.samples])
    made = np.empty((len(box), len(rows), len(cols)), dtype=np.float32)
    for source, plane in enumerate(box):
        made[source] = down.operator @ (across.operator @ plane.T.astype(np.float64)).T
    return made


@dataclass(frozen=True)
class _Intervals:
    """Integrals over [i, i + 1) · pitch by the rule of :func:`integrate_squares`, as a sparse matrix."""

    samples: slice
    operator: sp.csr_array  # (pixels, samples)

    @classmethod
    def over(cls, length: int, size_um: float, pitch_um: float, pixels: range) -> _Intervals:
        """Operator for some pixels, and the samples out of ``length`` that they need."""
        steps = int(np.ceil(pitch_um / DENSITY_PITCH_UM - 1e-6))
        pixel, step = (part.ravel() for part in np.meshgrid(np.arange(len(pixels)), np.arange(steps), indexing="ij"))
        point_um = (pixels.start + pixel + (step + 0.5) / steps) * pitch_um
        weight = np.where(point_um < size_um, pitch_um / steps, 0.0)
        position = np.clip(point_um / DENSITY_PITCH_UM - 0.5, 0, length - 1)
        low = np.minimum(np.floor(position).astype(np.int64), max(length - 2, 0))
        high, part = np.minimum(low + 1, length - 1), position - low
        first, last = int(low.min()), int(high.max())
        values = np.concatenate([weight * (1 - part), weight * part])
        where = (np.tile(pixel, 2), np.concatenate([low, high]) - first)
        return cls(slice(first, last + 1), sp.csr_array((values, where), shape=(len(pixels), last + 1 - first)))
