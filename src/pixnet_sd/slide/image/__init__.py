"""The slide image: its levels, pixels, chunks, and exact resampling."""

from __future__ import annotations

from ._chunks import StoredRows, check_sources, guards_of
from ._image import ImageLevel, ImagePyramid, is_cheap_to_look_at, largest_block_px, stored_array
from ._pixels import Naming, coarsest, computed, is_bright_field, levels_of, naming_of, pixel_sample
from ._resample import make_taps, resample

__all__ = [
    "ImageLevel",
    "ImagePyramid",
    "Naming",
    "StoredRows",
    "check_sources",
    "coarsest",
    "computed",
    "guards_of",
    "is_bright_field",
    "is_cheap_to_look_at",
    "largest_block_px",
    "levels_of",
    "make_taps",
    "naming_of",
    "pixel_sample",
    "resample",
    "stored_array",
]
