"""Cutting slides into tiles: where regions are (training), and over what must be predicted (inference)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import PixNetError
from pixnet_sd.nn.encoder import STRIDES

from .slides import TrainingSlide

__all__ = ["ALIGN_PX", "Tile", "TrainingTiles", "training_tiles"]

ALIGN_PX = STRIDES[-1]
"""Sides of tiles are multiples of the coarsest stride."""

MARGIN_SHARE = 16
"""A region keeps this share of a tile's side from the border, where padding stands in for tissue."""


class Tile(NamedTuple):
    """A rectangle of working pixels."""

    row0: int
    col0: int
    height: int
    width: int


@dataclass(frozen=True)
class TrainingTiles:
    """Tiles of one size on one slide, with the regions that lie wholly inside each.

    Attributes
    ----------
    tiles
        The tiles.
    members
        Region indices of each tile, per size: ``members[tile][size]``.
    """

    tiles: list[Tile]
    members: list[tuple[NDArray[np.intp], ...]]


def _align_up(px: float) -> int:
    return int(-(-px // ALIGN_PX) * ALIGN_PX)


def _origins(low: float, high: float, side: int, step: int, shift: float) -> NDArray[np.int64]:
    """Starts, whole pixels, of tiles of one side that cover [low, high), moved by a share of what leaves it covered."""
    spare = side - 1 - (high - low)
    if spare >= 0:
        return np.array([np.floor(low - spare * shift)], dtype=np.int64)
    return np.arange(np.floor(low - step * shift), high - side + step, step).astype(np.int64)


def _check_fits(slide: TrainingSlide, needed_px: float, tile_px: int) -> None:
    if needed_px > tile_px - ALIGN_PX:
        raise PixNetError(
            f"Slide {slide.name!r} has regions that need tiles of {needed_px + ALIGN_PX:.0f} working pixels, and tiles "
            f"are {tile_px}: none would fit. Give tile_px={_align_up(2 * needed_px)} or more, or a coarser working_mpp."
        )


def training_tiles(
    slide: TrainingSlide, tile_px: int, *, shift: tuple[float, float] = (0.5, 0.5), once: bool = False
) -> TrainingTiles:
    """Cover a slide's measured regions with tiles.

    Tiles overlap by the largest region and its margin, so that every region lies wholly inside at least one. A slide
    whose regions fit into one tile gets one, no larger than they need.

    Parameters
    ----------
    slide
        The slide.
    tile_px
        Largest side, working pixels, a multiple of 32.
    shift
        Offset of the tiling, as a share of its step, rows and columns, in [0, 1).
    once
        Give each region to the first tile that holds it only (validation counts it once).

    Returns
    -------
    Tiles that hold at least one region; all have the same size.

    Raises
    ------
    PixNetError
        A region and its margin leave tiles no room to overlap.
    """
    margin = tile_px // MARGIN_SHARE
    boxes = [m.regions.bounds + np.array([-margin, -margin, margin, margin]) for m in slide.measured]
    every = np.concatenate(boxes)
    extent = float((every[:, 2:] - every[:, :2]).max())
    _check_fits(slide, extent, tile_px)
    (left, top), (right, bottom) = every[:, :2].min(axis=0), every[:, 2:].max(axis=0)
    height, width = (min(tile_px, _align_up(size + ALIGN_PX)) for size in (bottom - top, right - left))
    step = tile_px - _align_up(extent)
    rows, cols = (
        _origins(low, high, side, step, offset)
        for low, high, side, offset in ((top, bottom, height, shift[0]), (left, right, width, shift[1]))
    )
    free = [np.ones(len(box), bool) for box in boxes]
    tiles, members = [], []
    for row0 in rows:
        strips = [np.nonzero(_within(box[:, 1::2], row0, height))[0] for box in boxes]
        for col0 in cols:
            inside = tuple(
                index[_within(box[index, ::2], col0, width) & f[index]]
                for box, index, f in zip(boxes, strips, free, strict=True)
            )
            if any(len(index) for index in inside):
                tiles.append(Tile(int(row0), int(col0), height, width))
                members.append(inside)
            if once:
                for f, index in zip(free, inside, strict=True):
                    f[index] = False
    return TrainingTiles(tiles, members)


def _within(span: NDArray[np.float64], start: int, side: int) -> NDArray[np.bool_]:
    """Which (low, high) lie inside [start, start + side]."""
    return (span[:, 0] >= start) & (span[:, 1] <= start + side)
