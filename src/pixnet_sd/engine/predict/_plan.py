"""What a pass over a slide reads from and writes to.

Which pixels of the map the requested regions need, and each window's share of their sums.

The map is zero off tissue, and a region sums the map (Eq. 5), so glass inside a region adds nothing; a mean divides by
the tissue pixels. A region that lies on glass altogether was still asked for by its user: it is predicted from all of
its pixels, and the network has to run there.

There may be millions of regions: what is known of each beforehand is a few bytes, found part by part; operators are
made window by window.

Which windows of a slide are walked, and what is to be done in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.engine import ALIGN_PX
from pixnet_sd.geometry import MAP_STRIDE, Grid, Lattice, Regions, RegionShare, Window, chunks
from pixnet_sd.model import Move, Operator, build_operator, count_pixels, staged_array

__all__ = [
    "Block",
    "BlockSink",
    "RegionPlan",
    "RegionSink",
    "StoredMap",
    "Visit",
    "WindowRegions",
    "plan_regions",
    "plan_visits",
    "window_side",
    "windows_of",
]

Block = tuple[int, int, int, int]


class BlockSink(Protocol):
    """Where blocks of the gene map, or of its factors, go."""

    def write(self, block: Block, values: NDArray[np.float32]) -> None:
        """Take (channels, rows, columns) of one block; several threads may call, in any order."""

    @property
    def pending(self) -> Sequence[Block]:
        """Blocks (row0, row1, col0, col1), map pixels, not written yet."""


class RegionSink(Protocol):
    """Where the regions' sums go, window by window."""

    def put(self, share: RegionShare) -> None:
        """Take a window's share; each window is put once, and the array of sums is used again after the call."""

    def is_done(self, window: Window) -> bool:
        """Whether the window was put, perhaps by a run that was cut off."""


class StoredMap(Protocol):
    """A gene map, or the feature map that it is made from, that is there already."""

    @property
    def has_features(self) -> bool:
        """Whether it holds D, from which all can be had, or values of the head, from which only regions can."""

    def covers(self, window: Window) -> bool:
        """Whether the window was predicted."""

    def read(self, window: Window) -> NDArray[np.float32]:
        """Values (genes, rows, columns) of a window, or D (C, rows, columns)."""


_REACH = 2  # map pixels around a window that its bilinear weights can reach
_SURE_PX = 1.5  # side of a square, or diameter of a circle, that is sure to hold a pixel centre


