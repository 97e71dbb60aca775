"""Which windows of a slide are walked, and what is to be done in each."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.nn.grid import Window
from pixnet_sd.nn.model import MAP_STRIDE

from .region_plan import RegionPlan, windows_of
from .sinks import Block, BlockSink, RegionSink, StoredMap
from .tiling import ALIGN_PX

__all__ = ["Visit", "plan_visits", "window_side"]


@dataclass(frozen=True)
class Visit:
    """A window to walk, what has to be computed in it, and what is read back."""

    window: Window
    tiles: list[tuple[int, int]]
    blocks: list[Block]
    regions: bool
    reuse: bool


def window_side(step: int, block_px: int | None) -> int:
    """Side of a window: whole blocks, room for a tile, and tiles that start where the coarsest stride does.

    Parameters
    ----------
    step
        Side of a tile, map pixels.
    block_px
        Side of the blocks of the map, map pixels, if one is written.

    Returns
    -------
    Map pixels.
    """
    unit = lcm(block_px or 1, ALIGN_PX // MAP_STRIDE)
    return -(-step // unit) * unit


def _tiles_needed(window: Window, needed: NDArray[np.bool_], step: int) -> list[tuple[int, int]]:
    """Origins, working pixels, of a window's tiles that hold a needed map pixel; `needed` is the window's own."""
    return [
        ((window.row0 + row) * MAP_STRIDE, (window.col0 + col) * MAP_STRIDE)
        for row in range(0, window.shape[0], step)
        for col in range(0, window.shape[1], step)
        if needed[row : row + step, col : col + step].any()
    ]


def _cut(array: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    return array[window.row0 : window.row1, window.col0 : window.col1]


def _blocks_by_window(
    sink: BlockSink | None, side: int, tissue: NDArray[np.bool_]
) -> dict[tuple[int, int], list[Block]]:
    """Blocks to come that have tissue, under the first pixel of their window."""
    found: dict[tuple[int, int], list[Block]] = {}
    for block in sink.pending if sink is not None else []:
        if tissue[block[0] : block[1], block[2] : block[3]].any():
            found.setdefault((block[0] // side * side, block[2] // side * side), []).append(block)
    return found


def plan_visits(
    plan: RegionPlan, side: int, step: int, blocks: BlockSink | None, rows: RegionSink | None, stored: StoredMap | None
) -> list[Visit]:
    """Windows to walk, in order, those without anything to do left out."""
    pending = _blocks_by_window(blocks, side, plan.tissue)
    visits = []
    for window in windows_of(plan.grid, side):
        here = pending.get((window.row0, window.col0), [])
        glass = _cut(plan.glass_support, window)
        asked = glass | _cut(plan.wanted, window)
        regions = rows is not None and bool(asked.any()) and not rows.is_done(window)
        if not here and not regions:
            continue
        reuse = stored is not None and (stored.has_features or not here) and not glass.any() and stored.covers(window)
        needed = (asked if regions else np.zeros_like(asked)) | (_cut(plan.tissue, window) if here else False)
        visits.append(Visit(window, [] if reuse else _tiles_needed(window, needed, step), here, regions, reuse))
    return visits
