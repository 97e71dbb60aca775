"""Held-out parts of a slide: spatial blocks, never random spots, whose neighbours would give them away."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Regions, chunks

__all__ = ["hold_out_blocks"]

_BLOCKS_A_SIDE = 8


def hold_out_blocks(slide: TrainingSlide, fraction: float, seed: int) -> tuple[TrainingSlide, TrainingSlide]:
    """Split a slide's regions into training and held-out ones by square blocks.

    The regions' extent is cut into at most 8 × 8 blocks, and a share of the blocks that hold regions is drawn; all
    sizes share the blocks. A region goes where its centre is; training regions that touch a held-out block from
    outside, by up to their own size, are left out of both, so that no held-out tissue is trained on.

    Parameters
    ----------
    slide
        The slide.
    fraction
        Share of occupied blocks to hold out, in (0, 1).
    seed
        Draws the blocks.

    Returns
    -------
    The slide with its training regions, and with its held-out regions.

    Raises
    ------
    PixNetError
        All regions lie in one block.
    """
    blocks = _Blocks.around(slide)
    each = [blocks.of(m.regions) for m in slide.measured]
    occupied = np.unique(np.concatenate([np.unique(block) for block in each]))
    if len(occupied) < 2:
        raise PixNetError(
            f"Slide {slide.name!r} has {sum(map(len, each))} measured regions in one place: no blocks can be held out. "
            "Use validation=None, or validation=[names of slides]."
        )
    n_held = min(max(round(fraction * len(occupied)), 1), len(occupied) - 1)
    held = np.random.default_rng(seed).choice(occupied, n_held, replace=False)
    held_out = tuple(np.nonzero(np.isin(block, held))[0] for block in each)
    training = tuple(
        np.nonzero(~np.isin(block, held) & ~blocks.touched(m.regions, held))[0]
        for block, m in zip(each, slide.measured, strict=True)
    )
    if not any(len(index) for index in training):
        training = tuple(np.nonzero(~np.isin(block, held))[0] for block in each)
    return slide.subset(training), slide.subset(held_out)


class _Blocks(NamedTuple):
    """8 × 8 square blocks: where they start, and their side."""

    low: NDArray[np.float64]
    side: float

    @classmethod
    def around(cls, slide: TrainingSlide) -> _Blocks:
        """Blocks over the centres of all regions."""
        boxes = []
        for measured in slide.measured:
            for _, some in chunks(measured.regions):
                centre = some.centre_xy
                boxes.append([centre.min(axis=0), centre.max(axis=0)])
        (low, _), (_, high) = np.min(boxes, axis=0), np.max(boxes, axis=0)
        return cls(low, max(float((high - low).max()) / _BLOCKS_A_SIDE * (1 + 1e-9), 1e-9))

    def of(self, regions: Regions) -> NDArray[np.uint8]:
        """Block of each region's centre."""
        found = np.empty(len(regions), np.uint8)
        for place, some in chunks(regions):
            cell = np.clip(np.floor((some.centre_xy - self.low) / self.side), 0, _BLOCKS_A_SIDE - 1).astype(np.uint8)
            found[place] = cell[:, 1] * _BLOCKS_A_SIDE + cell[:, 0]
        return found

    def touched(self, regions: Regions, held: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Regions whose boxes reach into one of the held-out blocks."""
        found = np.zeros(len(regions), bool)
        for place, some in chunks(regions):
            found[place] = self._reach_into(some.bounds, held)
        return found

    def _reach_into(self, bounds: NDArray[np.float64], held: NDArray[np.uint8]) -> NDArray[np.bool_]:
        touching = np.zeros(len(bounds), bool)
        for block in held.astype(np.int64):
            left, top = self.low + self.side * np.array([block % _BLOCKS_A_SIDE, block // _BLOCKS_A_SIDE])
            apart = (bounds[:, 2] <= left) | (bounds[:, 0] >= left + self.side)
            apart |= (bounds[:, 3] <= top) | (bounds[:, 1] >= top + self.side)
            touching |= ~apart
        return touching
