"""Held-out parts of a slide: spatial blocks, never random spots, whose neighbours would give them away."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Regions, chunks

_BLOCKS_A_SIDE = 8


def hold_out_blocks(slide: TrainingSlide, fraction: float, seed: int) -> tuple[TrainingSlide, TrainingSlide]:
    """Split a slide's regions into training and held-out ones by square blocks.

    A share is drawn of at most 8 × 8 blocks that hold regions, of all sizes. A region goes where its centre is;
    training regions that reach into a held-out block are left out of both: no held-out tissue is trained on.
    """

    def pieces() -> Iterator[tuple[int, slice, Regions]]:
        """Yield size, place and regions, some at a time: there may be millions."""
        return ((k, place, piece) for k, m in enumerate(slide.measured) for place, piece in chunks(m.regions))

    boxes = np.array([(xy.min(axis=0), xy.max(axis=0)) for xy in (piece.centre_xy for _, _, piece in pieces())])
    low, high = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
    side = max(float((high - low).max()) / _BLOCKS_A_SIDE * (1 + 1e-9), 1e-9)
    blocks = [np.empty(len(m.regions), np.uint8) for m in slide.measured]
    for k, place, piece in pieces():
        col, row = np.clip(np.floor((piece.centre_xy - low) / side), 0, _BLOCKS_A_SIDE - 1).astype(np.uint8).T
        blocks[k][place] = row * _BLOCKS_A_SIDE + col
    occupied = np.unique(np.concatenate([np.unique(block) for block in blocks]))
    if len(occupied) < 2:
        raise PixNetError(
            f"Slide {slide.name!r} has {sum(map(len, blocks))} measured regions in one place: no blocks can be held "
            "out. Use validation=None, or validation=[names of slides]."
        )
    n_held = min(max(round(fraction * len(occupied)), 1), len(occupied) - 1)
    held = np.random.default_rng(seed).choice(occupied, n_held, replace=False)
    outside = [~np.isin(block, held) for block in blocks]
    apart = [out.copy() for out in outside]  # of held-out blocks as well
    for k, place, piece in pieces():
        x0, y0, x1, y1 = piece.bounds.T
        for row, col in zip(*divmod(held.astype(np.int64), _BLOCKS_A_SIDE), strict=True):
            left, top = low + side * np.array([col, row])
            apart[k][place] &= (x1 <= left) | (x0 >= left + side) | (y1 <= top) | (y0 >= top + side)
    training = [np.nonzero(each)[0] for each in (apart if any(map(np.any, apart)) else outside)]
    return slide.subset(tuple(training)), slide.subset(tuple(np.nonzero(~out)[0] for out in outside))
