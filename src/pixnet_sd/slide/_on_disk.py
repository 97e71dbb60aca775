"""Whether what a backed object holds in memory is what its store holds, before results are written beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
import zarr
from numpy.typing import NDArray

from pixnet_sd._errors import StoreError

from ._elements import coordinate_systems, names
from ._image import stored_array
from ._look import computed, levels_of
from ._store_parts import read_part
from ._stored_shapes import StoredShapes, sample_shapes
from ._transform import affine_matrix

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["check_on_disk"]

_MANY_SHAPES = 1_000_000  # of more, ids and a sample of the outlines are compared
_STRIP_VALUES = 2**25
_KINDS = ("images", "labels", "shapes")


def check_on_disk(sdata: SpatialData, *keys: str | None) -> None:
    """Refuse elements of a backed object that its store lacks or has otherwise: results there would not fit them.

    Parameters
    ----------
    sdata
        The object; one that is not backed by a local store is not looked at.
    keys
        Names of images, labels and shapes; None is passed over.

    Raises
    ------
    StoreError
        If an element is missing in the store, or lies elsewhere or has other pixels, ids or outlines there.
    """
    if not isinstance(sdata.path, Path) or not sdata.path.is_dir():
        return
    for key in keys:
        for kind in _KINDS:
            if key is not None and key in getattr(sdata, kind):  # what is left on disk cannot differ
                _check(getattr(sdata, kind)[key], sdata.path, kind, key)


def _check(element: Any, store: Path, kind: str, key: str) -> None:
    if not (store / kind / key / "zarr.json").is_file():
        raise StoreError(
            f"{kind} element {key!r} is in memory and not in the store {store}, into which the results go. Write it "
            f"first: sdata.write_element({key!r})."
        )
    on_disk: Any = _read(store, kind, key)
    differ = [
        system
        for system in sorted({*coordinate_systems(element), *coordinate_systems(on_disk)})
        if not _same_place(element, on_disk, system)
    ]
    if differ:
        raise StoreError(
            f"{kind} element {key!r} has another transformation in memory than in the store {store}, to coordinate "
            f"system {names(differ)}, so that results there would lie elsewhere. Write it first: "
            f"sdata.write_transformations({key!r}); or read the object again."
        )
    what = _changed_shapes(element, on_disk) if kind == "shapes" else _changed_pixels(element, on_disk, store)
    if what:
        raise StoreError(
            f"{kind} element {key!r} has other {what} in memory than in the store {store}, so that results there would "
            "not fit. Write it under a name of its own, sdata['new'] = ... and sdata.write_element('new'), or read the "
            "object again."
        )


def _read(store: Path, kind: str, key: str) -> Any:
    if kind != "shapes":
        return getattr(read_part(store, {kind: [key]}), kind)[key]
    stored = StoredShapes(store / kind / key)
    return stored if len(stored) > _MANY_SHAPES else stored.load()


def _same_place(element: Any, on_disk: Any, system: str) -> bool:
    if system not in coordinate_systems(element) or system not in coordinate_systems(on_disk):
        return False
    return bool(np.allclose(affine_matrix(element, system), affine_matrix(on_disk, system), rtol=1e-9, atol=1e-9))


def _changed_pixels(element: Any, on_disk: Any, store: Path) -> str:
    levels, stored_levels = levels_of(element), levels_of(on_disk)
    if len(levels) != len(stored_levels):
        return "levels"
    for level, there in zip(levels, stored_levels, strict=True):
        array = _array_of(there, store)
        own = stored_array(level.data)
        if own is not None and _path(own) == _path(array):
            continue
        if level.shape != array.shape or level.dtype != array.dtype or not _same_values(level, array):
            return "pixels"
    return ""


def _array_of(level: Any, store: Path) -> zarr.Array[Any]:
    """The array in the store; the element was read by way of a folder that is gone."""
    found = stored_array(level.data)
    if found is None:
        raise StoreError(f"Pixels in the store {store} cannot be found. Read the object again.")
    array: Any = zarr.open_array(store.joinpath(*Path(_path(found)).parts[-3:]), mode="r")
    return array


def _path(array: zarr.Array[Any]) -> str:
    return str(Path(str(array.store_path).removeprefix("file://")).resolve())


def _same_values(level: Any, array: zarr.Array[Any]) -> bool:
    return all(np.array_equal(computed(level.data[strip]), array[strip]) for strip in _strips(level.shape))


def _strips(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Rows of an array, some at a time."""
    height, others = shape[-2], int(np.prod(shape)) // max(1, shape[-2])
    step = max(1, _STRIP_VALUES // max(1, others))
    for top in range(0, height, step):
        yield (*[slice(None)] * (len(shape) - 2), slice(top, top + step))


def _changed_shapes(shapes: GeoDataFrame, on_disk: GeoDataFrame | StoredShapes) -> str:
    if len(shapes) != len(on_disk) or not np.array_equal(shapes.index.to_numpy(), on_disk.index.to_numpy()):
        return "ids"
    if isinstance(on_disk, StoredShapes):
        there = sample_shapes(on_disk)
        shapes, on_disk = shapes.loc[there.index], there
    one, other = _outlines(shapes), _outlines(on_disk)
    same = all(a.shape == b.shape and np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))
    return "" if same else "outlines"


def _outlines(shapes: GeoDataFrame) -> tuple[NDArray[np.float64], ...]:
    geometry = shapes.geometry.to_numpy()
    xy, owner = shapely.get_coordinates(geometry, return_index=True)
    radius = shapes["radius"].to_numpy(np.float64) if "radius" in shapes else np.zeros(0)
    return xy, owner.astype(np.float64), radius
