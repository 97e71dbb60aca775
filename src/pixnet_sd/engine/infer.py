"""One pass over a slide: the network where it is needed, the gene map block by block, the regions on the way.

The slide is walked in windows of the map. A window's feature map D is put together from tiles, each read with a halo
as wide as the network can see, so where tiles end leaves no trace. From D the window's blocks of the gene map are
written, and its share of every region's sum is added. Memory holds one window, whatever the slide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pixnet_sd.nn.aggregation import Window, aggregate
from pixnet_sd.nn.model import MAP_STRIDE, Network

from .augment import apply_symmetry, undo_symmetry
from .batches import prefetch
from .region_plan import RegionPlan, windows_of
from .slides import ReadTile
from .tiling import ALIGN_PX

__all__ = ["BlockSink", "InferSettings", "Inference", "StoredMap", "infer"]

SYMMETRIES = {1: (0,), 4: (0, 2, 4, 6), 8: tuple(range(8))}
"""Which symmetries an average over 1, 4 or 8 takes; the four keep a tile's sides."""

_WRITES_AHEAD = 2


@dataclass(frozen=True)
class InferSettings:
    """How a slide is walked; none of it changes the result, save `n_symmetries`.

    Attributes
    ----------
    tile_px
        Side of a tile without its halo, working pixels, a multiple of 32.
    halo_px
        Read around each tile, working pixels, a multiple of 32.
    batch_size
        Tiles per forward pass.
    n_symmetries
        1, 4 or 8: average the feature map over mirrored and turned copies.
    """

    tile_px: int
    halo_px: int
    batch_size: int = 1
    n_symmetries: int = 1


class BlockSink(Protocol):
    """Where blocks of the gene map go."""

    def write(self, block: tuple[int, int, int, int], values: NDArray[np.float32]) -> None:
        """Take (genes, rows, columns) of one block."""

    @property
    def pending(self) -> Sequence[tuple[int, int, int, int]]:
        """Blocks (row0, row1, col0, col1), map pixels, not written yet."""


class StoredMap(Protocol):
    """A gene map, or part of one, that is there already."""

    def covers(self, window: Window) -> bool:
        """Whether the window was predicted."""

    def read(self, window: Window) -> NDArray[np.float32]:
        """Values (genes, rows, columns) of a window."""


@dataclass
class Inference:
    """What a pass gave.

    Attributes
    ----------
    values
        Prediction of each region, shape (n, genes), float32; NaN for regions off the slide.
    tiles_run
        Tiles that went through the network.
    windows_reused
        Windows whose map was read back instead.
    """

    values: NDArray[np.float32]
    tiles_run: int = 0
    windows_reused: int = 0


@dataclass(frozen=True)
class _Visit:
    """A window to walk, what has to be computed in it, and what is read back."""

    window: Window
    tiles: list[tuple[int, int]]
    blocks: list[tuple[int, int, int, int]]
    reuse: bool


