"""What a pass over a slide computes: the windows to walk, their tiles and blocks, and the operators of their regions.

The map is zero off tissue, and a region sums the map (Eq. 5), so glass inside a region adds nothing; a mean divides by
the tissue pixels, and a region without any weighs nothing. There may be millions of regions: operators are made window
by window.
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
    tissue: NDArray[np.bool_] | Tensor  # mask of the window, flat

    def staged(self, *, pin: bool) -> WindowRegions:
        """Convert what `share` needs to torch's form, see `Operator.staged`."""
        tissue = staged_array(self.tissue, np.bool_, pin=pin)
        return replace(self, operator=self.operator.staged(gradient=False, pin=pin), tissue=tissue)

    def moved(self, move: Move) -> WindowRegions:
        """Move every tensor."""
        return replace(self, operator=self.operator.moved(move), tissue=move(torch.as_tensor(self.tissue)))

    def share(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sum map rows (window pixels, C) over tissue, and count its pixels."""
        mask = torch.as_tensor(self.tissue, device=values.device)[:, None]
        total = self.operator.apply(torch.cat([values * mask, mask.to(values.dtype)], dim=1))
        return total[:, :-1], total[:, -1]


@dataclass(frozen=True, eq=False)
class RegionPlan:
    """The n regions to predict, in working pixels, and what is known of them before the network runs."""

    regions: Regions
    grid: Grid
    tissue: NDArray[np.bool_]  # mask on the map grid
    n_px: NDArray[np.float32] | None  # (n,), pixels inside the slide; None: every region is sure to hold one
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
        n_px = np.ones(len(index)) if self.n_px is None else self.n_px[index]
        operator = build_operator(self.regions.subset(index), self.grid, window=window, n_px=n_px)
        return WindowRegions(index, operator, complete, _cut(self.tissue, window).ravel())

    def has_tissue(self, side: int) -> bool:
        """Whether any of the regions has tissue, found window by window, up to the first that has."""
        near = (self.window(window) for window in windows_of(self.grid, side) if _cut(self.wanted, window).any())
        return any(bool(found.share(torch.zeros(len(found.tissue), 0))[1].any()) for found in near if found is not None)


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
            asked = _cut(self.regions.wanted, window)
            regions = is_done is not None and bool(asked.any()) and not is_done(window)
            if not to_write and not regions:
                continue
            reuse = (
                self.stored is not None
                and (self.stored.has_features or not to_write)
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


def plan_regions(regions: Regions, grid: Grid, tissue: NDArray[np.bool_]) -> RegionPlan:
    """Find out where on the map the regions (working pixels) need the network, from their boxes."""
    diameter = (regions.pitch if regions.radius is None else 2 * regions.radius) if isinstance(regions, Lattice) else 0
    n_px = None
    if diameter < _SURE_PX:
        n_px = count_pixels(regions, grid.height * grid.stride, grid.width * grid.stride).astype(np.float32)
    return RegionPlan(regions, grid, tissue, n_px, _near(regions, grid) & tissue)


def _cut(array: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    return array[window.row0 : window.row1, window.col0 : window.col1]


def _touching(regions: Regions, grid: Grid, window: Window) -> NDArray[np.intp]:
    """Find the regions whose boxes reach a window."""
    row0, row1, col0, col1 = window
    low, high = (np.array(v) * grid.stride for v in ((col0 - _REACH, row0 - _REACH), (col1 + _REACH, row1 + _REACH)))
    return regions.touching(*low, *high)


def _map_box(bounds: NDArray[np.float64], grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last map pixel (x, y) on which a box can have weight; off the slide the last is before the first."""
    size = np.array([grid.width, grid.height])
    bounds = np.nan_to_num(bounds, nan=-1e6)  # labels that are nowhere
    off = ((bounds[:, 2:] <= 0) | (bounds[:, :2] >= size * grid.stride)).any(axis=1)
    corners = bounds[:, :2] / grid.stride - 0.5, bounds[:, 2:] / grid.stride + 0.5
    low, high = (np.clip(np.floor(corner), 0, size - 1).astype(np.int64) for corner in corners)
    high[off] = low[off] - 1
    return low, high


def _near(regions: Regions, grid: Grid) -> NDArray[np.bool_]:
    """Map pixels on which any of many regions can have weight, from the corners of their boxes."""
    corners = np.zeros((grid.height + 1, grid.width + 1), np.int32)
    flat, width = corners.reshape(-1), corners.shape[1]  # `add.at` is fast in one dimension only
    for _, chunk in chunks(regions):
        low, high = _map_box(chunk.bounds, grid)
        (x0, y0), (x1, y1) = low.T, high.T + 1
        for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
            np.add.at(flat, y * width + x, np.int32(sign))
    inside = corners.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    return np.asarray(inside[:-1, :-1] > 0)
