"""Cutting slides into tiles: where regions are (training), and over what must be predicted (inference)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import PixNetError
from pixnet_sd.nn.grid import STRIDES
from pixnet_sd.nn.regions import Regions

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
    """Tiles of one size on one slide. Which regions lie wholly inside each is asked tile by tile.

    Attributes
    ----------
    slide
        The slide.
    tiles
        The tiles, each with at least one region.
    margin
        Pixels that a region keeps from a tile's border.
    once
        Starts of all tiles, rows and columns, when a region belongs to the first tile only that holds it.
    """

    slide: TrainingSlide
    tiles: list[Tile]
    margin: int
    once: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def members(self, tile: int) -> tuple[NDArray[np.intp], ...]:
        """Region indices of a tile, per size, ascending."""
        return tuple(self._inside(m.regions, self.tiles[tile]) for m in self.slide.measured)

    def _inside(self, regions: Regions, tile: Tile) -> NDArray[np.intp]:
        index = regions.within(*_inner_box(tile, self.margin))
        if self.once is None:
            return index
        right, bottom = regions.subset(index).bounds[:, 2:].T
        rows, cols = (origin - self.margin for origin in self.once)
        mine = self.once[0][np.searchsorted(rows + tile.height, bottom)] == tile.row0
        return index[mine & (self.once[1][np.searchsorted(cols + tile.width, right)] == tile.col0)]


def _inner_box(tile: Tile, margin: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a tile without its margin."""
    return (
        tile.col0 + margin,
        tile.row0 + margin,
        tile.col0 + tile.width - margin,
        tile.row0 + tile.height - margin,
    )


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
    left, top, right, bottom, side = slide.cover + np.array([-margin, -margin, margin, margin, 2 * margin])
    _check_fits(slide, side, tile_px)
    height, width = (min(tile_px, _align_up(size + ALIGN_PX)) for size in (bottom - top, right - left))
    step = tile_px - _align_up(side)
    rows, cols = (
        _origins(low, high, side, step, offset)
        for low, high, side, offset in ((top, bottom, height, shift[0]), (left, right, width, shift[1]))
    )
    every = TrainingTiles(
        slide,
        [Tile(int(row0), int(col0), height, width) for row0 in rows for col0 in cols],
        margin,
        (rows, cols) if once else None,
    )
    return replace(every, tiles=[tile for k, tile in enumerate(every.tiles) if _holds_any(every, k)])


def _holds_any(found: TrainingTiles, tile: int) -> bool:
    """Whether a tile has members; the fewest, largest regions are asked first."""
    sizes = sorted(found.slide.measured, key=lambda m: len(m.regions))
    return any(len(found._inside(m.regions, found.tiles[tile])) for m in sizes)
