"""What an element is called, where it lives, and how to speak of it in a message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pixnet_sd._errors import ElementError

from ._stored_shapes import StoredShapes, shapes_of
from ._stored_table import tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

__all__ = ["coordinate_systems", "describe_images", "names", "region_element", "scale0", "written_by_pixnet"]


def scale0(element: Any) -> DataArray:
    """Full-resolution array of a single-scale or multiscale raster element."""
    from xarray import DataTree

    if isinstance(element, DataTree):
        return next(iter(element["scale0"].data_vars.values()))
    return element


def coordinate_systems(element: Any) -> dict[str, Any]:
    """Coordinate systems of an element with the transformation to each, in the order of their names."""
    from spatialdata.transformations import get_transformation

    element = element.sample if isinstance(element, StoredShapes) else element
    found: dict[str, Any] = get_transformation(element, get_all=True)
    return dict(sorted(found.items()))


def names(keys: Iterable[str]) -> str:
    """Quoted, comma-separated names; the empty name, which readers do produce, stays visible."""
    return ", ".join(repr(key) for key in keys) or "none"


def describe_images(sdata: SpatialData, keys: Mapping[str, str]) -> str:
    """One phrase an image: name, shape, channels, what else is said of it, and coordinate systems."""
    return "; ".join(_describe_image(key, sdata.images[key], what) for key, what in keys.items())


def _describe_image(key: str, element: Any, what: str) -> str:
    image = scale0(element)
    shape = " x ".join(f"{image.sizes[axis]} {axis}" for axis in ("c", "y", "x"))
    channels = ", ".join(map(str, image.coords["c"].values[:6])) if "c" in image.coords else ""
    parts = [shape, f"channels {channels}" if channels else "", what]
    parts.append(f"coordinate systems: {names(coordinate_systems(element))}")
    return f"{key!r} ({'; '.join(filter(None, parts))})"


def region_element(sdata: SpatialData, key: str) -> Any:
    """The shapes (in memory or only in the store) or labels element of that name.

    Raises
    ------
    ElementError
        If there is none.
    """
    shapes = shapes_of(sdata)
    if key in shapes:
        return shapes[key]
    if key in sdata.labels:
        return sdata.labels[key]
    found = f"Shapes: {names(shapes)}. Labels: {names(sdata.labels)}."
    raise ElementError(
        f"There is no shapes or labels element {key!r} in this SpatialData object. {found} Check shapes_key=."
    )


def written_by_pixnet(sdata: SpatialData) -> set[str]:
    """Names of the images and shapes that this package made; elements of the user that it annotated are not among them.

    Shapes that `tl.predict` makes are called after the table that comes with them, ``{table}_shapes``.
    """
    maps = set(sdata.attrs.get("pixnet_sd", {}).get("maps", {}))
    return maps | {f"{key}_shapes" for key, table in tables_of(sdata).items() if "pixnet_sd" in table.uns}
