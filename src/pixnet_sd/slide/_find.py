"""Whether one image is a copy of another, mostly a smaller one.

Which image is the slide.

Whether what a backed object holds in memory is what its store holds, before results are written beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
import zarr
from numpy.typing import NDArray

from pixnet_sd._util import logger
from pixnet_sd.errors import ElementError, StoreError

from .elements import (
    StoredShapes,
    affine_matrix,
    coordinate_systems,
    describe_images,
    image_extent,
    names,
    overlap,
    read_part,
    sample_shapes,
    scale0,
    shared_systems,
    written_by_pixnet,
)
from .image import (
    Naming,
    coarsest,
    computed,
    is_bright_field,
    is_cheap_to_look_at,
    levels_of,
    naming_of,
    pixel_sample,
    stored_array,
)

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["check_on_disk", "is_copy", "other_slides", "select_image"]

_SAME_PLACE = 0.02  # of the extent: copies are cropped to whole pixels
_PIXELS = 1.5  # of the smaller image
_MOST_PX, _ENOUGH_PX = 2**24, 2**20  # of a level that is read, and that are compared
_GRID, _CELL_PX = 24, 4  # cells along each side that are compared, and pixels of the smaller image in one
_ALIKE = 0.8  # correlation of grey levels
_FLAT, _SAME = 1.0, 2.0  # deviation of grey levels below which there is nothing to compare, and of colours that are one


def is_copy(sdata: SpatialData, large: str, small: str) -> bool:
    """Whether an image shows the same as another that has fewer pixels, or is the same as one with as many.

    They have to cover the same place in a coordinate system that they share. If that is made of the pixels of the one,
    and the other has another made of its own, as readers place the pictures that come with a slide, nothing more is
    asked. Otherwise their pixels must go together: two samples of one size may well lie on one another. Of as many
    pixels their colours have to be the same too, for one may be a version of the other.
    """
    one, other = sdata.images[large], sdata.images[small]
    n_px = [int(np.prod(scale0(element).shape[-2:])) for element in (one, other)]
    systems = [system for system in shared_systems(one, other) if _cover_the_same(one, other, system)]
    if n_px[0] < n_px[1] or not systems:
        return False
    return any(_comes_with(one, other, system) for system in systems) or _look_alike(
        one, other, same_colours=n_px[0] == n_px[1]
    )


def _comes_with(one: Any, other: Any, system: str) -> bool:
    """Whether a coordinate system is made of the pixels of an image, and another of those of what was made of it."""
    own = [name for name in coordinate_systems(other) if name != system and _is_identity(other, name)]
    return bool(own) and _is_identity(one, system)


def _is_identity(element: Any, system: str) -> bool:
    return bool(np.allclose(affine_matrix(element, system), np.eye(3), atol=1e-6))


def _cover_the_same(one: Any, other: Any, system: str) -> bool:
    corners = image_extent(one, system), image_extent(other, system)
    sides = [float(np.hypot(*(c[1:] - c[:-1]).T).max()) for c in corners]
    smallest = min(scale0(other).shape[-2:])
    tolerance = max(_SAME_PLACE * sides[0], _PIXELS * sides[1] / smallest)
    return bool(np.hypot(*(corners[0] - corners[1]).T).max() <= tolerance)


def _look_alike(one: Any, other: Any, *, same_colours: bool) -> bool:
    """Whether pixels over a grid of places go together, or there is nothing to compare."""
    levels = _levels_of_one_size(one, other) if same_colours else [coarsest(each, 2 * _GRID) for each in (one, other)]
    if not all(level.shape[-2] * level.shape[-1] <= _MOST_PX and is_cheap_to_look_at(level) for level in levels):
        return not same_colours
    n = int(np.clip(min(levels[1].shape[-2:]) // _CELL_PX, 1, _GRID))
    colours = [_on_grid(level, n) for level in levels]
    if same_colours:
        same = levels[0].dtype == levels[1].dtype and colours[0].shape == colours[1].shape
        return bool(same and np.abs(colours[0] - colours[1]).max() < _SAME)
    grey = [each[:3].mean(axis=0) for each in colours]
    if min(each.std() for each in grey) < _FLAT:
        return True
    return bool(np.corrcoef(grey[0], grey[1])[0, 1] > _ALIKE)


def _levels_of_one_size(one: Any, other: Any) -> list[Any]:
    """The coarsest levels of two images that have as many pixels, for these are averaged alike."""
    pairs = [(a, b) for a in levels_of(one) for b in levels_of(other) if a.shape == b.shape]
    return list(pairs[-1]) if pairs else [levels_of(one)[0], levels_of(other)[0]]


def _on_grid(level: Any, n: int) -> NDArray[np.float64]:
    """Means of a level over n x n cells, shape (channels, n²)."""
    every = int(np.ceil(np.sqrt(level.shape[-2] * level.shape[-1] / _ENOUGH_PX)))
    pixels = computed(level.data[:, ::every, ::every]).astype(np.float64)
    rows, cols = (np.linspace(0, size, n + 1).astype(int) for size in pixels.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], axis=1), cols[:-1], axis=2)
    return np.asarray(sums / np.outer(np.diff(rows), np.diff(cols))).reshape(len(pixels), -1)


def select_image(sdata: SpatialData, *, image_key: str | None = None, coordinate_system: str | None = None) -> str:
    """Find the slide image: the one named, or the only one that can be meant.

    Images that pixnet_sd wrote are never meant. Of others those come first that look like H&E: three channels that are
    named as colours, or not named, on a bright ground, or that are named otherwise and bright. Of several the one is
    taken of which all others are smaller copies, as the readers of spatialdata-io put them beside it: they cover the
    same place in a coordinate system that they share, and look the same.

    Parameters
    ----------
    sdata
        The object to look in.
    image_key
        Name of the image, if it is not to be found.
    coordinate_system
        Only images in this coordinate system are considered.

    Returns
    -------
    Name of an image element.

    Raises
    ------
    ElementError
        If there is no image, none fits, or several do.
    """
    if image_key is not None:
        _check_image(sdata, image_key, coordinate_system)
        return image_key
    there = _placed_images(sdata, coordinate_system)
    looks = {key: _Looks.of(sdata.images[key]) for key in there}
    likely = _likely(looks)
    if len(likely) > 1:
        full = _full_image_of(sdata, likely)
        if full is None:
            why = {key: look.describe() for key, look in looks.items() if key in likely}
            raise ElementError(
                f"Several images could be the slide: {describe_images(sdata, why)}. Name one with image_key=."
            )
        copies = names(key for key in likely if key != full)
        logger.info("Image %r taken as the slide; %s are copies of it.", full, copies)
        likely = [full]
    beside = {key: look.describe() for key, look in looks.items() if look.rank > looks[likely[0]].rank}
    if any(_is_rgb(looks[key]) for key in beside):
        logger.info("Image %r taken as the slide; not H&E: %s.", likely[0], describe_images(sdata, beside))
    return likely[0]


def other_slides(sdata: SpatialData, *, image_key: str, coordinate_system: str) -> list[str]:
    """Images that overlap one in a coordinate system, look like H&E, and are not copies of it."""
    others = [key for key in _placed_images(sdata, coordinate_system) if key != image_key]
    others = [key for key in others if overlap(sdata.images[image_key], sdata.images[key], coordinate_system)]
    whole = [key for key in others if is_copy(sdata, key, image_key)]  # of which the image is a copy
    others = [key for key in others if not any(is_copy(sdata, large, key) for large in (image_key, *whole))]
    others = [key for key in others if _Looks.of(sdata.images[key]).rank == 0]
    copies = {small for small in others for large in others if small != large and is_copy(sdata, large, small)}
    return [key for key in others if key not in copies] or others[:1]


def _check_image(sdata: SpatialData, image_key: str, coordinate_system: str | None) -> None:
    if image_key not in sdata.images:
        is_other = f" ({image_key!r} is another kind of element)" if image_key in sdata else ""
        raise ElementError(
            f"There is no image {image_key!r}{is_other}. Images: {names(sdata.images)}. Check image_key=."
        )
    systems = coordinate_systems(sdata.images[image_key])
    if coordinate_system is not None and coordinate_system not in systems:
        raise ElementError(
            f"Image {image_key!r} is not in coordinate system {coordinate_system!r}, but in {names(systems)}. Check "
            "coordinate_system=."
        )


def _placed_images(sdata: SpatialData, coordinate_system: str | None) -> list[str]:
    """Images that are not ours, in a coordinate system."""
    own = written_by_pixnet(sdata)
    there = [key for key in sdata.images if key not in own]
    if not there:
        found = f" Only images written by pixnet_sd were found: {names(sdata.images)}." if len(sdata.images) else ""
        raise ElementError(f"The SpatialData object has no slide image.{found} Add the H&E image with Image2DModel.")
    if coordinate_system is None:
        return there
    placed = [key for key in there if coordinate_system in coordinate_systems(sdata.images[key])]
    if not placed:
        raise ElementError(
            f"No image is in coordinate system {coordinate_system!r}: "
            f"{describe_images(sdata, dict.fromkeys(there, ''))}. Check coordinate_system=."
        )
    return placed


@dataclass(frozen=True)
class _Looks:
    """What speaks for an image being H&E.

    Attributes
    ----------
    naming
        What its channels' names say.
    is_bright
        Whether its pixels are bright-field; None if that cannot be told.
    """

    naming: Naming
    is_bright: bool | None

    @classmethod
    def of(cls, element: Any) -> _Looks:
        image = scale0(element)
        if image.dims != ("c", "y", "x"):
            return cls("other", None)
        naming = naming_of(image.coords["c"].values.tolist() if "c" in image.coords else range(image.sizes["c"]))
        looked_at = naming in ("rgb", "numbered", "unknown") and is_cheap_to_look_at(levels_of(element)[-1])
        return cls(naming, is_bright_field(pixel_sample(element)) if looked_at else None)

    @property
    def rank(self) -> int:
        """0 for what looks like H&E, then what is named so, then three or four other channels, then anything else."""
        is_named = self.naming in ("rgb", "numbered")
        if self.is_bright is not False and (is_named or (self.naming == "unknown" and self.is_bright)):
            return 0
        return 1 if is_named else 3 if self.naming in ("other", "stains") else 2

    def describe(self) -> str:
        """In words, for a message."""
        said = {"stains": "channels named as stains", "unknown": "channels not named as colours", "other": ""}
        looks = {True: "bright as H&E", False: "dark as fluorescence", None: ""}
        return ", ".join(filter(None, (said.get(self.naming, ""), looks[self.is_bright])))


def _is_rgb(looks: _Looks) -> bool:
    return looks.naming in ("rgb", "numbered")


def _likely(looks: dict[str, _Looks]) -> list[str]:
    best = min(look.rank for look in looks.values())
    return [key for key, look in looks.items() if look.rank == best]


def _full_image_of(sdata: SpatialData, candidates: Sequence[str]) -> str | None:
    """The one image of which every other candidate is a copy; of as many pixels, one with more levels."""
    by_size = sorted(candidates, key=lambda key: (-_n_pixels(sdata, key), -len(levels_of(sdata.images[key]))))
    for largest in (key for key in by_size if _n_pixels(sdata, key) == _n_pixels(sdata, by_size[0])):
        if all(is_copy(sdata, largest, key) for key in candidates if key != largest):
            return largest
    return None


def _n_pixels(sdata: SpatialData, key: str) -> int:
    return int(np.prod(scale0(sdata.images[key]).shape[-2:]))


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
