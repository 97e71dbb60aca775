"""Drawn tissue: what a generated slide is made of."""

from __future__ import annotations

from ._cells import CellCounts, Cells, CountedCells, find_cells
from ._expression import (
    DENSITY_PITCH_UM,
    DENSITY_WINDOW,
    Panel,
    density_shape,
    draw_counts,
    fill_density,
    integrate_disks,
    integrate_on_grid,
    library_size,
)
from ._noise import Grid
from ._slide import BASE_UM, Band, Bins, DrawnSlide, Previews, bin_barcodes, cell_barcodes, preview_px, spot_barcodes
from ._tissue import WINDOW_PX, Source, draw

__all__ = [
    "BASE_UM",
    "DENSITY_PITCH_UM",
    "DENSITY_WINDOW",
    "WINDOW_PX",
    "Band",
    "Bins",
    "CellCounts",
    "Cells",
    "CountedCells",
    "DrawnSlide",
    "Grid",
    "Panel",
    "Previews",
    "Source",
    "bin_barcodes",
    "cell_barcodes",
    "density_shape",
    "draw",
    "draw_counts",
    "fill_density",
    "find_cells",
    "integrate_disks",
    "integrate_on_grid",
    "library_size",
    "preview_px",
    "spot_barcodes",
]
