"""Shapely geometries to regions, without a Python loop over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from pixnet_sd._errors import DataError
from pixnet_sd.nn.regions import Circles, Polygons

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

__all__ = ["edge_length", "polygons_from_shapely", "regions_from_shapes"]

_POINT, _POLYGON, _MULTIPOLYGON = 0, 3, 6
_FIRST = 5


def regions_from_shapes(shapes: GeoDataFrame, what: str) -> Circles | Polygons:
    """Circles (points with a radius) or polygons of a shapes element, in its own coordinates and order.

    Parameters
    ----------
    shapes
        The element.
    what
        Its name, for messages.

    Returns
    -------
    One region a row.

    Raises
    ------
    DataError
        If the element is empty, mixes kinds, or holds geometries that are missing, empty, invalid or not finite.
    """
    geometry = shapes.geometry.to_numpy()
    if not len(geometry):
        raise DataError(f"{what} is empty.")
    index = shapes.index
    _refuse(shapely.is_missing(geometry) | shapely.is_empty(geometry), index, what, "missing or empty", "Drop them.")
    kind = shapely.get_type_id(geometry)
    if (kind == _POINT).all():
        return _circles(shapes, geometry, what)
    other = ~np.isin(kind, (_POLYGON, _MULTIPOLYGON))
    _refuse(other, index, what, "neither polygons nor multipolygons", "Keep one kind: circles or polygons.")
    _refuse(~_finite(geometry), index, what, "with coordinates that are NaN or infinite", "Drop or correct them.")
    invalid = ~shapely.is_valid(geometry)
    _refuse(invalid, index, what, "invalid (self-intersecting?)", "Repair them, for instance with geometry.buffer(0).")
    return polygons_from_shapely(geometry)


def _refuse(bad: NDArray[np.bool_], index: pd.Index, what: str, fault: str, remedy: str) -> None:
    if bad.any():
        first = ", ".join(repr(name) for name in index[bad][:_FIRST].tolist())
        raise DataError(f"{what}: {int(bad.sum())} of {len(bad)} geometries are {fault} (first: {first}). {remedy}")


def _finite(geometry: NDArray[Any]) -> NDArray[np.bool_]:
    coordinates, owner = shapely.get_coordinates(geometry, return_index=True)
    finite = np.ones(len(geometry), dtype=bool)
    finite[owner[~np.isfinite(coordinates).all(axis=1)]] = False
    return finite


def _circles(shapes: GeoDataFrame, geometry: NDArray[Any], what: str) -> Circles:
    if "radius" not in shapes:
        raise DataError(f"{what} holds points without a column 'radius', so their extent is unknown.")
    radius = shapes["radius"].to_numpy(dtype=np.float64)
    bad = ~_finite(geometry)
    _refuse(bad, shapes.index, what, "with coordinates that are NaN or infinite", "Drop or correct them.")
    unsized = np.asarray(~((radius > 0) & np.isfinite(radius)))
    _refuse(unsized, shapes.index, what, "circles without a positive radius", "Drop or correct them.")
    return Circles(shapely.get_coordinates(geometry), radius)


def edge_length(shapes: GeoDataFrame) -> float:
    """Median side of squares, or width of circles, in their own units."""
    if "radius" in shapes:
        return float(2 * np.median(shapes["radius"]))
    return float(np.sqrt(np.median(shapely.area(shapes.geometry.to_numpy()))))


def polygons_from_shapely(geometry: NDArray[Any]) -> Polygons:
    """Polygons and multipolygons, with their holes, as regions.

    Parameters
    ----------
    geometry
        Valid polygons and multipolygons, shape (n,).

    Returns
    -------
    One region a geometry: outer rings wound one way, holes the other, none repeating its first vertex.
    """
    rings, region = _rings(geometry)
    vertices, ring = shapely.get_coordinates(rings, return_index=True)
    last = np.append(ring[1:] != ring[:-1], True)
    sizes = np.bincount(ring[~last], minlength=len(rings))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Polygons(vertices[~last], offsets, region, len(geometry))


def _rings(geometry: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All rings, outer ones wound one way and holes the other, and the geometry that each belongs to."""
    if (shapely.get_type_id(geometry) == _POLYGON).all() and not shapely.get_num_interior_rings(geometry).any():
        return shapely.get_exterior_ring(geometry), np.arange(len(geometry))  # millions of bins: half the time
    parts, region = shapely.get_parts(shapely.orient_polygons(geometry), return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    return rings, region[part].astype(np.int64)