class _Pass:
    """The state of one pass."""

    def __init__(
        self,
        network: Network,
        read: ReadTile,
        plan: RegionPlan,
        genes: NDArray[np.intp],
        fabric: Fabric,
        settings: InferSettings,
    ) -> None:
        self.network = network.to(fabric.device).eval()
        self.read, self.plan, self.fabric, self.settings = read, plan, fabric, settings
        self.index = torch.as_tensor(genes, device=fabric.device)
        self.weight = network.head.weight.detach()[self.index].float()
        self.bias = network.head.bias.detach()[self.index].float()
        self.values = np.zeros((len(plan.regions), len(genes)))

    def tile_image(self, origin: tuple[int, int]) -> NDArray[np.uint8]:
        """A tile with its halo, (rows, columns, 3)."""
        row0, col0 = (v - self.settings.halo_px for v in origin)
        side = self.settings.tile_px + 2 * self.settings.halo_px
        return self.read(row0, row0 + side, col0, col0 + side)

    @torch.inference_mode()
    def features(self, images: list[NDArray[np.uint8]]) -> Tensor:
        """D of some tiles without their halos, (B, C, t, t), float32, averaged over the symmetries."""
        image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.fabric.device).float()
        turns = SYMMETRIES[self.settings.n_symmetries]
        total: Tensor | None = None
        for k in turns:
            turned = apply_symmetry(image, k)
            layout = torch.channels_last if image.is_cuda else torch.contiguous_format
            with self.fabric.autocast():
                d = self.network(turned.contiguous(memory_format=layout))
            d = undo_symmetry(d.float(), k)
            total = d if total is None else total + d
        assert total is not None  # there is at least one symmetry
        halo = self.settings.halo_px // MAP_STRIDE
        return total[:, :, halo : total.shape[2] - halo, halo : total.shape[3] - halo] / len(turns)

    def window_features(self, visit: _Visit, tiles: Iterator[NDArray[np.uint8]]) -> Tensor:
        """D of a window, zero where no tile was needed, (C, rows, columns)."""
        window, step = visit.window, self.settings.tile_px // MAP_STRIDE
        d = torch.zeros(self.network.head.in_features, *window.shape, device=self.fabric.device)
        for start in range(0, len(visit.tiles), self.settings.batch_size):
            origins = visit.tiles[start : start + self.settings.batch_size]
            for (row, col), part in zip(origins, self.features([next(tiles) for _ in origins]), strict=True):
                r, c = row // MAP_STRIDE - window.row0, col // MAP_STRIDE - window.col0
                rows, cols = min(step, d.shape[1] - r), min(step, d.shape[2] - c)
                d[:, r : r + rows, c : c + cols] = part[:, :rows, :cols]
        return d

    @torch.inference_mode()
    def add_from_features(self, window: Window, d: Tensor) -> None:
        """Add a window's share of every region: A (D W + b)."""
        index, matrix = self.plan.operator(window)
        if len(index):
            pooled = aggregate(d.flatten(1).T, matrix)
            weights = torch.as_tensor(matrix.sum(axis=1), dtype=torch.float32, device=d.device)[:, None]
            self.values[index] += (pooled @ self.weight.T + weights * self.bias).cpu().numpy()

    def add_from_map(self, window: Window, values: NDArray[np.float32]) -> None:
        """Add a window's share of every region from a gene map that is there: A G."""
        index, matrix = self.plan.operator(window)
        if len(index):
            self.values[index] += matrix @ values.reshape(len(values), -1).T.astype(np.float64)

    @torch.inference_mode()
    def block_values(self, window: Window, block: tuple[int, int, int, int], d: Tensor) -> NDArray[np.float32]:
        """The gene map of a block, zero off tissue: (D W + b) ⊙ tissue."""
        row0, row1, col0, col1 = block
        part = d[:, row0 - window.row0 : row1 - window.row0, col0 - window.col0 : col1 - window.col0]
        values = torch.nn.functional.conv2d(part[None], self.weight[:, :, None, None], self.bias)[0]
        tissue = torch.as_tensor(self.plan.tissue[row0:row1, col0:col1], device=d.device)
        return (values * tissue).cpu().numpy()


def _tiles_needed(window: Window, needed: NDArray[np.bool_], step: int) -> list[tuple[int, int]]:
    """Origins, working pixels, of a window's tiles that hold a needed map pixel."""
    origins = []
    for row in range(window.row0, window.row1, step):
        for col in range(window.col0, window.col1, step):
            if needed[row : min(row + step, window.row1), col : min(col + step, window.col1)].any():
                origins.append((row * MAP_STRIDE, col * MAP_STRIDE))
    return origins


def _cut(array: NDArray[np.bool_], window: Window) -> NDArray[np.bool_]:
    return array[window.row0 : window.row1, window.col0 : window.col1]


def _inside(block: tuple[int, int, int, int], window: Window) -> bool:
    return window.row0 <= block[0] < window.row1 and window.col0 <= block[2] < window.col1


def _plan_visits(
    plan: RegionPlan, side: int, step: int, sink: BlockSink | None, stored: StoredMap | None
) -> list[_Visit]:
    """Windows to walk, in order, those without anything to do left out."""
    pending = list(sink.pending) if sink is not None else []
    wanted = _wanted(plan)
    visits = []
    for window in windows_of(plan.grid, side):
        blocks = [b for b in pending if _inside(b, window) and plan.tissue[b[0] : b[1], b[2] : b[3]].any()]
        glass = _cut(plan.glass_support, window).any()
        reuse = not blocks and not glass and stored is not None and stored.covers(window)
        needed = plan.glass_support | (plan.tissue if blocks else wanted)
        if not _cut(needed, window).any():
            continue
        tiles = [] if reuse else _tiles_needed(window, needed, step)
        visits.append(_Visit(window, tiles, blocks, reuse))
    return visits


