"""Visium HD bins: lattices of touching squares by their geometry, of which a name tells no more than the side in µm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray

from ._elements import scale0
from ._ids import check_unique
from ._labels import LazyLabels
from ._lattice import FEWEST_BINS, pitch_of_element
from ._shapes import edge_length
from ._stored_shapes import StoredShapes, neighbouring_shapes, sample_positions, shapes_of
from ._tables import bin_size_um

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["BinLattice", "bin_lattice", "grid_pitch"]

_TOLERANCE = 0.05  # of a side: what neighbours may be off
_OFF_LATTICE = 0.1  # of a side: what a neighbour may lie beside a lattice point
_TOUCHING = 0.5  # share of bins that touch another
_ALONG = 0.05  # share of the touching pairs that each axis has at least
_NEIGHBOURS = 8
_SQUARE = 16.0  # perimeter² / area
_MOST_INDEXED = 2**18  # shapes up to which the indices of a table cost nothing
_STRIPS = 16


@dataclass(frozen=True)
class BinLattice:
    """A lattice of touching squares.

    Attributes
    ----------
    key
        Name of the shapes or labels element.
    size_um
        Side of a square, from that name.
    pitch
        Side in the element's own coordinates.
    how
        How it was found, for a message.
    """

    key: str
    size_um: int
    pitch: float
    how: str


def bin_lattice(sdata: SpatialData, key: str, *, exact: bool = False) -> BinLattice | None:
    """The lattice of an element that is named as Visium HD bins are (``_008um``), if it is one of touching squares.

    Parameters
    ----------
    sdata
        The object to look in.
    key
        Name of a shapes or labels element.
    exact
        Whether the pitch is wanted to more than a thousandth, which takes all indices of a table.

    Returns
    -------
    The lattice; None for circles of interest, cells, fields of view and whatever else may be named so.
    """
    size = bin_size_um(key)
    if size is None:
        return None
    if key in sdata.labels:
        side = _one_pixel_each(sdata, key)
        return None if side is None else BinLattice(key, size, side, f"{size} µm label pixels of {key!r}")
    shapes = shapes_of(sdata)
    if key not in shapes or len(shapes[key]) < FEWEST_BINS:
        return None
    drawn = shapes[key]
    check_unique((drawn.sample if isinstance(drawn, StoredShapes) else drawn).index, f"Shapes {key!r}")
    indexed_first = exact or len(shapes[key]) <= _MOST_INDEXED
    for is_indexed in (indexed_first, not indexed_first):
        pitch = pitch_of_element(sdata, key) if is_indexed else _drawn_pitch(neighbouring_shapes(shapes[key]))
        if pitch is not None:
            what = "lattice pitch" if is_indexed else "neighbour distance"
            return BinLattice(key, size, pitch, f"{what} of the {size} µm bins {key!r}")
    return None


def _drawn_pitch(shapes: GeoDataFrame) -> float | None:
    """Pitch of shapes that are squares, or circles as wide, of one size and touching on a square lattice."""
    geometry = shapes.geometry.to_numpy()
    if len(geometry) < FEWEST_BINS or not _are_equal_squares(shapes):
        return None
    return grid_pitch(shapely.get_coordinates(shapely.centroid(geometry)), edge_length(shapes))


def _are_equal_squares(shapes: GeoDataFrame) -> bool:
    some = shapes.iloc[sample_positions(len(shapes))]
    if "radius" in some:
        side = 2 * some["radius"].to_numpy(np.float64)
    else:
        geometry = some.geometry.to_numpy()
        area = shapely.area(geometry)
        if not (area > 0).all() or np.abs(shapely.length(geometry) ** 2 / area / _SQUARE - 1).max() > _TOLERANCE:
            return False
        side = np.sqrt(area)
    return bool(side.min() > 0 and side.max() / side.min() - 1 < _TOLERANCE)


def grid_pitch(xy: NDArray[np.float64], side: float) -> float | None:
    """Distance of neighbours, if points lie on a square lattice whose pitch is the side of what is drawn about them.

    Parameters
    ----------
    xy
        Points, shape (n, 2); gaps do not matter as long as half of them have a neighbour.
    side
        Side of a square.
    """
    from scipy.spatial import cKDTree

    if not np.isfinite(xy).all():
        return None
    some = xy[sample_positions(len(xy))]
    distance, which = cKDTree(xy).query(some, k=min(_NEIGHBOURS + 1, len(xy)))
    step = (xy[which[:, 1:]] - some[:, None]) @ np.array([1, 1j])
    touches = np.abs(distance[:, 1:] / side - 1) < _TOLERANCE
    if touches.any(axis=1).mean() < _TOUCHING or distance[:, 1].min() < side * (1 - _TOLERANCE):
        return None
    pitch = float(np.abs(step[touches]).mean())
    quarter = ((step[touches] / np.abs(step[touches])) ** 4).mean()  # turns by 90° coincide
    grid = step * np.exp(-0.25j * np.angle(quarter)) / pitch
    along = np.abs(grid[touches].real).round().mean()
    if not _ALONG < along < 1 - _ALONG:
        return None
    near = grid[distance[:, 1:] < 2.5 * side]
    off = np.maximum(np.abs(near.real - near.real.round()), np.abs(near.imag - near.imag.round()))
    return pitch if np.mean(off < _OFF_LATTICE) > 1 - _ALONG / 5 else None


def _one_pixel_each(sdata: SpatialData, key: str) -> float | None:
    """1, the side of a label pixel, if every region of a labels element is one pixel and touches others."""
    labels = LazyLabels(scale0(sdata.labels[key]).transpose("y", "x").data)
    tops = np.unique(np.linspace(0, max(0, labels.shape[0] - 2), _STRIPS).astype(int) // 2 * 2)
    rows = np.concatenate([labels[top : top + 2] for top in tops])
    filled = rows[rows != 0]
    if len(filled) < FEWEST_BINS or len(np.unique(filled)) < len(filled):
        return None
    touching = (rows[:, 1:] != 0) & (rows[:, :-1] != 0)
    return 1.0 if touching.sum() >= _TOUCHING * len(filled) / 2 else None
