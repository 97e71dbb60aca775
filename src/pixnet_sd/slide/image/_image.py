"""Levels of an image element, read by pixel ranges, straight from zarr where the element is a view of it.

Chunks without a file are black padding or were lost: another level shows which, when the image is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from xarray import DataArray, DataTree

from pixnet_sd.errors import DataError, StoreError

from ._arrays import ChunkGuard, GuardedArray
from ._pixels import channel_names, check_uint8, levels_of, rgb_channels

# missing chunks of a level that are looked at, spread over all, and the side of what is looked at of each
_LOOKED_AT, _SIDE_PX = 256, 512
_MARGIN_PX = 2  # pixels of a level that its neighbours may have a part in
_DIFFERENT = 4.0  # mean grey levels from the fill value


@dataclass(frozen=True, eq=False)
class ImageLevel:
    """One level of an image; reads are safe from threads; it pickles, without its pixels when it is backed."""

    pixels: GuardedArray  # (c, y, x)
    scale: tuple[float, float]  # scale-0 pixels per pixel of this level, (y, x)
    origin: tuple[float, float]  # where pixel (0, 0) of this level begins, in scale-0 pixels, (y, x)
    channels: tuple[int, int, int]  # positions of red, green and blue

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels of this level."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def read(self, row0: int, row1: int, col0: int, col1: int) -> np.ndarray:
        """Pixels of a box, clipped to the level: (h, w, 3) uint8. `StoreError` when files went away since opening."""
        block = self.pixels[:, max(row0, 0) : max(row1, 0), max(col0, 0) : max(col1, 0)]
        if self.channels != (0, 1, 2):
            block = block[list(self.channels)]
        return np.moveaxis(block[:3], 0, -1)


@dataclass(frozen=True, eq=False)
class ImagePyramid:
    """Levels of an RGB uint8 image element, at least one, finest first; the first has scale (1, 1)."""

    levels: tuple[ImageLevel, ...]
    channels: tuple[str, ...]  # names of red, green and blue

    @classmethod
    def of(cls, element: DataArray | DataTree, image_key: str) -> ImagePyramid:
        """Check that an image element is flat, RGB or RGBA, uint8 and whole, and find where to read each level."""
        arrays = levels_of(element)
        finest = arrays[0]
        if finest.dims != ("c", "y", "x"):
            raise DataError(
                f"image {image_key!r} has axes {tuple(finest.dims)}, a flat image of axes ('c', 'y', 'x') is needed: "
                "give image_key= of one, or parse this one with spatialdata.models.Image2DModel."
            )
        channels = rgb_channels(element, image_key)
        check_uint8(element, image_key)
        levels = []
        for array in arrays:
            y, x = (_placed(finest.sizes[axis], array.sizes[axis]) for axis in ("y", "x"))
            levels.append(ImageLevel(GuardedArray(array.data), (y[0], x[0]), (y[1], x[1]), channels))
        _check_holes(levels, image_key)
        names = channel_names(finest)
        return cls(tuple(levels), tuple(str(names[position]) for position in channels))

    @property
    def is_backed(self) -> bool:
        """Whether every level is read straight from zarr."""
        return all(level.pixels.is_stored for level in self.levels)

    def level_for(self, scale: float) -> ImageLevel:
        """Coarsest level that is no coarser than ``scale`` scale-0 pixels per pixel; the finest if all are."""
        fine_enough = (level for level in reversed(self.levels) if max(level.scale) <= scale * (1 + 1e-3))
        return next(fine_enough, self.levels[0])


def _placed(size: int, level_size: int) -> tuple[float, float]:
    """Scale of one axis of a level, a whole number where one fits, and the scale-0 pixel at which it begins."""
    # Image2DModel.parse averages whole blocks, drops what is left from the **start**, and records the shapes' ratio
    whole = max(1, round(size / level_size))
    if abs(size / whole - level_size) >= 1:
        return size / level_size, 0.0
    return float(whole), float(max(0, size - whole * level_size))


def _check_holes(levels: Sequence[ImageLevel], image_key: str) -> None:
    """Raise `StoreError` when another level shows something where a level has no file."""
    if levels[0].pixels.guard is None:
        return
    for level in levels:
        guard, witness = level.pixels.guard, levels[0] if level is levels[-1] else levels[-1]
        if guard is None or guard.has_file.all():
            continue
        if not guard.has_file.any() or (witness is not level and _contradicts(level, guard, witness)):
            raise StoreError(
                f"Image {image_key!r} is not whole: in {guard.folder} {(~guard.has_file).sum()} of "
                f"{guard.has_file.size} chunks have no file, which would be read as black. Was the store copied in "
                "part? Copy it again."
            )


def _contradicts(level: ImageLevel, guard: ChunkGuard, witness: ImageLevel) -> bool:
    """Whether the witness has pixels unlike the fill value in a chunk that the level lacks."""
    lacking = np.argwhere(~guard.has_file)
    looked_at = np.unique(np.linspace(0, len(lacking) - 1, _LOOKED_AT).astype(int))
    for index in lacking[looked_at].tolist():
        channels, rows, cols = (slice(k * side, (k + 1) * side) for k, side in zip(index, guard.chunk, strict=True))
        rows, cols = _on_witness(level, witness, 0, rows), _on_witness(level, witness, 1, cols)
        if rows.start < rows.stop and cols.start < cols.stop:
            values = witness.pixels[channels, rows, cols].astype(np.float64)
            if np.abs(values - float(guard.metadata.fill_value)).mean() > _DIFFERENT:
                return True
    return False


def _on_witness(level: ImageLevel, witness: ImageLevel, axis: int, span: slice) -> slice:
    """Pixels of the witness inside a range of the level's; not many, from the middle."""
    low, high = (
        (k * level.scale[axis] + level.origin[axis] - witness.origin[axis]) / witness.scale[axis]
        for k in (span.start, min(span.stop, level.shape[axis]))
    )
    first, last = max(0, int(np.ceil(low)) + _MARGIN_PX), min(int(high) - _MARGIN_PX, witness.shape[axis])
    middle = (first + last) // 2
    return slice(max(first, middle - _SIDE_PX // 2), min(last, middle + _SIDE_PX // 2))
