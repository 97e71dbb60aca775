"""A look at some pixels of an image: whether it is bright-field, and of which range its values are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from dask.array import Array as DaskArray
from numpy.typing import NDArray
from spatialdata import get_pyramid_levels
from xarray import DataArray

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["coarsest", "computed", "is_bright_field", "levels_of", "pixel_sample"]

_WHOLE_PX = 2**20  # a level of so many pixels is read whole
_WINDOW_PX, _WINDOWS = 128, 6  # of a larger one, windows spread over it, so many along each side
_BRIGHT, _WHITE, _DARK = 90.0, 110.0, 80.0  # of 255
_ENOUGH = 2**16  # pixels that tell
_MOST_KEPT = 8
_kept: dict[str, NDArray[Any]] = {}  # by the name that dask gives to what is computed
_SEEN = 0.001  # share of pixels that are not black, below which nothing can be told


def levels_of(element: DataArray | DataTree) -> list[DataArray]:
    """Levels of an image, finest first."""
    found = [element] if isinstance(element, DataArray) else list(get_pyramid_levels(element))
    return sorted(found, key=lambda level: -level.sizes["y"] * level.sizes["x"])


def coarsest(element: DataArray | DataTree, at_least_px: int = 1) -> DataArray:
    """The coarsest level whose shorter side has so many pixels, or the finest."""
    levels = levels_of(element)
    large = [level for level in levels if min(level.sizes["y"], level.sizes["x"]) >= at_least_px]
    return large[-1] if large else levels[0]


def computed(data: Any) -> NDArray[Any]:
    """Pixels in memory, never by a distributed client that is open by chance."""
    return np.asarray(data.compute(scheduler="threads") if isinstance(data, DaskArray) else data)


def pixel_sample(element: DataArray | DataTree) -> NDArray[Any]:
    """Pixels from all over the coarsest level, shape (channels, n).

    A level that is computed from a finer one takes all of that, so those of the last few images are kept.
    """
    level = coarsest(element).transpose("c", "y", "x")
    is_derived = isinstance(level.data, DaskArray) and not level.data.name.startswith(("from-zarr", "array"))
    if not is_derived:
        return _sample(level)
    name = level.data.name
    if name not in _kept:
        while len(_kept) >= _MOST_KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[name] = _sample(level)
    return _kept[name]


def _sample(level: DataArray) -> NDArray[Any]:
    height, width = level.sizes["y"], level.sizes["x"]
    if height * width <= _WHOLE_PX:
        return computed(level.data).reshape(level.sizes["c"], -1)
    windows = [
        computed(level.data[:, top : top + _WINDOW_PX, left : left + _WINDOW_PX]).reshape(level.sizes["c"], -1)
        for top in _starts(height)
        for left in _starts(width)
    ]
    return np.concatenate(windows, axis=1)


def _starts(size: int) -> list[int]:
    return np.unique(np.linspace(0, max(0, size - _WINDOW_PX), _WINDOWS).astype(int)).tolist()


def is_bright_field(sample: NDArray[Any]) -> bool | None:
    """Whether pixels are those of stained tissue on a bright ground.

    Parameters
    ----------
    sample
        Pixels, shape (channels, n), of which the first three are looked at. What is not ``uint8`` is scaled by its
        99.9th percentile.

    Returns
    -------
    False for a dark ground, as of fluorescence; None if it is neither, or black all over.
    """
    pixels = _as_8_bits(sample[:3, :: max(1, sample.shape[1] // _ENOUGH)])
    seen = pixels[:, pixels.max(axis=0) > 0]  # black is what was not scanned
    if not seen.shape[1] or seen.shape[1] < _SEEN * pixels.shape[1]:
        return None
    if np.median(seen.max(axis=0)) < _DARK:
        return False
    is_bright = np.median(seen.mean(axis=0)) >= _BRIGHT and np.percentile(seen.min(axis=0), 95) >= _WHITE
    return True if is_bright else None


def _as_8_bits(sample: NDArray[Any]) -> NDArray[np.float32]:
    if sample.dtype == np.uint8:
        return sample.astype(np.float32)
    values = np.nan_to_num(sample.astype(np.float32), nan=0.0, posinf=np.inf, neginf=0.0)
    finite = values[np.isfinite(values)]
    top = float(np.percentile(finite, 99.9)) if finite.size else 0.0
    return np.clip(values * (255 / top), 0, 255) if top > 0 else np.zeros_like(values)
