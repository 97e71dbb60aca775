"""A small copy of the slide image, for plots of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

__all__ = ["Thumbnail", "thumbnail"]

OVERSAMPLE = 4


@dataclass(frozen=True)
class Thumbnail:
    """A small image and its scale.

    Attributes
    ----------
    rgb
        uint8 (rows, columns, 3).
    scale
        Thumbnail pixels per image scale-0 pixel.
    """

    rgb: NDArray[np.uint8]
    scale: float


def thumbnail(
    sdata: SpatialData, image_key: str, *, channels: Sequence[int] = (0, 1, 2), max_px: int = 2000
) -> Thumbnail:
    """Reduce an RGB image until its longer side is at most ``max_px``.

    It starts from the coarsest level that is not smaller than that, and skips pixels first where the level is far
    larger, so that a slide without levels needs little memory.

    Raises
    ------
    DataError
        When the image has fewer than three channels or its pixels are not uint8.
    """
    levels = _levels(sdata.images[image_key])
    full_side = max(levels[0].shape[1:])
    level = next((array for array in reversed(levels) if max(array.shape[1:]) >= max_px), levels[0])
    if level.shape[0] < 3 or level.dtype != np.uint8:
        raise DataError(
            f"The image {image_key!r} has {level.shape[0]} channels of {level.dtype}; a thumbnail needs RGB in uint8."
        )
    factor = -(-max(level.shape[1:]) // max_px)
    skip = max(1, factor // OVERSAMPLE)
    pixels = np.asarray(level[list(channels), skip // 2 :: skip, skip // 2 :: skip])
    rgb = _block_mean(pixels, -(-factor // skip))
    shrunk = full_side / max(level.shape[1:]) * skip * -(-factor // skip)
    return Thumbnail(np.ascontiguousarray(rgb.transpose(1, 2, 0)), 1 / shrunk)


def _levels(element: Any) -> list[Any]:
    """Arrays of all levels, finest first."""
    if hasattr(element, "children"):
        return [element[f"scale{k}"]["image"].data for k in range(len(element.children))]
    return [element.data]


def _block_mean(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Mean over ``factor`` × ``factor`` pixels; the last, incomplete ones repeat the edge."""
    if factor == 1:
        return image
    pad = [(0, 0)] + [(0, -side % factor) for side in image.shape[1:]]
    padded = np.pad(image, pad, mode="edge")
    total = np.zeros((image.shape[0], padded.shape[1] // factor, padded.shape[2] // factor), dtype=np.uint32)
    for row in range(factor):
        for col in range(factor):
            total += padded[:, row::factor, col::factor]
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)
