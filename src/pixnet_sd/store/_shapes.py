"""Regions as shapes elements, in pixels of the image's scale 0 and with all of its coordinate systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import shapely
from spatialdata.models import ShapesModel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata.transformations import BaseTransformation

__all__ = ["circles_element", "squares_element"]


def circles_element(
    centres_px: NDArray[np.float64],
    radius_px: float,
    transforms: Mapping[str, BaseTransformation],
    *,
    index: Sequence[Any] | NDArray[Any] | None = None,
) -> gpd.GeoDataFrame:
    """Circles of one radius.

    Parameters
    ----------
    centres_px
        (n, 2) x, y in image scale-0 pixels.
    radius_px
        Radius in image scale-0 pixels.
    transforms
        Transformations of the image (`image_transforms`).
    index
        Instance ids; default 0 … n − 1.
    """
    frame = gpd.GeoDataFrame({"radius": np.full(len(centres_px), float(radius_px))}, geometry=_points(centres_px))
    return _parsed(frame, transforms, index)


def squares_element(
    centres_px: NDArray[np.float64],
    side_px: float,
    transforms: Mapping[str, BaseTransformation],
    *,
    angle_rad: float = 0.0,
    index: Sequence[Any] | NDArray[Any] | None = None,
) -> gpd.GeoDataFrame:
    """Squares of one size.

    Parameters
    ----------
    centres_px
        (n, 2) x, y in image scale-0 pixels.
    side_px
        Side in image scale-0 pixels.
    transforms
        Transformations of the image (`image_transforms`).
    angle_rad
        Angle from the image's x axis towards its y axis by which the squares are turned.
    index
        Instance ids; default 0 … n − 1.
    """
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    ring = side_px / 2 * np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    ring = ring @ np.array([[cos, sin], [-sin, cos]])
    points = (np.asarray(centres_px, dtype=np.float64)[:, None] + ring).reshape(-1, 2)
    each = np.arange(len(points) // len(ring) + 1)
    # from flat arrays in a quarter of the time that `shapely.polygons` takes
    squares = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, (each * len(ring), each))
    frame = gpd.GeoDataFrame(geometry=np.asarray(squares))
    return _parsed(frame, transforms, index)


def _points(centres_px: NDArray[np.float64]) -> NDArray[np.object_]:
    return np.asarray(shapely.points(np.asarray(centres_px, dtype=np.float64)))


def _parsed(
    frame: gpd.GeoDataFrame, transforms: Mapping[str, BaseTransformation], index: Sequence[Any] | NDArray[Any] | None
) -> gpd.GeoDataFrame:
    if index is not None:
        frame.index = np.asarray(index)
    return ShapesModel.parse(frame, transformations=dict(transforms))
