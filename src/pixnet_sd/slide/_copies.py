"""Whether one image is a copy of another, mostly a smaller one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._elements import coordinate_systems, scale0
from ._extent import image_extent, shared_systems
from ._image import is_cheap_to_look_at
from ._look import coarsest, computed, levels_of
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["is_copy"]

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
