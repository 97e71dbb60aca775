"""Whether one image is a copy of another, mostly a smaller one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._elements import coordinate_systems, scale0
from ._extent import image_extent, moved, shared_systems
from ._image import is_cheap_to_look_at
from ._look import coarsest, computed, levels_of
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["is_copy"]

_SAME_PLACE = 0.02  # of the extent: copies are cropped to whole pixels
_PIXELS = 1.5  # of the smaller image
_MOST_PX, _ENOUGH_PX = 2**24, 2**20  # of a level that is read, and that are compared
_GRID, _FEWEST, _CELL_PX = 24, 4, 4  # cells along each side that are compared, and pixels of the smaller image in one
_ALIKE, _CONTRAST = 0.9, 2.0  # correlation, and grey levels below which there is none


def is_copy(sdata: SpatialData, large: str, small: str) -> bool:
    """Whether an image shows the same as another that has fewer pixels, or is the same as one with as many.

    They have to cover the same place in a coordinate system that they share. If that is made of the pixels of the one,
    and the other has another made of its own, as readers place the pictures that come with a slide, nothing more is
    asked. Otherwise pixels must go together: two samples of one size may well lie on one another. Of as many pixels
    their colours have to be the same too, for one may be a version of the other.
    """
    one, other = sdata.images[large], sdata.images[small]
    n_px = [int(np.prod(scale0(element).shape[-2:])) for element in (one, other)]
    if n_px[0] < n_px[1]:
        return False
    systems = [system for system in shared_systems(one, other) if _cover_the_same(one, other, system)]
    same_size = n_px[0] == n_px[1]
    return any(
        _comes_with(one, other, system) or _look_alike(one, other, system, same_colours=same_size) for system in systems
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


def _look_alike(one: Any, other: Any, system: str, *, same_colours: bool) -> bool:
    """Whether pixels over a grid of places go together, or there is nothing to compare."""
    levels = _levels_of_one_size(one, other) if same_colours else [coarsest(each, 2 * _GRID) for each in (one, other)]
    if not all(level.shape[-2] * level.shape[-1] <= _MOST_PX and is_cheap_to_look_at(level) for level in levels):
        return not same_colours
    n = int(np.clip(min(levels[1].shape[-2:]) // _CELL_PX, _FEWEST, _GRID))
    corners = image_extent(one, system)
    colours = [
        _on_grid(level, corners, n, element, system) for level, element in zip(levels, (one, other), strict=True)
    ]
    if same_colours:
        same = levels[0].dtype == levels[1].dtype and colours[0].shape == colours[1].shape
        return bool(same and np.abs(colours[0] - colours[1]).max() < _CONTRAST)
    grey = [each[:3].mean(axis=0) for each in colours]
    if min(each.std() for each in grey) < _CONTRAST:
        return True
    return bool(np.corrcoef(grey[0], grey[1])[0, 1] > _ALIKE)


def _levels_of_one_size(one: Any, other: Any) -> list[Any]:
    """The coarsest levels of two images that have as many pixels, for these are averaged alike."""
    pairs = [(a, b) for a in levels_of(one) for b in levels_of(other) if a.shape == b.shape]
    return list(pairs[-1]) if pairs else [levels_of(one)[0], levels_of(other)[0]]


def _on_grid(level: Any, corners: NDArray[np.float64], n: int, element: Any, system: str) -> NDArray[np.float64]:
    """Means of a level over n x n cells of a box, given by its corners in a coordinate system, shape (channels, n²)."""
    top_left, top_right, _, bottom_left = corners
    at = (np.arange(n) + 0.5) / n
    x, y = (part.ravel() for part in np.meshgrid(at, at))
    places = top_left + np.outer(x, top_right - top_left) + np.outer(y, bottom_left - top_left)
    xy = moved(places, np.asarray(np.linalg.pinv(affine_matrix(element, system)), np.float64))
    every = int(np.ceil(np.sqrt(level.shape[-2] * level.shape[-1] / _ENOUGH_PX)))
    pixels = computed(level.data[:, ::every, ::every]).astype(np.float64)
    full, (height, width) = scale0(element), pixels.shape[-2:]
    xy = xy * [width / full.sizes["x"], height / full.sizes["y"]]
    half = max(0.5, min(height, width) / (2 * n))
    sums = np.pad(pixels, ((0, 0), (1, 0), (1, 0))).cumsum(axis=1).cumsum(axis=2)
    col0, row0 = np.clip(np.rint(xy - half), 0, [width - 1, height - 1]).astype(int).T
    col1, row1 = np.clip(np.rint(xy + half), 1, [width, height]).astype(int).T
    col1, row1 = np.maximum(col1, col0 + 1), np.maximum(row1, row0 + 1)
    total = sums[:, row1, col1] - sums[:, row0, col1] - sums[:, row1, col0] + sums[:, row0, col0]
    return np.asarray(total / ((row1 - row0) * (col1 - col0)))