@dataclass(frozen=True, eq=False)
class WindowRegions:
    """Regions that a window touches, and their operator on the window's map pixels.

    Attributes
    ----------
    index
        The regions, ascending, shape (k,).
    operator
        Over the window, tissue not looked at.
    complete
        Regions whose weights all lie in the window, shape (k,).
    on_glass
        Places among `index` of the regions without tissue, and their own operator; None if there are none.
    tissue
        Tissue mask of the window, flat.
    """

    index: NDArray[np.intp]
    operator: Operator
    complete: NDArray[np.bool_]
    on_glass: tuple[NDArray[np.intp] | Tensor, Operator] | None
    tissue: NDArray[np.bool_] | Tensor

    def staged(self, *, pin: bool) -> WindowRegions:
        """What `share` needs in torch's form, see `Operator.staged`."""
        on_glass = self.on_glass
        if on_glass is not None:
            on_glass = staged_array(on_glass[0], np.int64, pin=pin), on_glass[1].staged(gradient=False, pin=pin)
        tissue = staged_array(self.tissue, np.bool_, pin=pin)
        operator = self.operator.staged(gradient=False, pin=pin)
        return replace(self, operator=operator, on_glass=on_glass, tissue=tissue)

    def moved(self, move: Move) -> WindowRegions:
        """The same with every tensor moved."""
        on_glass = self.on_glass
        if on_glass is not None:
            on_glass = move(torch.as_tensor(on_glass[0])), on_glass[1].moved(move)
        return replace(
            self, operator=self.operator.moved(move), on_glass=on_glass, tissue=move(torch.as_tensor(self.tissue))
        )

    def share(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and weights of map rows (window pixels, C): over tissue, or over everything for regions on glass."""
        mask = torch.as_tensor(self.tissue, device=values.device)[:, None]
        found = self.operator.apply(torch.cat([values * mask, mask.to(values.dtype)], dim=1))
        if self.on_glass is not None:
            place, operator = self.on_glass
            every = torch.cat([values, torch.ones_like(mask, dtype=values.dtype)], dim=1)
            found[torch.as_tensor(place, device=found.device)] = operator.apply(every)
        return found[:, :-1], found[:, -1]


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """Regions to predict.

    Attributes
    ----------
    regions
        n regions, working pixels.
    grid
        Map grid.
    tissue
        Tissue mask on it.
    n_px
        Pixels of each region inside the slide, shape (n,); None where every region is sure to hold some.
    on_glass
        Regions without tissue, shape (n,).
    glass_support
        Map pixels off tissue that regions on glass need.
    wanted
        Map pixels on tissue near which a region was asked for.
    """

    regions: Regions
    grid: Grid
    tissue: NDArray[np.bool_]
    n_px: NDArray[np.float32] | None
    on_glass: NDArray[np.bool_]
    glass_support: NDArray[np.bool_]
    wanted: NDArray[np.bool_]

    def window(self, window: Window) -> WindowRegions | None:
        """What a window's map pixels are multiplied with; None where it touches no region."""
        index = _touching(self.regions, self.grid, window)
        low, high = _map_box(self.regions.subset(index).bounds, self.grid)
        first, end = np.array([window.col0, window.row0]), np.array([window.col1, window.row1])
        meets = ((high >= first) & (low < end) & (low <= high)).all(axis=1)
        complete = np.asarray(((low >= first) & (high < end)).all(axis=1))[meets]
        index = index[meets]
        if not len(index):
            return None
        glass = np.flatnonzero(self.on_glass[index])
        on_glass = (glass, self._operator(index[glass], window)) if len(glass) else None
        tissue = _cut(self.tissue, window).ravel()
        return WindowRegions(index, self._operator(index, window), complete, on_glass, tissue)

    def _operator(self, index: NDArray[np.intp], window: Window) -> Operator:
        n_px = np.ones(len(index)) if self.n_px is None else self.n_px[index]
        return build_operator(self.regions.subset(index), self.grid, window=window, n_px=n_px)


def windows_of(grid: Grid, side: int) -> Iterator[Window]:
    """Square windows, map pixels, that tile a grid; those at the far edges are cut off."""
    for row0 in range(0, grid.height, side):
        for col0 in range(0, grid.width, side):
            yield Window(row0, min(row0 + side, grid.height), col0, min(col0 + side, grid.width))


def _cut(array: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    return array[window.row0 : window.row1, window.col0 : window.col1]


def _touching(regions: Regions, grid: Grid, window: Window) -> NDArray[np.intp]:
    """Regions whose boxes reach a window."""
    row0, row1, col0, col1 = window
    low, high = (np.array(v) * grid.stride for v in ((col0 - _REACH, row0 - _REACH), (col1 + _REACH, row1 + _REACH)))
    return regions.touching(*low, *high)


def _map_box(bounds: NDArray[np.float64], grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last map pixel (x, y), both included, on which the pixels of a box can have weight.

    The last is before the first for a box off the slide.
    """
    last = np.array([grid.width - 1, grid.height - 1])
    bounds = np.nan_to_num(bounds, nan=-1e6)  # labels that are nowhere
    low = np.floor(bounds[:, :2] / grid.stride - 0.5).astype(np.int64)
    high = np.floor(bounds[:, 2:] / grid.stride - 0.5).astype(np.int64) + 1
    off = ((high < 0) | (low > last)).any(axis=1)
    low, high = np.clip(low, 0, last), np.clip(high, 0, last)
    high[off] = low[off] - 1
    return low, high


def plan_regions(regions: Regions, grid: Grid, tissue: NDArray[np.bool_], window_side: int) -> RegionPlan:
    """Find out what the regions need before the network runs.

    Parameters
    ----------
    regions
        In working pixels.
    grid
        Map grid.
    tissue
        Tissue mask, shape (grid.height, grid.width).
    window_side
        Map pixels looked at together.

    Returns
    -------
    The plan.
    """
    n_px = None if _sure(regions) else count_pixels(regions, *_slide_size(grid)).astype(np.float32)
    near, on_glass, mixed = _first_look(regions, grid, tissue)
    plan = RegionPlan(regions, grid, tissue, n_px, on_glass, np.zeros_like(tissue), near & tissue)
    windows = list(windows_of(grid, window_side))
    on_glass[mixed] = _without_tissue(plan, mixed, windows)
    support = _Covered(grid)
    for _, some in chunks(regions.subset(np.flatnonzero(on_glass))):
        support.add(some)
    np.logical_and(support.mask(), ~tissue, out=plan.glass_support)
    return plan


def _slide_size(grid: Grid) -> tuple[int, int]:
    return grid.height * grid.stride, grid.width * grid.stride


def _sure(regions: Regions) -> bool:
    """Whether every region holds a pixel centre, whatever its place."""
    if not isinstance(regions, Lattice):
        return False
    return (regions.pitch if regions.radius is None else 2 * regions.radius) >= _SURE_PX


class _Covered:
    """Map pixels on which any of many regions can have weight, from the corners of their boxes."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._corners = np.zeros((grid.height + 1, grid.width + 1), np.int32)

    def add(self, regions: Regions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cover some regions' boxes; returns their first map pixel (x, y) and the one after their last, each (2, k)."""
        low, high = _map_box(regions.bounds, self.grid)
        (x0, y0), (x1, y1) = low.T, high.T + 1
        flat, width = self._corners.reshape(-1), self._corners.shape[1]  # `add.at` is fast in one dimension only
        for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
            np.add.at(flat, y * width + x, np.int32(sign))
        return low.T, high.T + 1

    def mask(self) -> NDArray[np.bool_]:
        """Shape (height, width)."""
        inside = self._corners.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
        return np.asarray(inside[:-1, :-1] > 0)


def _first_look(
    regions: Regions, grid: Grid, tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.intp]]:
    """By boxes only: map pixels near regions, regions whose box has no tissue, and those whose box has some glass."""
    near = _Covered(grid)
    before = np.pad(tissue.astype(np.int32).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0))).astype(np.int32)
    on_glass, mixed = np.zeros(len(regions), bool), []
    for place, some in chunks(regions):
        (x0, y0), (x1, y1) = near.add(some)
        n_tissue = before[y1, x1] - before[y0, x1] - before[y1, x0] + before[y0, x0]
        on_glass[place] = n_tissue == 0
        mixed.append(np.flatnonzero((n_tissue > 0) & (n_tissue < (x1 - x0) * (y1 - y0))) + place.start)
    return near.mask(), on_glass, np.concatenate([np.empty(0, np.intp), *mixed])


def _without_tissue(plan: RegionPlan, chosen: NDArray[np.intp], windows: list[Window]) -> NDArray[np.bool_]:
    """Exactly which of some regions have no weight on tissue."""
    weight = np.zeros((len(chosen), 2))
    some = plan.regions.subset(chosen)
    for window in windows if len(chosen) else []:
        index = _touching(some, plan.grid, window)
        if len(index):
            mask = torch.from_numpy(_cut(plan.tissue, window).ravel()).float()
            columns = torch.stack([mask, torch.ones_like(mask)], dim=1)
            weight[index] += plan._operator(chosen[index], window).apply(columns).numpy()
    return np.asarray(weight[:, 0] <= 1e-6 * np.maximum(weight[:, 1], 1))


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


def _cut_of_visits(array: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
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
        glass = _cut_of_visits(plan.glass_support, window)
        asked = glass | _cut_of_visits(plan.wanted, window)
        regions = rows is not None and bool(asked.any()) and not rows.is_done(window)
        if not here and not regions:
            continue
        reuse = stored is not None and (stored.has_features or not here) and not glass.any() and stored.covers(window)
        needed = (asked if regions else np.zeros_like(asked)) | (_cut_of_visits(plan.tissue, window) if here else False)
        visits.append(Visit(window, [] if reuse else _tiles_needed(window, needed, step), here, regions, reuse))
    return visits
