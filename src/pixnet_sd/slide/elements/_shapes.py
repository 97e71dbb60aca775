"""Shapes and labels elements as regions in their own coordinates; labels are read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import shapely
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError, ResolutionError
from pixnet_sd.geometry import Circles, Polygons, Regions, chunks
from pixnet_sd.slide.image import GuardedArray

from ._elements import affine_matrix, coordinate_systems, moved, scale0
from ._stored import sample_positions, sample_shapes, shapes_of

HALF_PIXEL_BACK = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
"""Map from pixels that cover [i, i + 1) to such as have their centre at i."""

_POINT, _POLYGON, _MULTIPOLYGON = 0, 3, 6  # shapely's type ids
_STRIP_PX = 1024
_SAMPLED_ROWS = 32
_TOLERANCE = 0.1  # label px
_MOSTLY, _NEARLY_ALL = 0.5, 0.9
_CHUNK = 2**17  # regions whose boxes are looked at in one go


def regions_from_shapes(shapes: GeoDataFrame, what: str) -> Circles | Polygons:
    """Circles (points with a radius) or polygons, one a row; `DataError`, which names ``what``, of unusable ones."""

    def refuse(bad: NDArray[np.bool_], fault: str, remedy: str) -> None:
        if bad.any():
            first = ", ".join(repr(name) for name in shapes.index[bad][:5].tolist())
            raise DataError(f"{what}: {int(bad.sum())} of {len(bad)} geometries are {fault} (first: {first}). {remedy}")

    geometry = shapes.geometry.to_numpy()
    if not len(geometry):
        raise DataError(f"{what} is empty.")
    refuse(shapely.is_missing(geometry) | shapely.is_empty(geometry), "missing or empty", "Drop them.")
    type_id = shapely.get_type_id(geometry)
    is_circles = (type_id == _POINT).all()
    if is_circles and "radius" not in shapes:
        raise DataError(f"{what} holds points without a column 'radius', so their extent is unknown.")
    if not is_circles:
        other = ~np.isin(type_id, (_POLYGON, _MULTIPOLYGON))
        refuse(other, "neither polygons nor multipolygons", "Keep one kind: circles or polygons.")
    xy, owner = shapely.get_coordinates(geometry, return_index=True)
    not_finite = np.isin(np.arange(len(geometry)), owner[~np.isfinite(xy).all(axis=1)])
    refuse(not_finite, "with coordinates that are NaN or infinite", "Drop or correct them.")
    if is_circles:
        radius = shapes["radius"].to_numpy(dtype=np.float64)
        unsized = np.asarray(~((radius > 0) & np.isfinite(radius)))
        refuse(unsized, "circles without a positive radius", "Drop or correct them.")
        return Circles(xy, radius)
    invalid = ~shapely.is_valid(geometry)
    refuse(invalid, "invalid (self-intersecting?)", "Repair them, for instance with geometry.buffer(0).")
    return _polygons(geometry)


def _polygons(geometry: NDArray[Any]) -> Polygons:
    """Valid (multi)polygons with their holes: outer rings wound one way, holes the other, none repeating a vertex."""
    if shapely.get_num_interior_rings(geometry).any() or (shapely.get_type_id(geometry) != _POLYGON).any():
        geometry = shapely.orient_polygons(geometry)  # bins, which need it not, take half the time
    _, vertices, offsets = shapely.to_ragged_array(geometry, include_z=False)
    first_vertex, first_ring = offsets[0].astype(np.int64), offsets[1]
    if len(offsets) > 2:  # some are multipolygons, and these begin at polygons
        first_ring = first_ring[offsets[2]]
    region = np.repeat(np.arange(len(geometry)), np.diff(first_ring))
    vertices = np.delete(vertices, first_vertex[1:] - 1, axis=0)
    return Polygons(vertices, first_vertex - np.arange(len(first_vertex)), region, len(geometry))


def edge_lengths(shapes: GeoDataFrame) -> NDArray[np.float64]:
    """Sides of squares, or widths of circles, in their own units."""
    if "radius" in shapes:
        return 2 * shapes["radius"].to_numpy(np.float64)
    return np.sqrt(shapely.area(shapes.geometry.to_numpy()))


class LazyLabels(GuardedArray):
    """Label image (row, col) of which slices are read when asked for; it pickles when its store does."""

    scheduler = "synchronous"  # one thread: windows are small, and several workers read at once

    def strips(self) -> Iterator[NDArray[Any]]:
        """All labels, some rows at a time."""
        return (self[top : top + _STRIP_PX] for top in range(0, self.shape[0], _STRIP_PX))

    @cached_property
    def sha256(self) -> str:
        """Hash of all labels; computed once for all regions that share them."""
        digest = hashlib.sha256(f"{self.shape}".encode())
        for strip in self.strips():
            digest.update(np.ascontiguousarray(strip, dtype="<i8").data)
        return digest.hexdigest()


def lazy_labels(element: Any) -> LazyLabels:
    """Scale 0 of a labels element."""
    return LazyLabels(scale0(element).transpose("y", "x").data)


def label_ids(sdata: SpatialData, key: str) -> pd.Index:
    """Values of a labels element above 0, ascending; `DataError` if there is none, or they are not whole numbers."""
    labels = lazy_labels(sdata.labels[key])
    if labels.dtype.kind not in "biu":
        raise DataError(
            f"Labels {key!r} are of dtype {labels.dtype}, and regions are told by whole numbers. Make them such, for "
            "instance with element.astype('int32') where NaN and background are 0."
        )
    values = np.unique(
        np.concatenate([np.unique(strip).astype(np.int64) for strip in labels.strips()] or [np.zeros(1, np.int64)])
    )
    if (values < 0).any():
        logger.info("Labels %r: negative values, such as %d, are taken as background.", key, values[0])
    if not (values > 0).any():
        raise DataError(f"Labels {key!r} hold nothing but background (0 or less).")
    return pd.Index(values[values > 0])


def label_matrix(sdata: SpatialData, key: str, coordinate_system: str) -> NDArray[np.float64]:
    """Map from the pixels of a labels element, pixel i covering [i, i + 1), to a coordinate system."""
    # The element's own, but for `spatialdata.rasterize_bins`: as of 0.8 it takes pixel (i, j), not (i + 0.5, j + 0.5),
    # to the centre of a bin. Bins that are a label pixel wide and centred on whole ones tell.
    to_system = affine_matrix(sdata.labels[key], coordinate_system)
    shapes = shapes_of(sdata).get(key.removesuffix("_labels"))
    if shapes is None or coordinate_system not in coordinate_systems(shapes):
        return to_system
    sample = sample_shapes(shapes)
    to_labels = np.linalg.inv(to_system) @ affine_matrix(shapes, coordinate_system)
    xy = moved(shapely.get_coordinates(shapely.centroid(sample.geometry.to_numpy())), to_labels)
    side_px = np.median(edge_lengths(sample)) * np.sqrt(abs(np.linalg.det(to_labels[:2, :2])))
    if abs(side_px - 1) >= _TOLERANCE or np.abs(xy - np.rint(xy)).max() >= _TOLERANCE:
        return to_system
    logger.info("Labels %r: moved by half a label pixel, as rasterized bins need it.", key)
    return np.asarray(to_system @ HALF_PIXEL_BACK)


def sample_labels(element: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels, each once, of pixels from a few rows spread over an element, and these pixels' centres (x, y), (n, 2)."""
    labels = lazy_labels(element)
    tops = sample_positions(labels.shape[0], _SAMPLED_ROWS)
    rows = np.concatenate([labels[top : top + 1] for top in tops])
    row, col = np.nonzero(rows > 0)
    picked = sample_positions(len(row))
    ids, first = np.unique(rows[row, col][picked].astype(np.int64), return_index=True)
    picked = picked[first]
    return ids, np.stack([col[picked], tops[row[picked]]], axis=1) + 0.5


