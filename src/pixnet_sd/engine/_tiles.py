"""Augmentation: the eight symmetries of the square, and jitter of the stain.

What the loops know of a slide: how to read pixels, and which regions were measured.

Cutting slides into tiles: where regions are (training), and over what must be predicted (inference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import STRIDES, Regions, chunks

__all__ = [
    "ALIGN_PX",
    "N_SYMMETRIES",
    "LazyTargets",
    "MeasuredRegions",
    "ReadTile",
    "Tile",
    "TrainingSlide",
    "TrainingTiles",
    "apply_symmetry",
    "jitter_stain",
    "training_tiles",
    "undo_symmetry",
]

N_SYMMETRIES = 8


def apply_symmetry(x: Tensor, k: int) -> Tensor:
    """Turn by ``k % 4`` right angles, then mirror for ``k >= 4``.

    Parameters
    ----------
    x
        Shape (..., H, W).
    k
        0 to 7; 0 leaves it as it is.

    Returns
    -------
    Shape (..., H, W), or (..., W, H) for odd k.
    """
    x = torch.rot90(x, k % 4, (-2, -1))
    return x.flip(-1) if k >= 4 else x


def undo_symmetry(x: Tensor, k: int) -> Tensor:
    """Invert `apply_symmetry`.

    The network sees a turned tile; its feature map is turned back, so the tile's regions and their aggregation
    operator stay as they are. That is exact: the bilinear resize commutes with all eight symmetries.
    """
    x = x.flip(-1) if k >= 4 else x
    return torch.rot90(x, -(k % 4), (-2, -1))


def jitter_stain(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale and shift the optical density of each channel at random, tile by tile.

    Parameters
    ----------
    image
        RGB, shape (B, 3, H, W), 0 to 255.
    strength
        Standard deviation of the log scale; the shift has a tenth of it.
    generator
        Source of randomness, on the CPU.

    Returns
    -------
    Shape (B, 3, H, W), 0 to 255.
    """
    if strength == 0:
        return image
    noise = torch.randn(2, len(image), 3, 1, 1, generator=generator)
    noise = (noise.pin_memory() if image.is_cuda else noise).to(image.device, non_blocking=True) * strength
    density = -torch.log((image + 1) / 256)
    return (256 * torch.exp(-(density * torch.exp(noise[0]) + 0.1 * noise[1])) - 1).clamp(0, 255)


ReadTile = Callable[[int, int, int, int], NDArray[np.uint8]]
"""``read(row0, row1, col0, col1)`` in working pixels -> RGB (rows, columns, 3); white outside the slide."""


class LazyTargets(Protocol):
    """Targets (n, M) that are read when asked for, from several threads at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, M)."""

    def __getitem__(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Targets of some regions, ascending, shape (k, M)."""

    def rows(self, index: NDArray[np.intp]) -> Any:
        """The same as SciPy's compressed rows."""

    def mean(self, axis: int) -> NDArray[Any]:
        """Mean over the regions (`axis` 0), shape (M,)."""

    def subset(self, index: NDArray[np.intp]) -> Self:
        """Targets of some regions, not read yet."""


@dataclass(frozen=True)
class MeasuredRegions:
    """Regions of one size with their targets.

    Attributes
    ----------
    size_name
        What they are called in messages, e.g. the table's name.
    regions
        In working pixels, n of them.
    values
        Targets, shape (n, M), float32.
    """

    size_name: str
    regions: Regions
    values: NDArray[np.float32] | LazyTargets

    def subset(self, index: NDArray[np.intp]) -> MeasuredRegions:
        """The regions picked by an index."""
        values = self.values[index] if isinstance(self.values, np.ndarray) else self.values.subset(index)
        return MeasuredRegions(self.size_name, self.regions.subset(index), values)

    @cached_property
    def cover(self) -> NDArray[np.float64]:
        """Box around all regions, and the largest side of any: x0, y0, x1, y1, side."""
        boxes = [some.bounds for _, some in chunks(self.regions)]
        low, high = np.array([b[:, :2].min(0) for b in boxes]), np.array([b[:, 2:].max(0) for b in boxes])
        side = max(float((b[:, 2:] - b[:, :2]).max()) for b in boxes)
        return np.array([*low.min(0), *high.max(0), side])


@dataclass(frozen=True)
class TrainingSlide:
    """A slide to train or validate on.

    Attributes
    ----------
    name
        Its name.
    read
        Tile reader.
    height, width
        Size, working pixels.
    measured
        Its measured regions, one entry a size.
    depth
        Counts per tissue relative to the mean of all training slides; 1 where targets are log-normalised.
    """

    name: str
    read: ReadTile
    height: int
    width: int
    measured: tuple[MeasuredRegions, ...]
    depth: float = 1.0

    def subset(self, indices: tuple[NDArray[np.intp], ...]) -> TrainingSlide:
        """The same slide with only some regions of each size; sizes left empty are dropped."""
        kept = tuple(m.subset(i) for m, i in zip(self.measured, indices, strict=True) if len(i))
        return replace(self, measured=kept)

    @property
    def cover(self) -> NDArray[np.float64]:
        """Box around the regions of all sizes, and the largest side of any: x0, y0, x1, y1, side."""
        each = np.array([m.cover for m in self.measured])
        return cast(NDArray[np.float64], np.concatenate([each[:, :2].min(0), each[:, 2:].max(0)]))


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
