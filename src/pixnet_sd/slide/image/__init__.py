"""The slide image: its levels, pixels, files, and exact resampling."""

from __future__ import annotations

from ._arrays import GuardedArray, computed, loaded_px, stored_array, stored_folder
from ._image import ImageLevel, ImagePyramid
from ._pixels import HUGE_BLOCK_PX, Looks, coarsest, is_cheap_to_look_at, levels_of
from ._resample import make_taps, resample

__all__ = [
    "HUGE_BLOCK_PX",
    "GuardedArray",
    "ImageLevel",
    "ImagePyramid",
    "Looks",
    "coarsest",
    "computed",
    "is_cheap_to_look_at",
    "levels_of",
    "loaded_px",
    "make_taps",
    "resample",
    "stored_array",
    "stored_folder",
]
