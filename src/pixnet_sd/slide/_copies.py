"""Whether one image is a smaller copy of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._elements import scale0
from ._extent import image_extent, moved, shared_systems
from ._image import is_cheap_to_look_at
from ._look import coarsest, computed
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["is_larger_copy"]

_SAME_PLACE = 0.02  # of the extent: copies are cropped to whole pixels
_PIXELS = 1.5  # of the smaller image
_MOST_PX = 2**24
_GRID = 24  # places along each side that are compared
_ALIKE, _CONTRAST = 0.5, 2.0  # correlation, and grey levels below which there is none


def is_larger_copy(sdata: SpatialData, large: str, small: str) -> bool:
    """Whether an image shows the same as another, which has fewer pixels.

    They have to cover the same place in a coordinate system that they share, and pixels there must go together: two
    samples of one size may well lie on one another.
    """
    one, other = sdata.images[large], sdata.images[small]
    if np.prod(scale0(one).shape[-2:]) <= np.prod(scale0(other).shape[-2:]):
        return False
    systems = [system for system in shared_systems(one, other) if _cover_the_same(one, other, system)]
    return any(_look_alike(one, other, system) for system in systems)


def _cover_the_same(one: Any, other: Any, system: str) -> bool:
    corners = image_extent(one, system), image_extent(other, system)
    sides = [float(np.hypot(*(c[1:] - c[:-1]).T).max()) for c in corners]
    smallest = min(scale0(other).shape[-2:])
    tolerance = max(_SAME_PLACE * sides[0], _PIXELS * sides[1] / smallest)
    return bool(np.hypot(*(corners[0] - corners[1]).T).max() <= tolerance)


def _look_alike(one: Any, other: Any, system: str) -> bool:
    """Whether grey levels over a grid of places go together, or there is nothing to compare."""
    levels = [coarsest(element, 2 * _GRID) for element in (one, other)]
    if not all(level.shape[-2] * level.shape[-1] <= _MOST_PX and is_cheap_to_look_at(level) for level in levels):
        return True
    grey = [_grey_on_grid(level, one, element, system) for level, element in zip(levels, (one, other), strict=True)]
    if min(each.std() for each in grey) < _CONTRAST:
        return True
    return bool(np.corrcoef(grey[0], grey[1])[0, 1] > _ALIKE)


def _grey_on_grid(level: Any, frame: Any, element: Any, system: str) -> NDArray[np.float64]:
    """Means of a level's pixels around a grid of places of another image, shape (n,)."""
    top_left, top_right, _, bottom_left = image_extent(frame, system)
    at = (np.arange(_GRID) + 0.5) / _GRID
    x, y = (part.ravel() for part in np.meshgrid(at, at))
    places = top_left + np.outer(x, top_right - top_left) + np.outer(y, bottom_left - top_left)
    xy = moved(places, np.asarray(np.linalg.pinv(affine_matrix(element, system)), np.float64))
    full, (height, width) = scale0(element), level.shape[-2:]
    xy = xy * [width / full.sizes["x"], height / full.sizes["y"]]
    half = max(1, min(height, width) // (2 * _GRID))
    grey = computed(level.data)[:3].astype(np.float64).mean(axis=0)
    sums = np.pad(grey.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    col0, row0 = (np.clip(xy - half, 0, [width - 1, height - 1])).astype(int).T
    col1, row1 = np.minimum(col0 + 2 * half, width), np.minimum(row0 + 2 * half, height)
    total = sums[row1, col1] - sums[row0, col1] - sums[row1, col0] + sums[row0, col0]
    return np.asarray(total / ((row1 - row0) * (col1 - col0)))