def check_regions_on_image(regions: Regions, *, width: int, height: int, what: str) -> NDArray[np.bool_]:
    """Whether the box of each region touches the image; refuse them if none does, or most would with axes swapped."""
    n = len(regions)
    touches = np.zeros(n, bool)
    inside, swapped = 0, 0
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for place, some in chunks(regions, _CHUNK):
        x0, y0, x1, y1 = np.ascontiguousarray(some.bounds.T)  # numpy reduces short rows slowly
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        inside += int(((x >= 0) & (x <= width) & (y >= 0) & (y <= height)).sum())
        swapped += int(((x >= 0) & (x <= height) & (y >= 0) & (y <= width)).sum())
        touches[place] = (x0 < width) & (y0 < height) & (x1 > 0) & (y1 > 0)
        low, high = np.minimum(low, [x0.min(), y0.min()]), np.maximum(high, [x1.max(), y1.max()])
    extents = (
        f"Regions span x {low[0]:.0f} to {high[0]:.0f} and y {low[1]:.0f} to {high[1]:.0f}, the image x 0 to {width} "
        f"and y 0 to {height}, in working pixels."
    )
    if inside < _MOSTLY * n and swapped > _NEARLY_ALL * n:
        raise ResolutionError(
            f"{what}: {1 - inside / n:.0%} of {n} regions lie outside the image, but {swapped / n:.0%} would lie "
            "inside with x and y swapped. Geometry is (x, y), x to the right along columns: swap the coordinates or "
            f"correct the transformation. {extents}"
        )
    if not touches.any():
        raise ResolutionError(
            f"{what}: none of {n} regions touches the image. {extents} Check coordinate_system=, image_key=, and the "
            "transformations of both."
        )
    if not touches.all():
        warn(f"{what}: {int((~touches).sum())} of {n} regions lie wholly outside the image.")
    return touches
