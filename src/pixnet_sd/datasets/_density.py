"""Density of every source over a whole slide, in windows that are always the same, whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ._expression import DENSITY_PITCH_UM, sources
from ._noise import FloatArray, Grid
from ._parallel import in_order
from ._tissue import Source, Tissue

__all__ = ["DENSITY_WINDOW", "density_shape", "fill_density", "read_box"]

DENSITY_WINDOW = 512
"""Side of the windows, in samples of 1 µm."""


def density_shape(size_um: float) -> tuple[int, int, int]:
    """Sources, rows, columns."""
    side = int(np.ceil(size_um / DENSITY_PITCH_UM))
    return len(Source), side, side


def fill_density(tissue: Tissue, out: Any, n_workers: int | None) -> Any:
    """Draw the density into an array or a zarr array of :func:`density_shape`, and return it.

    Values are rounded to 16 bits, which the blur's last bits do not survive: what is drawn again is the same.
    """
    side = out.shape[1]
    grids = list(_windows(side))
    drawn = in_order(lambda grid: sources(tissue, grid).astype(np.float16), grids, n_workers)
    for grid, values in zip(grids, drawn, strict=True):
        out[:, grid.row0 : grid.row0 + grid.n_rows, grid.col0 : grid.col0 + grid.n_cols] = values
    return out


def read_box(density: Any, grid: Grid) -> FloatArray:
    """Part of a density, float32."""
    rows, cols = slice(grid.row0, grid.row0 + grid.n_rows), slice(grid.col0, grid.col0 + grid.n_cols)
    return np.asarray(density[:, rows, cols]).astype(np.float32)


def _windows(side: int) -> Iterator[Grid]:
    for row in range(0, side, DENSITY_WINDOW):
        for col in range(0, side, DENSITY_WINDOW):
            n_rows, n_cols = min(DENSITY_WINDOW, side - row), min(DENSITY_WINDOW, side - col)
            yield Grid(row, col, n_rows, n_cols, DENSITY_PITCH_UM)
