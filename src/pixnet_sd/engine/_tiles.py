"""Slides cut into tiles so that every measured region lies wholly inside one, and what augments a tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import STRIDES, Regions, chunks

N_SYMMETRIES = 8

ALIGN_PX = STRIDES[-1]
"""Sides of tiles are multiples of the coarsest stride."""

MARGIN_SHARE = 16
"""A region keeps this share of a tile's side from the border, where padding stands in for tissue."""

ReadTile = Callable[[int, int, int, int], NDArray[np.uint8]]
"""``read(row0, row1, col0, col1)`` in working pixels -> RGB (rows, columns, 3); white outside the slide."""


def apply_symmetry(x: Tensor, k: int) -> Tensor:
    """Turn (..., H, W) by ``k % 4`` right angles, then mirror it for ``k >= 4``; k = 0 leaves it as it is."""
    x = torch.rot90(x, k % 4, (-2, -1))
    return x.flip(-1) if k >= 4 else x


def undo_symmetry(x: Tensor, k: int) -> Tensor:
    """Invert `apply_symmetry`; exact on feature maps, since the bilinear resize commutes with all symmetries."""
    x = x.flip(-1) if k >= 4 else x
    return torch.rot90(x, -(k % 4), (-2, -1))


def jitter_stain(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale (log scale of standard deviation `strength`) and shift the density of tiles (B, 3, H, W), 0 to 255."""
    if strength == 0:
        return image
    # Drawn on the CPU, so that a seed gives the same on every device; the shift has a tenth of the deviation.
    noise = torch.randn(2, len(image), 3, 1, 1, generator=generator)
    noise = (noise.pin_memory() if image.is_cuda else noise).to(image.device, non_blocking=True) * strength
    density = -torch.log((image + 1) / 256)
    return (256 * torch.exp(-(density * torch.exp(noise[0]) + 0.1 * noise[1])) - 1).clamp(0, 255)


class LazyTargets(Protocol):
    """Targets (n, M) on disk, read when they are asked for (index ascending), from several threads at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, M)."""

    def __getitem__(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Read the targets of regions, (k, M)."""

    def rows(self, index: NDArray[np.intp]) -> Any:
        """Read the same as SciPy's compressed rows."""

    def mean(self, axis: int) -> NDArray[Any]:
        """Compute the mean over regions (axis 0), (M,)."""

    def subset(self, index: NDArray[np.intp]) -> Self:
        """Pick regions without reading them."""


@dataclass(frozen=True)
class MeasuredRegions:
    """Regions of one size, in working pixels, with their targets (n, M), float32; named as in messages."""

    size_name: str
    regions: Regions
    values: NDArray[np.float32] | LazyTargets

    def subset(self, index: NDArray[np.intp]) -> MeasuredRegions:
        """Pick regions by an index."""
        values = self.values[index] if isinstance(self.values, np.ndarray) else self.values.subset(index)
        return MeasuredRegions(self.size_name, self.regions.subset(index), values)

    @cached_property
    def cover(self) -> NDArray[np.float64]:
        """Box around all regions, and the largest side of any: x0, y0, x1, y1, side."""
        boxes = [piece.bounds for _, piece in chunks(self.regions)]
        low, high = np.array([b[:, :2].min(0) for b in boxes]), np.array([b[:, 2:].max(0) for b in boxes])
        side = max(float((b[:, 2:] - b[:, :2]).max()) for b in boxes)
        return np.array([*low.min(0), *high.max(0), side])


@dataclass(frozen=True)
class TrainingSlide:
    """A slide to train or validate on; sides in working pixels."""

    name: str
    read: ReadTile
    height: int
    width: int
    measured: tuple[MeasuredRegions, ...]  # one entry a size
    depth: float = 1.0  # counts per tissue relative to the mean of all training slides; 1 where targets are logarithms

    def subset(self, indices: tuple[NDArray[np.intp], ...]) -> TrainingSlide:
        """Keep only the regions picked, by one index a size; sizes left empty are dropped."""
        kept = tuple(m.subset(i) for m, i in zip(self.measured, indices, strict=True) if len(i))
        return replace(self, measured=kept)