def _wanted(plan: RegionPlan) -> NDArray[np.bool_]:
    """Map pixels on tissue near which a region was asked for; only boxes are looked at."""
    near = np.zeros((plan.grid.height + 1, plan.grid.width + 1), np.int64)
    if len(plan.regions):
        shape = np.array([plan.grid.width, plan.grid.height])
        low = np.clip(np.floor(plan.regions.bounds[:, :2] / MAP_STRIDE).astype(int) - 1, 0, shape)
        high = np.clip(np.ceil(plan.regions.bounds[:, 2:] / MAP_STRIDE).astype(int) + 1, 0, shape)
        for rows, cols, sign in ((low, low, 1), (low, high, -1), (high, low, -1), (high, high, 1)):
            np.add.at(near, (rows[:, 1], cols[:, 0]), sign)
    covered = near.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return covered & plan.tissue


def infer(
    network: Network,
    read: ReadTile,
    plan: RegionPlan,
    *,
    genes: NDArray[np.intp],
    fabric: Fabric,
    settings: InferSettings,
    sink: BlockSink | None = None,
    block_px: int | None = None,
    stored: StoredMap | None = None,
    show_progress_bar: bool = True,
) -> Inference:
    """Predict a slide: its gene map, the requested regions, or both in one pass.

    Parameters
    ----------
    network
        The network.
    read
        Tile reader of the slide.
    plan
        Regions (possibly none), map grid and tissue.
    genes
        Which of the network's genes, indices.
    fabric
        Device and precision.
    settings
        Tiles and halo.
    sink
        Where blocks of the gene map go; None predicts regions only.
    block_px
        Side of the sink's blocks, map pixels; needed with a sink.
    stored
        What is there of the same map already; windows it covers are not computed again.
    show_progress_bar
        Show a bar over the tiles.

    Returns
    -------
    Regions' values, and how much was computed and reused.
    """
    step = settings.tile_px // MAP_STRIDE
    side = _window_side(step, block_px)
    visits = _plan_visits(plan, side, step, sink, stored)
    run = _Pass(network, read, plan, genes, fabric, settings)
    total = sum(len(v.tiles) for v in visits)
    tiles = prefetch(partial(run.tile_image, origin) for v in visits for origin in v.tiles)
    with tqdm(total=total, unit="tile", disable=not show_progress_bar or not total) as bar, _Writer(sink) as writer:
        for visit in visits:
            _walk(run, visit, tiles, stored, writer)
            bar.update(len(visit.tiles))
    return Inference(_finish(run), total, sum(v.reuse for v in visits))


def _window_side(step: int, block_px: int | None) -> int:
    """Side of a window: whole blocks, room for a tile, and tiles that start where the coarsest stride does."""
    unit = lcm(block_px or 1, ALIGN_PX // MAP_STRIDE)
    return -(-step // unit) * unit


def _walk(
    run: _Pass, visit: _Visit, tiles: Iterator[NDArray[np.uint8]], stored: StoredMap | None, writer: _Writer
) -> None:
    if visit.reuse and stored is not None:
        run.add_from_map(visit.window, stored.read(visit.window))
        return
    d = run.window_features(visit, tiles)
    for block in visit.blocks:
        writer.write(block, run.block_values(visit.window, block, d))
    run.add_from_features(visit.window, d)


def _finish(run: _Pass) -> NDArray[np.float32]:
    values = run.values
    with np.errstate(invalid="ignore", divide="ignore"):
        if run.network.aggregation == "mean":
            values = values / run.plan.divisor[:, None]
    values[run.plan.divisor == 0] = np.nan
    return values.astype(np.float32)


class _Writer:
    """Writes blocks in a thread, so that the network does not wait for the disk; holds at most a few."""

    def __init__(self, sink: BlockSink | None) -> None:
        self._sink = sink
        self._pool = ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []

    def write(self, block: tuple[int, int, int, int], values: NDArray[np.float32]) -> None:
        """Queue a block; raises what an earlier write raised."""
        assert self._sink is not None  # blocks are only planned with a sink
        self._waiting.append(self._pool.submit(self._sink.write, block, values))
        while len(self._waiting) > _WRITES_AHEAD:
            self._waiting.pop(0).result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()
