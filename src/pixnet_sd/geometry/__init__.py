"""Regions, lattices of regions and the grid of the gene map: numpy only."""

from __future__ import annotations

from ._grid import MAP_STRIDE, STRIDES, Grid, RegionShare, Window, cumulated_weights, reach, resize_taps
from ._groups import neighbour_groups
from ._lattice import Lattice
from ._regions import (
    SNAP_PX,
    Circles,
    Float,
    Int,
    LabelGrid,
    Polygons,
    Regions,
    Spans,
    chunks,
    first_centre,
    ranges,
    squares,
)

__all__ = [
    "MAP_STRIDE",
    "SNAP_PX",
    "STRIDES",
    "Circles",
    "Float",
    "Grid",
    "Int",
    "LabelGrid",
    "Lattice",
    "Polygons",
    "RegionShare",
    "Regions",
    "Spans",
    "Window",
    "chunks",
    "cumulated_weights",
    "first_centre",
    "neighbour_groups",
    "ranges",
    "reach",
    "resize_taps",
    "squares",
]