class Tile(NamedTuple):
    """A rectangle of working pixels."""

    row0: int
    col0: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class TrainingTiles:
    """Tiles of one size on one slide. Which regions lie wholly inside a tile is found when the tile is used."""

    slide: TrainingSlide
    tiles: list[Tile]  # each with at least one region
    margin: int  # pixels that a region keeps from a tile's border
    once: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None  # see `training_tiles`: starts of rows and columns

    def members(self, tile: Tile) -> tuple[NDArray[np.intp], ...]:
        """Find the regions of a tile: ascending indices, per size."""
        return tuple(self.inside(m.regions, tile) for m in self.slide.measured)

    def inside(self, regions: Regions, tile: Tile) -> NDArray[np.intp]:
        """Find which regions belong to a tile."""
        (row0, col0, height, width), margin = tile, self.margin
        index = regions.within(col0 + margin, row0 + margin, col0 + width - margin, row0 + height - margin)
        if self.once is None:
            return index
        right, bottom = regions.subset(index).bounds[:, 2:].T
        rows, cols = self.once
        mine = rows[np.searchsorted(rows - margin + height, bottom)] == row0
        return index[mine & (cols[np.searchsorted(cols - margin + width, right)] == col0)]


def _align_up(px: float) -> int:
    return int(-(-px // ALIGN_PX) * ALIGN_PX)


def _origins(low: float, high: float, side: int, step: int, shift: float) -> NDArray[np.int64]:
    """Starts, whole pixels, of tiles of one side that cover [low, high), moved by a share of what leaves it covered."""
    spare = side - 1 - (high - low)
    if spare >= 0:
        return np.array([np.floor(low - spare * shift)], dtype=np.int64)
    return np.arange(np.floor(low - step * shift), high - side + step, step).astype(np.int64)


def training_tiles(
    slide: TrainingSlide, tile_px: int, *, shift: tuple[float, float] = (0.5, 0.5), once: bool = False
) -> TrainingTiles:
    """Cover a slide's measured regions with tiles, every region wholly inside one: they overlap by the largest.

    Sides are multiples of 32, at most `tile_px`; `shift` moves the tiling by shares of its step, rows and columns;
    `once` gives each region to the first tile that holds it only, so that validation counts it once.
    """
    margin = tile_px // MARGIN_SHARE
    covers = np.array([m.cover for m in slide.measured])
    left, top = covers[:, :2].min(axis=0) - margin
    right, bottom, side = covers[:, 2:].max(axis=0) + np.array([margin, margin, 2 * margin])
    if side > tile_px - ALIGN_PX:
        raise PixNetError(
            f"Slide {slide.name!r} has regions that need tiles of {side + ALIGN_PX:.0f} working pixels, and tiles are "
            f"{tile_px}: none would fit. Give tile_px={_align_up(2 * side)} or more, or a coarser working_mpp."
        )
    height, width = (min(tile_px, _align_up(size + ALIGN_PX)) for size in (bottom - top, right - left))
    step = tile_px - _align_up(side)
    rows, cols = (
        _origins(low, high, length, step, offset)
        for low, high, length, offset in ((top, bottom, height, shift[0]), (left, right, width, shift[1]))
    )
    every = [Tile(int(row0), int(col0), height, width) for row0 in rows for col0 in cols]
    tiling = TrainingTiles(slide, every, margin, (rows, cols) if once else None)
    sizes = sorted(slide.measured, key=lambda m: len(m.regions))  # the fewest, largest regions are the quickest to find
    return replace(tiling, tiles=[t for t in every if any(len(tiling.inside(m.regions, t)) for m in sizes)])
