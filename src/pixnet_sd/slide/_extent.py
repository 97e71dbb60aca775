"""Where elements lie relative to an image: on it or beside it, and the same in every coordinate system or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from ._elements import coordinate_systems, region_element, scale0
from ._stored_shapes import sample_shapes
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["corners_px", "image_extent", "moved", "moved_px", "on_image", "overlap", "shared_systems"]

_GRID, _ENOUGH = 9, 500  # points along each side of labels, and of shapes in all


def corners_px(element: Any) -> NDArray[np.float64]:
    """Corners of a raster element, pixels of scale 0, shape (4, 2) of (x, y)."""
    sizes = scale0(element).sizes
    width, height = sizes["x"], sizes["y"]
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)


def moved(points: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) under a map of (x, y, 1)."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def image_extent(element: Any, coordinate_system: str) -> NDArray[np.float64]:
    """Corners of a raster element in a coordinate system, shape (4, 2)."""
    return moved(corners_px(element), affine_matrix(element, coordinate_system))


def overlap(one: Any, other: Any, coordinate_system: str) -> bool:
    """Whether raster elements share a part of a coordinate system."""
    boxes = [shapely.Polygon(image_extent(element, coordinate_system)) for element in (one, other)]
    return bool(boxes[0].intersection(boxes[1]).area > 0) if all(box.is_valid for box in boxes) else True


def _points_of(sdata: SpatialData, key: str) -> NDArray[np.float64]:
    """Some points of shapes or labels, in their own coordinates, shape (n, 2): centres, or a grid over the labels."""
    element = region_element(sdata, key)
    if key in sdata.labels:
        width, height = corners_px(element)[2]
        x, y = np.meshgrid(np.linspace(0, width, _GRID), np.linspace(0, height, _GRID))
        return np.stack([x.ravel(), y.ravel()], axis=1)
    geometry = sample_shapes(element).geometry.to_numpy()
    geometry = geometry[:: max(1, len(geometry) // _ENOUGH)]
    known = geometry[~(shapely.is_missing(geometry) | shapely.is_empty(geometry))]
    return np.asarray(shapely.get_coordinates(shapely.centroid(known)))


def on_image(sdata: SpatialData, keys: Iterable[str], *, image_key: str, coordinate_system: str) -> list[str]:
    """Those elements of which some regions lie on an image; all of them if none does, for that is another error."""
    keys = list(keys)
    image = sdata.images[image_key]
    width, height = corners_px(image)[2]
    to_system = affine_matrix(image, coordinate_system)
    if abs(np.linalg.det(to_system)) == 0 or not np.isfinite(to_system).all():
        return keys
    to_image = np.linalg.inv(to_system)
    touching = []
    for key in keys:
        matrix = to_image @ affine_matrix(region_element(sdata, key), coordinate_system)
        x, y = moved(_points_of(sdata, key), matrix).T
        if ((x >= 0) & (x <= width) & (y >= 0) & (y <= height)).any():
            touching.append(key)
    return touching or keys


def moved_px(image: Any, element: Any, systems: Sequence[str]) -> dict[str, float]:
    """How far an element lies from where it lies in the first coordinate system, in pixels of an image.

    Parameters
    ----------
    image, element
        An image, and what was aligned with it.
    systems
        Coordinate systems that both are in.

    Returns
    -------
    By coordinate system the farthest that a place on the image is off; 0 for the first.
    """
    corners = corners_px(image)
    maps = {system: np.linalg.pinv(affine_matrix(image, system)) @ affine_matrix(element, system) for system in systems}
    places = moved(corners, np.asarray(np.linalg.pinv(maps[systems[0]]), np.float64))
    return {system: float(np.hypot(*(moved(places, matrix) - corners).T).max()) for system, matrix in maps.items()}


def shared_systems(*elements: Any) -> list[str]:
    """Coordinate systems that all of some elements are in."""
    found = [coordinate_systems(element) for element in elements]
    return [system for system in found[0] if all(system in other for other in found[1:])]
