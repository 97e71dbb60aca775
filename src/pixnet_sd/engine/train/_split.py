"""Held-out parts of a slide: spatial blocks, never random spots, whose neighbours would give them away."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Regions, chunks

_BLOCKS_A_SIDE = 8


def hold_out_blocks(slide: TrainingSlide, fraction: float, seed: int) -> tuple[TrainingSlide, TrainingSlide]:
    """Split a slide's regions into training and held-out ones by square blocks.

    The regions' extent is cut into at most 8 × 8 blocks, and a share of the blocks that hold regions is drawn; all
    sizes share the blocks. A region goes where its centre is; training regions that touch a held-out block from
    outside, by up to their own size, are left out of both, so that no held-out tissue is trained on.
    """
    low, side = _block_grid(slide)
    blocks = [_block_of(m.regions, low, side) for m in slide.measured]
    occupied = np.unique(np.concatenate([np.unique(block) for block in blocks]))
    if len(occupied) < 2:
        raise PixNetError(
            f"Slide {slide.name!r} has {sum(map(len, blocks))} measured regions in one place: no blocks can be held "
            "out. Use validation=None, or validation=[names of slides]."
        )
    n_held = min(max(round(fraction * len(occupied)), 1), len(occupied) - 1)
    held = np.random.default_rng(seed).choice(occupied, n_held, replace=False)
    outside = [~np.isin(block, held) for block in blocks]
    training = [
        np.nonzero(out & ~_touch(m.regions, held, low, side))[0] for out, m in zip(outside, slide.measured, strict=True)
    ]
    if not any(map(len, training)):
        training = [np.nonzero(out)[0] for out in outside]
    return slide.subset(tuple(training)), slide.subset(tuple(np.nonzero(~out)[0] for out in outside))


def _block_grid(slide: TrainingSlide) -> tuple[NDArray[np.float64], float]:
    """Lay the blocks over the centres of all regions: where they start (x, y), and their side."""
    pieces = (piece.centre_xy for m in slide.measured for _, piece in chunks(m.regions))
    boxes = np.array([(centres.min(axis=0), centres.max(axis=0)) for centres in pieces])
    low, high = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
    return low, max(float((high - low).max()) / _BLOCKS_A_SIDE * (1 + 1e-9), 1e-9)


def _block_of(regions: Regions, low: NDArray[np.float64], side: float) -> NDArray[np.uint8]:
    """Find the block of each region's centre."""
    block = np.empty(len(regions), np.uint8)
    for place, piece in chunks(regions):
        cell = np.clip(np.floor((piece.centre_xy - low) / side), 0, _BLOCKS_A_SIDE - 1).astype(np.uint8)
        block[place] = cell[:, 1] * _BLOCKS_A_SIDE + cell[:, 0]
    return block


def _touch(regions: Regions, held: NDArray[np.uint8], low: NDArray[np.float64], side: float) -> NDArray[np.bool_]:
    """Tell which regions' boxes reach into a held-out block."""
    touching = np.zeros(len(regions), bool)
    for place, piece in chunks(regions):
        x0, y0, x1, y1 = piece.bounds.T
        for block in held.astype(np.int64):
            left, top = low + side * np.array([block % _BLOCKS_A_SIDE, block // _BLOCKS_A_SIDE])
            touching[place] |= (x1 > left) & (x0 < left + side) & (y1 > top) & (y0 < top + side)
    return touching
