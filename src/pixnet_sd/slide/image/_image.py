"""Tell chunks of an image that were left out because they are black from those that were lost.

The levels of an image element, read by pixel ranges, straight from zarr where the element is a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from dask.array import Array as DaskArray
from xarray import DataArray, DataTree

from pixnet_sd.errors import DataError, StoreError

from ._chunks import ChunkGuard, check_sources, guards_of
from ._pixels import check_uint8, is_bright_field, levels_of, pixel_sample, rgb_channels

__all__ = ["ImageLevel", "ImagePyramid", "check_holes", "is_cheap_to_look_at", "largest_block_px", "stored_array"]

_LOOKED_AT = 256  # missing chunks of a level, spread over all
_SIDE_PX = 512  # of what is looked at of each
_MARGIN_PX = 2  # pixels of a level that its neighbours may have a part in
_DIFFERENT = 4.0  # mean grey levels from the fill value


def check_holes(levels: Sequence[ImageLevel], image_key: str) -> None:
    """Raise when another level shows something where a level has no file.

    Parameters
    ----------
    levels
        Finest first.
    image_key
        Name, for messages.

    Raises
    ------
    StoreError
        Saying where.
    """
    if not levels[0].is_backed or not levels[0].guards:
        return
    for k, level in enumerate(levels):
        witness = levels[-1] if k < len(levels) - 1 else levels[0]
        if not level.is_backed or not level.guards or level.guards[0].has_file.all():
            continue
        if not level.guards[0].n_files or (witness is not level and _contradicts(level, witness)):
            raise StoreError(
                f"Image {image_key!r} is not whole: in {level.guards[0].folder} {_missing(level)} of "
                f"{level.guards[0].has_file.size} chunks have no file, which would be read as black. Was the store "
                "copied in part? Copy it again."
            )


def _missing(level: ImageLevel) -> int:
    return level.guards[0].has_file.size - level.guards[0].n_files


def _contradicts(level: ImageLevel, witness: ImageLevel) -> bool:
    """Whether the witness has pixels unlike the fill value in a chunk that the level lacks."""
    guard = level.guards[0]
    lacking = np.argwhere(~guard.has_file)
    for c, row, col in lacking[np.unique(np.linspace(0, len(lacking) - 1, _LOOKED_AT).astype(int))].tolist():
        span = slice(c * guard.chunk[0], (c + 1) * guard.chunk[0])
        box = [
            side
            for axis, k in enumerate((row, col))
            for side in _on_witness(level, witness, axis, k * guard.chunk[axis + 1], (k + 1) * guard.chunk[axis + 1])
        ]
        if box[0] < box[1] and box[2] < box[3]:
            part = witness.pixels_of(span, *box)
            if np.abs(part.astype(np.float64) - float(guard.fill)).mean() > _DIFFERENT:
                return True
    return False


def _on_witness(level: ImageLevel, witness: ImageLevel, axis: int, start: int, stop: int) -> tuple[int, int]:
    """Pixels of the witness inside a range of the level's; not many, from the middle."""
    stop = min(stop, level.shape[axis])
    low, high = (
        (k * level.scale[axis] + level.origin[axis] - witness.origin[axis]) / witness.scale[axis] for k in (start, stop)
    )
    first, last = max(0, int(np.ceil(low)) + _MARGIN_PX), min(int(high) - _MARGIN_PX, witness.shape[axis])
    middle = (first + last) // 2
    return max(first, middle - _SIDE_PX // 2), min(last, middle + _SIDE_PX // 2)


if TYPE_CHECKING:
    Pixels = zarr.Array[Any] | DaskArray | np.ndarray

_HUGE_BLOCK_PX = 64e6


@dataclass(frozen=True, eq=False)
class ImageLevel:
    """One level of an image: its pixels and how many scale-0 pixels each of them spans.

    Reads are safe from threads; a level pickles, without its pixels when it is backed.

    Attributes
    ----------
    pixels
        (c, y, x) array: of zarr when the element is backed, else of dask or numpy.
    scale
        Scale-0 pixels per pixel of this level, (y, x).
    origin
        Where pixel (0, 0) of this level begins, in scale-0 pixels, (y, x).
    channels
        Positions of red, green and blue.
    guards
        Of the files that the pixels are read from; none for those in memory.
    """

    pixels: Pixels
    scale: tuple[float, float]
    origin: tuple[float, float]
    channels: tuple[int, int, int]
    guards: tuple[ChunkGuard, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels of this level."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    @property
    def is_backed(self) -> bool:
        """Whether reads go straight to zarr."""
        return isinstance(self.pixels, zarr.Array)

    def read(self, row0: int, row1: int, col0: int, col1: int) -> np.ndarray:
        """Pixels of a box, clipped to the level: (h, w, 3) uint8.

        Raises
        ------
        StoreError
            When files that were there when the level was opened are not there any more.
        """
        height, width = self.shape
        row0, row1 = np.clip((row0, row1), 0, height).tolist()
        col0, col1 = np.clip((col0, col1), 0, width).tolist()
        if row0 >= row1 or col0 >= col1:
            return np.empty((max(row1 - row0, 0), max(col1 - col0, 0), 3), np.uint8)
        block = self._block((slice(0, self.pixels.shape[0]), slice(row0, row1), slice(col0, col1)))
        if self.channels != (0, 1, 2):
            block = block[list(self.channels)]
        return np.moveaxis(block[:3], 0, -1)

    def pixels_of(self, channels: slice, row0: int, row1: int, col0: int, col1: int) -> np.ndarray:
        """Values of some channels in a box inside the level, (channels, h, w), as they are stored."""
        channels = slice(channels.start, min(channels.stop, self.pixels.shape[0]))
        return self._block((channels, slice(row0, row1), slice(col0, col1)))

    def _block(self, key: tuple[slice, slice, slice]) -> np.ndarray:
        if self.is_backed and self.guards:
            return self.guards[0].read(self.pixels, key)
        block: Any = self.pixels[key]
        if isinstance(block, DaskArray):
            block = block.compute(scheduler="threads")  # never a distributed client that is open by chance
        check_sources(self.guards)
        return np.asarray(block)


@dataclass(frozen=True, eq=False)
class ImagePyramid:
    """An RGB uint8 image element, finest level first.

    Attributes
    ----------
    levels
        The levels, at least one; the first has scale (1, 1).
    """

    levels: tuple[ImageLevel, ...]

    @classmethod
    def of(cls, element: DataArray | DataTree, image_key: str) -> ImagePyramid:
        """Check an image element's pixels and find where each level is to be read.

        Parameters
        ----------
        element
            Image of spatialdata's model, (c, y, x), single or multiscale.
        image_key
            Its name, for messages.

        Returns
        -------
        The pyramid. Of uint8 pixels a few of the coarsest level are looked at, if that is cheap, and those around files
        that are missing and may have to be there.

        Raises
        ------
        DataError
            Not a flat (c, y, x) image, not RGB or RGBA, or not uint8.
        StoreError
            Its files are away, or some of them are missing.
        """
        found = levels_of(element)
        _check_dims(found[0], image_key)
        names = found[0].coords["c"].values.tolist() if "c" in found[0].coords else range(found[0].sizes["c"])
        channels = rgb_channels(names, image_key, partial(_look, element))
        sample = partial(pixel_sample, found[0] if is_cheap_to_look_at(found[0]) else element)
        check_uint8(found[0].dtype, sample, image_key, is_multiscale=isinstance(element, DataTree))
        height, width = found[0].shape[1:]
        levels = []
        for level in found:
            row_scale, row_origin = _placed(height, level.sizes["y"])
            col_scale, col_origin = _placed(width, level.sizes["x"])
            guards = guards_of(level.data)
            scale, origin = (row_scale, col_scale), (row_origin, col_origin)
            levels.append(ImageLevel(_source(level), scale, origin, channels, guards))
        check_holes(levels, image_key)
        return cls(tuple(levels))

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of scale 0."""
        return self.levels[0].shape

    @property
    def is_backed(self) -> bool:
        """Whether every level is read straight from zarr."""
        return all(level.is_backed for level in self.levels)

    def level_for(self, scale: float) -> ImageLevel:
        """Coarsest level that is no coarser than ``scale`` scale-0 pixels per pixel; the finest if all are."""
        fine_enough = [level for level in self.levels if max(level.scale) <= scale * (1 + 1e-3)]
        return fine_enough[-1] if fine_enough else self.levels[0]


def _check_dims(level: DataArray, image_key: str) -> None:
    if level.dims != ("c", "y", "x"):
        raise DataError(
            f"image {image_key!r} has axes {tuple(level.dims)}, a flat image of axes ('c', 'y', 'x') is needed: "
            "give image_key= of one, or parse this one with spatialdata.models.Image2DModel."
        )


def _placed(size: int, level_size: int) -> tuple[float, float]:
    """Scale of one axis of a level, and the scale-0 pixel at which it begins.

    Image2DModel.parse (multiscale-spatial-image: coarsen, trim, side="right") averages blocks of a whole number of
    pixels and drops what is left over from the **start** of the axis, yet records the ratio of the shapes, which puts
    the level's start up to one of its pixels off. So a whole number is taken where one fits.
    """
    whole = max(1, round(size / level_size))
    if abs(size / whole - level_size) >= 1:
        return size / level_size, 0.0
    return float(whole), float(max(0, size - whole * level_size))


def _look(element: DataArray | DataTree, at_any_cost: bool) -> bool | None:
    """Whether an image is bright-field; None if it cannot be told, or only by loading all of it."""
    if not at_any_cost and not is_cheap_to_look_at(levels_of(element)[-1]):
        return None
    return is_bright_field(pixel_sample(element))


def is_cheap_to_look_at(level: DataArray) -> bool:
    """Whether a few pixels of a level can be had without loading one huge block."""
    return _block_px(_source(level)) <= _HUGE_BLOCK_PX


def _source(level: DataArray) -> Pixels:
    stored = stored_array(level.data)
    return level.data if stored is None else stored


def stored_array(data: DaskArray | np.ndarray) -> zarr.Array[Any] | None:
    """The zarr array that a lazy array is an unchanged view of.

    The answer comes from the array's own graph and not from the element's name and the object's path, so an element
    that was replaced, sliced or computed upon is never mistaken for the one on disk.

    Parameters
    ----------
    data
        Pixels of an element.

    Returns
    -------
    The zarr array, or None when there is anything but one plain read of it.
    """
    if not isinstance(data, DaskArray):
        return None
    layers = _layers(data)
    stored = [value for layer in layers.values() if len(layer) == 1 for value in layer.values()]
    stored = [value for value in stored if isinstance(value, zarr.Array)]
    # dask.array.from_zarr makes two layers: the array itself, and a getter per block.
    if len(layers) != 2 or len(stored) != 1 or not data.name.startswith("from-zarr"):
        return None
    return stored[0] if stored[0].shape == data.shape and stored[0].dtype == data.dtype else None


def _layers(data: DaskArray) -> dict[str, Any]:
    """Layers of a graph by name; none where dask keeps its graph in another way."""
    return dict(getattr(data.__dask_graph__(), "layers", {}))


def largest_block_px(level: ImageLevel) -> float:
    """How many pixels of a level have to be loaded to get one of them, about.

    A lazy image may show small chunks that are cut from one big one further down (so does the reader of Visium HD,
    whose full image is one block), hence the look at every layer of the graph.

    Parameters
    ----------
    level
        A level of an image.

    Returns
    -------
    Pixels (height x width) of the largest block on the way; 0 for pixels in memory.
    """
    return _block_px(level.pixels)


def _block_px(pixels: Pixels) -> float:
    if isinstance(pixels, zarr.Array):
        return float(np.prod(pixels.chunks[1:]))
    if isinstance(pixels, np.ndarray):
        return 0.0
    fewest = min((len(layer) for layer in _layers(pixels).values() if not _holds_data(layer)), default=0)
    return pixels.shape[1] * pixels.shape[2] / fewest if fewest else 0.0


def _holds_data(layer: Any) -> bool:
    """Whether a layer of a graph holds arrays, in memory or on disk, that can be sliced without loading them whole."""
    return all(isinstance(value, np.ndarray | zarr.Array) for value in layer.values())
