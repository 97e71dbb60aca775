"""Drawn tissue: what a generated slide is made of."""

from __future__ import annotations

from ._expression import DENSITY_WINDOW as DENSITY_WINDOW
from ._expression import Panel as Panel
from ._expression import density_shape as density_shape
from ._expression import draw_counts as draw_counts
from ._expression import draw_density as draw_density
from ._expression import fill_density as fill_density
from ._expression import integrate_on_grid as integrate_on_grid
from ._expression import integrate_shapes as integrate_shapes
from ._expression import library_size as library_size
from ._image import WINDOW_PX as WINDOW_PX
from ._image import Previews as Previews
from ._image import draw as draw
from ._image import draw_window as draw_window
from ._image import preview_px as preview_px
from ._slide import BASE_UM as BASE_UM
from ._slide import Band as Band
from ._slide import CellCounts as CellCounts
from ._slide import DrawnSlide as DrawnSlide
from ._slide import bin_barcodes as bin_barcodes
from ._slide import cell_barcodes as cell_barcodes
from ._slide import spot_barcodes as spot_barcodes
from ._tissue import Grid as Grid
from ._tissue import Source as Source
from ._tissue import hash_unit as hash_unit
from ._tissue import in_order as in_order
