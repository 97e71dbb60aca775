"""What a pass over a slide computes: the windows to walk, their tiles and blocks, and the operators of their regions.

The map is zero off tissue, and a region sums the map (Eq. 5), so glass inside a region adds nothing; a mean divides by
the tissue pixels. A region that lies on glass altogether was still asked for: it is predicted from all of its pixels,
and the network has to run there. There may be millions of regions: what is known of each beforehand is a few bytes,
and operators are made window by window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.engine import ALIGN_PX
from pixnet_sd.geometry import MAP_STRIDE, Grid, Lattice, Regions, Window, chunks
from pixnet_sd.model import Factors, Head, Move, Operator, build_operator, count_pixels, staged_array

Block = tuple[int, int, int, int]
"""row0, row1, col0, col1 in map pixels."""

_REACH = 2  # map pixels around a window that its bilinear weights can reach
_SURE_PX = 1.5  # side of a square, or diameter of a circle, that is sure to hold a pixel centre


@dataclass(frozen=True)
class StoredMap:
    """A gene map, or the feature map that it is made from, that an earlier pass has written."""

    read: Callable[[Window], NDArray[np.float32]]  # values (genes, rows, columns) of a window, or D (C, rows, columns)
    shape: tuple[int, int]
    has_features: bool = False  # D, from which all can be had, or values of the head, from which only regions can


@dataclass(frozen=True, eq=False)
class WindowRegions:
    """The k regions that a window touches, and their operator on the window's map pixels."""

    index: NDArray[np.intp]  # (k,), ascending
    operator: Operator  # tissue not looked at
    complete: NDArray[np.bool_]  # (k,), whether a region's weights all lie in the window
    on_glass: tuple[NDArray[np.intp] | Tensor, Operator] | None  # places in `index` of regions without tissue
    tissue: NDArray[np.bool_] | Tensor  # mask of the window, flat

    def staged(self, *, pin: bool) -> WindowRegions:
        """Convert what `share` needs to torch's form, see `Operator.staged`."""
        on_glass = self.on_glass
        if on_glass is not None:
            on_glass = staged_array(on_glass[0], np.int64, pin=pin), on_glass[1].staged(gradient=False, pin=pin)
        tissue = staged_array(self.tissue, np.bool_, pin=pin)
        operator = self.operator.staged(gradient=False, pin=pin)
        return replace(self, operator=operator, on_glass=on_glass, tissue=tissue)

    def moved(self, move: Move) -> WindowRegions:
        """Move every tensor."""
        on_glass = self.on_glass and (move(torch.as_tensor(self.on_glass[0])), self.on_glass[1].moved(move))
        tissue = move(torch.as_tensor(self.tissue))
        return replace(self, operator=self.operator.moved(move), on_glass=on_glass, tissue=tissue)

    def share(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sum map rows (window pixels, C), and count pixels: over tissue, or over everything for regions on glass."""
        mask = torch.as_tensor(self.tissue, device=values.device)[:, None]
        total = self.operator.apply(torch.cat([values * mask, mask.to(values.dtype)], dim=1))
        if self.on_glass is not None:
            place, operator = self.on_glass
            every = torch.cat([values, torch.ones_like(mask, dtype=values.dtype)], dim=1)
            total[torch.as_tensor(place, device=total.device)] = operator.apply(every)
        return total[:, :-1], total[:, -1]


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """The n regions to predict, in working pixels, and what is known of them before the network runs."""

    regions: Regions
    grid: Grid
    tissue: NDArray[np.bool_]  # mask on the map grid
    n_px: NDArray[np.float32] | None  # (n,), pixels inside the slide; None: every region is sure to hold one
    on_glass: NDArray[np.bool_]  # (n,), regions without tissue
    glass_support: NDArray[np.bool_]  # map pixels off tissue that regions on glass need
    wanted: NDArray[np.bool_]  # map pixels on tissue near which a region was asked for

    def window(self, window: Window) -> WindowRegions | None:
        """Build the operators of a window; None where it touches no region."""
        index = _touching(self.regions, self.grid, window)
        low, high = _map_box(self.regions.subset(index).bounds, self.grid)
        first, end = np.array([window.col0, window.row0]), np.array([window.col1, window.row1])
        meets = ((high >= first) & (low < end) & (low <= high)).all(axis=1)
        complete = np.asarray(((low >= first) & (high < end)).all(axis=1))[meets]
        index = index[meets]
        if not len(index):
            return None
        glass = np.flatnonzero(self.on_glass[index])
        on_glass = (glass, self.operator(index[glass], window)) if len(glass) else None
        return WindowRegions(index, self.operator(index, window), complete, on_glass, _cut(self.tissue, window).ravel())

    def operator(self, index: NDArray[np.intp], window: Window) -> Operator:
        """Build the operator of some regions on a window."""
        n_px = np.ones(len(index)) if self.n_px is None else self.n_px[index]
        return build_operator(self.regions.subset(index), self.grid, window=window, n_px=n_px)


@dataclass(frozen=True)
class Tiling:
    """How a slide is walked; none of it changes the result, save `n_symmetries`. Pixels are multiples of 32."""

    tile_px: int  # side of a tile without its halo
    halo_px: int  # read around each tile
    batch_size: int = 1  # tiles per forward pass, of one window or several
    n_symmetries: int = 1  # 1, 4 or 8: average the feature map over mirrored and turned copies


@dataclass(frozen=True)
class Visit:
    """A window to walk, and what to compute in it."""

    window: Window
    tiles: list[tuple[int, int]]  # origins, working pixels
    blocks: list[Block]
    regions: bool  # whether sums over regions are wanted
    reuse: bool  # whether the stored map is read instead


@dataclass(frozen=True, eq=False)
class PredictPlan:
    """All that one pass over a slide depends on."""

    regions: RegionPlan
    tiling: Tiling
    side: int  # of a window, map pixels, see `window_side`
    head: Head  # the network's, or one for some of its outputs (`Head.select`)
    shown: Head | Factors | None = None  # what blocks hold: values of `head`, or D; None: no map is written
    pooled: bool = False  # sum D over the regions, and leave W and b to whoever reads the sums; of a linear head only
    stored: StoredMap | None = None  # windows it covers are not computed again, if it has what they need

    @property
    def n_columns(self) -> int:
        """Columns of the regions' sums."""
        return self.head.in_features if self.pooled else self.head.n_outputs

    def visits(self, blocks: Sequence[Block], is_done: Callable[[Window], bool] | None) -> list[Visit]:
        """List the windows with something to do: blocks to write, or regions not yet summed (None: none asked for)."""
        step, side, tissue = self.tiling.tile_px // MAP_STRIDE, self.side, self.regions.tissue
        pending: dict[tuple[int, int], list[Block]] = {}
        for block in blocks:
            if tissue[block[0] : block[1], block[2] : block[3]].any():
                pending.setdefault((block[0] // side * side, block[2] // side * side), []).append(block)
        visits = []
        for window in windows_of(self.regions.grid, side):
            to_write = pending.get((window.row0, window.col0), [])
            glass = _cut(self.regions.glass_support, window)
            asked = glass | _cut(self.regions.wanted, window)
            regions = is_done is not None and bool(asked.any()) and not is_done(window)
            if not to_write and not regions:
                continue
            reuse = (
                self.stored is not None
                and (self.stored.has_features or not to_write)
                and not glass.any()  # of which a map knows nothing
                and window.row1 <= self.stored.shape[0]
                and window.col1 <= self.stored.shape[1]
            )
            needed = (asked if regions else np.zeros_like(asked)) | (_cut(tissue, window) if to_write else False)
            tiles = [
                ((window.row0 + row) * MAP_STRIDE, (window.col0 + col) * MAP_STRIDE)
                for row in range(0, window.shape[0], step)
                for col in range(0, window.shape[1], step)
                if not reuse and needed[row : row + step, col : col + step].any()
            ]
            visits.append(Visit(window, tiles, to_write, regions, reuse))
        return visits


def window_side(tile_px: int, block_px: int | None) -> int:
    """Return the side of a window, map pixels: whole blocks, room for a tile (working pixels), strides aligned."""
    unit = lcm(block_px or 1, ALIGN_PX // MAP_STRIDE)
    return -(-(tile_px // MAP_STRIDE) // unit) * unit


def windows_of(grid: Grid, side: int) -> Iterator[Window]:
    """Tile a grid with square windows, map pixels; those at the far edges are cut off."""
    for row0 in range(0, grid.height, side):
        for col0 in range(0, grid.width, side):
            yield Window(row0, min(row0 + side, grid.height), col0, min(col0 + side, grid.width))


def plan_regions(regions: Regions, grid: Grid, tissue: NDArray[np.bool_], window_side: int) -> RegionPlan:
    """Find out what the regions (working pixels) need before the network runs, a window of the map after the other."""
    diameter = (regions.pitch if regions.radius is None else 2 * regions.radius) if isinstance(regions, Lattice) else 0
    n_px = None
    if diameter < _SURE_PX:
        n_px = count_pixels(regions, grid.height * grid.stride, grid.width * grid.stride).astype(np.float32)
    near, on_glass, mixed = _look_at_boxes(regions, grid, tissue)
    plan = RegionPlan(regions, grid, tissue, n_px, on_glass, np.zeros_like(tissue), near & tissue)
    on_glass[mixed] = _without_tissue(plan, mixed, window_side)
    support = _Covered(grid)
    for _, chunk in chunks(regions.subset(np.flatnonzero(on_glass))):
        support.add(chunk)
    np.logical_and(support.mask(), ~tissue, out=plan.glass_support)
    return plan


def _cut(array: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    return array[window.row0 : window.row1, window.col0 : window.col1]


def _touching(regions: Regions, grid: Grid, window: Window) -> NDArray[np.intp]:
    """Find the regions whose boxes reach a window."""
    row0, row1, col0, col1 = window
    low, high = (np.array(v) * grid.stride for v in ((col0 - _REACH, row0 - _REACH), (col1 + _REACH, row1 + _REACH)))
    return regions.touching(*low, *high)


def _map_box(bounds: NDArray[np.float64], grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last map pixel (x, y) on which a box can have weight; off the slide the last is before the first."""
    last = np.array([grid.width - 1, grid.height - 1])
    bounds = np.nan_to_num(bounds, nan=-1e6)  # labels that are nowhere
    low = np.floor(bounds[:, :2] / grid.stride - 0.5).astype(np.int64)
    high = np.floor(bounds[:, 2:] / grid.stride - 0.5).astype(np.int64) + 1
    off = ((high < 0) | (low > last)).any(axis=1)
    low, high = np.clip(low, 0, last), np.clip(high, 0, last)
    high[off] = low[off] - 1
    return low, high


class _Covered:
    """Map pixels on which any of many regions can have weight, from the corners of their boxes."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._corners = np.zeros((grid.height + 1, grid.width + 1), np.int32)

    def add(self, regions: Regions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cover the regions' boxes; returns their first map pixel (x, y) and the one after their last, each (2, k)."""
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


def _look_at_boxes(
    regions: Regions, grid: Grid, tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.intp]]:
    """By boxes only: map pixels near regions, regions whose box has no tissue, and those whose box has some glass."""
    near = _Covered(grid)
    before = np.pad(tissue.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32), ((1, 0), (1, 0)))
    on_glass, mixed = np.zeros(len(regions), bool), [np.empty(0, np.intp)]
    for place, chunk in chunks(regions):
        (x0, y0), (x1, y1) = near.add(chunk)
        n_tissue = before[y1, x1] - before[y0, x1] - before[y1, x0] + before[y0, x0]
        on_glass[place] = n_tissue == 0
        mixed.append(np.flatnonzero((n_tissue > 0) & (n_tissue < (x1 - x0) * (y1 - y0))) + place.start)
    return near.mask(), on_glass, np.concatenate(mixed)


def _without_tissue(plan: RegionPlan, chosen: NDArray[np.intp], window_side: int) -> NDArray[np.bool_]:
    """Find out exactly which of the chosen regions have no weight on tissue."""
    weight = np.zeros((len(chosen), 2))
    regions = plan.regions.subset(chosen)
    for window in windows_of(plan.grid, window_side) if len(chosen) else ():
        index = _touching(regions, plan.grid, window)
        if len(index):
            mask = torch.from_numpy(_cut(plan.tissue, window).ravel()).float()
            columns = torch.stack([mask, torch.ones_like(mask)], dim=1)
            weight[index] += plan.operator(chosen[index], window).apply(columns).numpy()
    return np.asarray(weight[:, 0] <= 1e-6 * np.maximum(weight[:, 1], 1))
