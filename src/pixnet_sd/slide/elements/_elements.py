"""Elements by name, their maps to coordinate systems, and where they lie relative to an image.

Maps are 3 x 3 matrices of (x, y, 1); coordinates of a raster element are pixels of its scale 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from spatialdata.transformations import get_transformation
from xarray import DataTree

from pixnet_sd._notes import memory_note, table_note
from pixnet_sd.errors import ElementError, ResolutionError

from ._stored import StoredShapes, sample_shapes, shapes_of, tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

_ANISOTROPY_TOLERANCE = 1e-3
_GRID, _ENOUGH = 9, 500  # points along each side of labels, and of shapes in all
_XY = ("x", "y")


def scale0(element: Any) -> DataArray:
    """Full-resolution array of a single-scale or multiscale raster element."""
    return next(iter(element["scale0"].data_vars.values())) if isinstance(element, DataTree) else element


def coordinate_systems(element: Any) -> dict[str, Any]:
    """Coordinate systems of an element with the transformation to each, in the order of their names."""
    element = element.sample if isinstance(element, StoredShapes) else element
    systems: dict[str, Any] = get_transformation(element, get_all=True)
    return dict(sorted(systems.items()))


def shared_systems(*elements: Any) -> list[str]:
    """Coordinate systems that all of some elements are in."""
    first, *others = map(coordinate_systems, elements)
    return [system for system in first if all(system in other for other in others)]


def names(keys: Iterable[str]) -> str:
    """Quoted, comma-separated names; the empty name, which readers do produce, stays visible."""
    return ", ".join(repr(key) for key in keys) or "none"


def region_element(sdata: SpatialData, key: str) -> Any:
    """The shapes (in memory or only in the store) or labels element of that name; `ElementError` if there is none."""
    shapes = shapes_of(sdata)
    if key in shapes:
        return shapes[key]
    if key in sdata.labels:
        return sdata.labels[key]
    raise ElementError(
        f"There is no shapes or labels element {key!r} in this SpatialData object. Shapes: {names(shapes)}. Labels: "
        f"{names(sdata.labels)}. Check shapes_key=."
    )


def written_by_pixnet(sdata: SpatialData) -> set[str]:
    """Names of the images and shapes that this package made; elements of the user that it annotated are not among them.

    Shapes that `tl.predict` makes are called after the table that comes with them, ``{table}_shapes``.
    """
    maps = memory_note(sdata, "maps") or {}
    return {*maps, *(f"{key}_shapes" for key, table in tables_of(sdata).items() if table_note(table) is not None)}


def affine_matrix(element: Any, coordinate_system: str) -> NDArray[np.float64]:
    """Map, (3, 3), from an element's own coordinates to a coordinate system; `ElementError` if it is not in there."""
    systems = coordinate_systems(element)
    if coordinate_system not in systems:
        raise ElementError(
            f"The element has no transformation to coordinate system {coordinate_system!r}; it has {names(systems)}."
        )
    return np.asarray(systems[coordinate_system].to_affine_matrix(_XY, _XY), dtype=np.float64)


def similarity_scale(matrix: ArrayLike, what: str) -> float:
    """Length scale of a similarity (rotation, reflection, uniform scale, translation), sqrt(abs(det A)).

    `ResolutionError`, which names ``what``, if the singular values of the linear part differ by more than 0.1 %, vanish
    or are not finite.
    """
    linear = np.asarray(matrix, dtype=np.float64)[:2, :2]
    if not np.isfinite(linear).all():
        raise ResolutionError(f"The transformation of {what} holds values that are not finite: {linear.tolist()}.")
    large, small = np.linalg.svd(linear, compute_uv=False)
    if small <= 0 or (large - small) / large > _ANISOTROPY_TOLERANCE:
        raise ResolutionError(
            f"The transformation of {what} scales its two axes differently or shears (singular values {large:.6g} and "
            f"{small:.6g}), so one number of micrometres per pixel does not exist. Only rotation, reflection, uniform "
            "scale and translation are supported: resample the element, or correct its transformation."
        )
    return float(np.sqrt(large * small))


def _corners_px(element: Any) -> NDArray[np.float64]:
    """Corners of a raster element, (4, 2) of (x, y)."""
    width, height = (scale0(element).sizes[axis] for axis in _XY)
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)


def moved(points: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) under a map of (x, y, 1)."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def image_extent(element: Any, coordinate_system: str) -> NDArray[np.float64]:
    """Corners of a raster element in a coordinate system, (4, 2)."""
    return moved(_corners_px(element), affine_matrix(element, coordinate_system))


def _points_of(sdata: SpatialData, key: str) -> NDArray[np.float64]:
    """Points of shapes (centres of some) or labels (a grid) in their own coordinates, (n, 2)."""
    element = region_element(sdata, key)
    if key in sdata.labels:
        width, height = _corners_px(element)[2]
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
    width, height = _corners_px(image)[2]
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
    """How far an element lies from where it lies in the first coordinate system, in px of an image that is in them too.

    By coordinate system the farthest that a place on the image is off; 0 for the first.
    """
    corners = _corners_px(image)
    maps = {system: np.linalg.pinv(affine_matrix(image, system)) @ affine_matrix(element, system) for system in systems}
    places = moved(corners, np.asarray(np.linalg.pinv(maps[systems[0]]), np.float64))
    return {system: float(np.hypot(*(moved(places, matrix) - corners).T).max()) for system, matrix in maps.items()}
