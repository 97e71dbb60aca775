"""Held-out parts of a slide: spatial blocks, never random spots, whose neighbours would give them away."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import PixNetError

from .slides import TrainingSlide

__all__ = ["hold_out_blocks"]

_BLOCKS_A_SIDE = 8


def _block_of(centre_xy: NDArray[np.float64], low: NDArray[np.float64], side: float) -> NDArray[np.int64]:
    cell = np.clip(np.floor((centre_xy - low) / side), 0, _BLOCKS_A_SIDE - 1).astype(np.int64)
    return cell[:, 1] * _BLOCKS_A_SIDE + cell[:, 0]


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
    centres = [m.regions.centre_xy for m in slide.measured]
    every = np.concatenate(centres)
    low = every.min(axis=0)
    side = max(float((every.max(axis=0) - low).max()) / _BLOCKS_A_SIDE * (1 + 1e-9), 1e-9)
    blocks = [_block_of(c, low, side) for c in centres]
    occupied = np.unique(np.concatenate(blocks))
    if len(occupied) < 2:
        raise PixNetError(
            f"Slide {slide.name!r} has {len(every)} measured regions in one place: no blocks can be held out. Use "
            "validation=None, or validation=[names of slides]."
        )
    n_held = min(max(round(fraction * len(occupied)), 1), len(occupied) - 1)
    held = np.random.default_rng(seed).choice(occupied, n_held, replace=False)
    held_out = tuple(np.nonzero(np.isin(block, held))[0] for block in blocks)
    training = tuple(
        np.nonzero(~np.isin(block, held) & ~_touches(m.regions.bounds, held, low, side))[0]
        for block, m in zip(blocks, slide.measured, strict=True)
    )
    if not any(len(index) for index in training):
        training = tuple(np.nonzero(~np.isin(block, held))[0] for block in blocks)
    return slide.subset(training), slide.subset(held_out)


def _touches(
    bounds: NDArray[np.float64], held: NDArray[np.int64], low: NDArray[np.float64], side: float
) -> NDArray[np.bool_]:
    """Boxes that reach into one of the held-out blocks."""
    touching = np.zeros(len(bounds), bool)
    for block in held:
        left, top = low + side * np.array([block % _BLOCKS_A_SIDE, block // _BLOCKS_A_SIDE])
        apart = (bounds[:, 2] <= left) | (bounds[:, 0] >= left + side)
        apart |= (bounds[:, 3] <= top) | (bounds[:, 1] >= top + side)
        touching |= ~apart
    return touching
