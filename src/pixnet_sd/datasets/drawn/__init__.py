"""Drawn tissue: what a generated slide is made of."""

from __future__ import annotations

from ._expression import (
    DENSITY_WINDOW,
    Panel,
    density_shape,
    draw_counts,
    draw_density,
    fill_density,
    integrate_on_grid,
    integrate_shapes,
    library_size,
)
from ._image import WINDOW_PX, Previews, draw, draw_window, preview_px
from ._slide import BASE_UM, Band, CellCounts, DrawnSlide, bin_barcodes, cell_barcodes, spot_barcodes
from ._tissue import Grid, Source, hash_unit, in_order

__all__ = [
    "BASE_UM",
    "DENSITY_WINDOW",
    "WINDOW_PX",
    "Band",
    "CellCounts",
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
    "draw_density",
    "draw_window",
    "fill_density",
    "hash_unit",
    "in_order",
    "integrate_on_grid",
    "integrate_shapes",
    "library_size",
    "preview_px",
    "spot_barcodes",
]
