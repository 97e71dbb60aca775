"""Which image is the slide, and whether one image is a copy of another, mostly a smaller one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pixnet_sd._util import logger
from pixnet_sd.errors import ElementError

from .elements import (
    affine_matrix,
    coordinate_systems,
    image_extent,
    names,
    scale0,
    shared_systems,
    written_by_pixnet,
)
from .image import (
    Naming,
    channel_names,
    coarsest,
    computed,
    is_bright_field,
    is_cheap_to_look_at,
    levels_of,
    naming_of,
    pixel_sample,
)

if TYPE_CHECKING:
    from spatialdata import SpatialData

_SAME_PLACE = 0.02  # of the extent: copies are cropped to whole pixels
_PIXELS = 1.5  # of the smaller image
_MOST_PX, _ENOUGH_PX = 2**24, 2**20  # of a level that is read, and that are compared
_GRID, _CELL_PX = 24, 4  # cells along each side that are compared, and pixels of the smaller image in one
_ALIKE = 0.8  # correlation of grey levels
_FLAT, _SAME = 1.0, 2.0  # deviation of grey levels below which there is nothing to compare, and of colours that are one
_SAID = {"stains": "channels named as stains", "unknown": "channels not named as colours"}


class _Looks(NamedTuple):
    """What speaks for an image being H&E: its channel names, and pixels that are bright-field, dark, or neither."""

    naming: Naming
    is_bright: bool | None

    @classmethod
    def of(cls, element: Any) -> _Looks:
        image = scale0(element)
        if image.dims != ("c", "y", "x"):
            return cls("other", None)
        naming = naming_of(channel_names(image))
        looked_at = naming in ("rgb", "numbered", "unknown") and is_cheap_to_look_at(levels_of(element)[-1])
        return cls(naming, is_bright_field(pixel_sample(element)) if looked_at else None)

    @property
    def is_rgb(self) -> bool:
        return self.naming in ("rgb", "numbered")

    @property
    def rank(self) -> int:
        """0 for what looks like H&E, then what is named so, then three or four other channels, then anything else."""
        if self.is_bright is not False and (self.is_rgb or (self.naming == "unknown" and self.is_bright)):
            return 0
        return 1 if self.is_rgb else 3 if self.naming in ("other", "stains") else 2

    def describe(self) -> str:
        """In words, for a message."""
        looks = {True: "bright as H&E", False: "dark as fluorescence", None: ""}[self.is_bright]
        return ", ".join(filter(None, (_SAID.get(self.naming, ""), looks)))


def select_image(sdata: SpatialData, *, image_key: str | None = None, coordinate_system: str | None = None) -> str:
    """Name of the slide image: the one given, or the only one in the coordinate system that can be meant.

    Images that pixnet_sd wrote are never meant. Of others those come first that look like H&E: three channels that are
    named as colours, or not named, on a bright ground, or that are named otherwise and bright. Of several the one is
    taken of which all others are smaller copies, as the readers of spatialdata-io put them beside it. `ElementError` if
    there is no image, none fits, or several do.
    """
    if image_key is not None:
        _check_image(sdata, image_key, coordinate_system)
        return image_key
    looks = {key: _Looks.of(sdata.images[key]) for key in _placed_images(sdata, coordinate_system)}
    best = min(look.rank for look in looks.values())
    likely = [key for key, look in looks.items() if look.rank == best]
    taken = likely[0] if len(likely) == 1 else _full_image_of(sdata, likely)
    if taken is None:
        why = {key: looks[key].describe() for key in likely}
        raise ElementError(f"Several images could be the slide: {_described(sdata, why)}. Name one with image_key=.")
    if len(likely) > 1:
        copies = names(key for key in likely if key != taken)
        logger.info("Image %r taken as the slide; %s are copies of it.", taken, copies)
    beside = {key: look.describe() for key, look in looks.items() if look.rank > best}
    if any(looks[key].is_rgb for key in beside):
        logger.info("Image %r taken as the slide; not H&E: %s.", taken, _described(sdata, beside))
    return taken


def other_slides(sdata: SpatialData, *, image_key: str, coordinate_system: str) -> list[str]:
    """Images that overlap one in a coordinate system, look like H&E, and are not copies of it."""
    image = sdata.images[image_key]
    others = [key for key in _placed_images(sdata, coordinate_system) if key != image_key]
    others = [key for key in others if _overlap(image, sdata.images[key], coordinate_system)]
    whole = [key for key in others if is_copy(sdata, key, image_key)]  # of which the image is a copy
    others = [key for key in others if not any(is_copy(sdata, large, key) for large in (image_key, *whole))]
    others = [key for key in others if _Looks.of(sdata.images[key]).rank == 0]
    copies = {small for small in others for large in others if small != large and is_copy(sdata, large, small)}
    return [key for key in others if key not in copies] or others[:1]


def _overlap(one: Any, other: Any, coordinate_system: str) -> bool:
    boxes = [shapely.Polygon(image_extent(element, coordinate_system)) for element in (one, other)]
    return bool(boxes[0].intersection(boxes[1]).area > 0) if all(box.is_valid for box in boxes) else True


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
    """Images that are not ours, in a coordinate system if one is given."""
    own = written_by_pixnet(sdata)
    images = [key for key in sdata.images if key not in own]
    if not images:
        ours = f" Only images written by pixnet_sd were found: {names(sdata.images)}." if len(sdata.images) else ""
        raise ElementError(f"The SpatialData object has no slide image.{ours} Add the H&E image with Image2DModel.")
    if coordinate_system is None:
        return images
    placed = [key for key in images if coordinate_system in coordinate_systems(sdata.images[key])]
    if not placed:
        raise ElementError(
            f"No image is in coordinate system {coordinate_system!r}: "
            f"{_described(sdata, dict.fromkeys(images, ''))}. Check coordinate_system=."
        )
    return placed


def _described(sdata: SpatialData, images: Mapping[str, str]) -> str:
    """One phrase an image: name, shape, channels, what else is said of it, and coordinate systems."""
    phrases = []
    for key, said in images.items():
        image = scale0(sdata.images[key])
        shape = " x ".join(f"{image.sizes[axis]} {axis}" for axis in ("c", "y", "x"))
        channels = f"channels {', '.join(map(str, image.coords['c'].values[:6]))}" if "c" in image.coords else ""
        systems = f"coordinate systems: {names(coordinate_systems(sdata.images[key]))}"
        phrases.append(f"{key!r} ({'; '.join(filter(None, (shape, channels, said, systems)))})")
    return "; ".join(phrases)


def _full_image_of(sdata: SpatialData, candidates: Sequence[str]) -> str | None:
    """The one image of which every other candidate is a copy; of as many pixels, one with more levels."""
    n_px = {key: _n_px(sdata.images[key]) for key in candidates}
    largest = [key for key in candidates if n_px[key] == max(n_px.values())]
    for large in sorted(largest, key=lambda key: -len(levels_of(sdata.images[key]))):
        if all(is_copy(sdata, large, key) for key in candidates if key != large):
            return large
    return None


def _n_px(element: Any) -> int:
    return int(np.prod(scale0(element).shape[-2:]))


def is_copy(sdata: SpatialData, large: str, small: str) -> bool:
    """Whether an image shows the same as another that has fewer pixels, or is the same as one with as many.

    They have to cover the same place in a coordinate system that they share. If that is made of the pixels of the one,
    and the other has another made of its own, as readers place the pictures that come with a slide, nothing more is
    asked. Otherwise their pixels must go together: two samples of one size may well lie on one another. Of as many
    pixels their colours have to be the same too, for one may be a version of the other.
    """
    one, other = sdata.images[large], sdata.images[small]
    systems = [system for system in shared_systems(one, other) if _cover_the_same(one, other, system)]
    if _n_px(one) < _n_px(other) or not systems:
        return False
    if any(_comes_with(one, other, system) for system in systems):
        return True
    return _look_alike(one, other, same_colours=_n_px(one) == _n_px(other))


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
    levels = [coarsest(element, 2 * _GRID) for element in (one, other)]
    if same_colours:  # the coarsest levels that have as many pixels, for these are averaged alike
        pairs = [(a, b) for a in levels_of(one) for b in levels_of(other) if a.shape == b.shape]
        levels = list(pairs[-1]) if pairs else [levels_of(one)[0], levels_of(other)[0]]
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


def _on_grid(level: Any, n: int) -> NDArray[np.float64]:
    """Means of a level over n x n cells, (channels, n²)."""
    every = int(np.ceil(np.sqrt(level.shape[-2] * level.shape[-1] / _ENOUGH_PX)))
    pixels = computed(level.data[:, ::every, ::every]).astype(np.float64)
    rows, cols = (np.linspace(0, size, n + 1).astype(int) for size in pixels.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], axis=1), cols[:-1], axis=2)
    return np.asarray(sums / np.outer(np.diff(rows), np.diff(cols))).reshape(len(pixels), -1)
