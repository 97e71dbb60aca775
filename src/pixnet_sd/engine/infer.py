"""One pass over a slide: the network where it is needed, the gene map block by block, the regions on the way.

The slide is walked in windows of the map. A window's feature map D is put together from tiles, each read with a halo
as wide as the network can see, so where tiles end leaves no trace. From D the window's blocks of the gene map are
written, and its share of every region's sum is handed on. Memory holds a few windows, whatever the slide.

Three things go on at once: threads read tiles and build operators ahead of the network; the network computes; a writer
takes what it made. On a GPU, copies in both directions go through page-locked memory and nothing waits for them but
the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pixnet_sd.nn.grid import Window
from pixnet_sd.nn.model import MAP_STRIDE, Network

from .augment import apply_symmetry, undo_symmetry
from .batches import AHEAD, prefetch
from .region_plan import RegionPlan, WindowRegions, windows_of
from .slides import ReadTile
from .tiling import ALIGN_PX
from .writer import Writer, on_host

__all__ = ["BlockSink", "InferSettings", "Inference", "RegionSink", "StoredMap", "infer"]

Block = tuple[int, int, int, int]

SYMMETRIES = {1: (0,), 4: (0, 2, 4, 6), 8: tuple(range(8))}
"""Which symmetries an average over 1, 4 or 8 takes; the four keep a tile's sides."""


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

    def write(self, block: Block, values: NDArray[np.float32]) -> None:
        """Take (genes, rows, columns) of one block."""

    @property
    def pending(self) -> Sequence[Block]:
        """Blocks (row0, row1, col0, col1), map pixels, not written yet."""


class RegionSink(Protocol):
    """Where the regions' sums go, window by window."""

    def put(
        self,
        window: Window,
        index: NDArray[np.intp],
        sums: NDArray[np.float32],
        weight: NDArray[np.float64],
        complete: NDArray[np.bool_],
    ) -> None:
        """Take a window's share of k regions.

        Parameters
        ----------
        window
            Map pixels; each window is put once.
        index
            The regions, ascending, shape (k,).
        sums
            Share of the sum over each region's pixels, shape (k, genes).
        weight
            Share of the pixels by which a mean divides, shape (k,).
        complete
            Regions of which this is the whole, shape (k,).
        """

    def is_done(self, window: Window) -> bool:
        """Whether the window was put, perhaps by a run that was cut off."""


class StoredMap(Protocol):
    """A gene map, or part of one, that is there already."""

    def covers(self, window: Window) -> bool:
        """Whether the window was predicted."""

    def read(self, window: Window) -> NDArray[np.float32]:
        """Values (genes, rows, columns) of a window."""


@dataclass(frozen=True)
class Inference:
    """How much a pass had to do.

    Attributes
    ----------
    tiles_run
        Tiles that went through the network.
    windows_reused
        Windows whose map was read back instead.
    """

    tiles_run: int = 0
    windows_reused: int = 0


@dataclass(frozen=True)
class _Visit:
    """A window to walk, what has to be computed in it, and what is read back."""

    window: Window
    tiles: list[tuple[int, int]]
    blocks: list[Block]
    regions: bool
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
        self.read, self.plan, self.fabric, self.settings = read, plan, fabric, settings
        self.device = fabric.device
        self.gpu = fabric.device.type == "cuda"
        self.layout = torch.channels_last if self.gpu else torch.contiguous_format
        self.network = network.to(self.device).to(memory_format=self.layout).eval()
        index = torch.as_tensor(genes, device=self.device)
        self.weight = network.head.weight.detach()[index].float()
        self.bias = network.head.bias.detach()[index].float()

    def tile_image(self, origin: tuple[int, int]) -> Tensor:
        """A tile with its halo, (3, rows, columns)."""
        row0, col0 = (v - self.settings.halo_px for v in origin)
        side = self.settings.tile_px + 2 * self.settings.halo_px
        image = torch.from_numpy(self.read(row0, row0 + side, col0, col0 + side)).permute(2, 0, 1)
        return image.pin_memory() if self.gpu else image

    @torch.inference_mode()
    def features(self, images: list[Tensor]) -> Tensor:
        """D of some tiles without their halos, (B, C, t, t), float32, averaged over the symmetries."""
        image = torch.stack([tile.to(self.device, non_blocking=True) for tile in images]).float()
        turns = SYMMETRIES[self.settings.n_symmetries]
        total: Tensor | None = None
        for k in turns:
            turned = apply_symmetry(image, k)
            with self.fabric.autocast():
                d = self.network(turned.contiguous(memory_format=self.layout))
            d = undo_symmetry(d.float(), k)
            total = d if total is None else total + d
        assert total is not None  # there is at least one symmetry
        halo = self.settings.halo_px // MAP_STRIDE
        inner = total[:, :, halo : total.shape[2] - halo, halo : total.shape[3] - halo]
        return inner / len(turns) if len(turns) > 1 else inner

    def window_features(self, visit: _Visit, tiles: Iterator[Any]) -> Tensor:
        """D of a window, zero where no tile was needed, (C, rows, columns)."""
        window, step = visit.window, self.settings.tile_px // MAP_STRIDE
        if visit.tiles == [(window.row0 * MAP_STRIDE, window.col0 * MAP_STRIDE)] and window.shape == (step, step):
            return self.features([next(tiles)])[0]
        d = torch.zeros(self.network.head.in_features, *window.shape, device=self.device)
        for start in range(0, len(visit.tiles), self.settings.batch_size):
            origins = visit.tiles[start : start + self.settings.batch_size]
            for (row, col), part in zip(origins, self.features([next(tiles) for _ in origins]), strict=True):
                r, c = row // MAP_STRIDE - window.row0, col // MAP_STRIDE - window.col0
                rows, cols = min(step, d.shape[1] - r), min(step, d.shape[2] - c)
                d[:, r : r + rows, c : c + cols] = part[:, :rows, :cols]
        return d

    @torch.inference_mode()
    def share_of_features(self, regions: WindowRegions, d: Tensor) -> tuple[Tensor, Tensor]:
        """A window's share of its regions: A (D W + b), and A 1."""
        pooled, weight = regions.share(d.flatten(1).T)
        return torch.addmm(weight[:, None] * self.bias, pooled, self.weight.T), weight

    @torch.inference_mode()
    def block_values(self, window: Window, block: Block, d: Tensor) -> Tensor:
        """The gene map of a block, zero off tissue: (D W + b) ⊙ tissue."""
        row0, row1, col0, col1 = block
        part = d[:, row0 - window.row0 : row1 - window.row0, col0 - window.col0 : col1 - window.col0]
        values = torch.addmm(self.bias[:, None], self.weight, part.flatten(1)).view(-1, *part.shape[1:])
        tissue = self.plan.tissue[row0:row1, col0:col1]
        if not tissue.all():
            values *= torch.from_numpy(tissue).to(d.device)
        return values


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


def _plan_visits(
    plan: RegionPlan, side: int, step: int, blocks: BlockSink | None, rows: RegionSink | None, stored: StoredMap | None
) -> list[_Visit]:
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
        reuse = not here and not glass.any() and stored is not None and stored.covers(window)
        needed = (asked if regions else np.zeros_like(asked)) | (_cut(plan.tissue, window) if here else False)
        visits.append(_Visit(window, [] if reuse else _tiles_needed(window, needed, step), here, regions, reuse))
    return visits


def infer(
    network: Network,
    read: ReadTile,
    plan: RegionPlan,
    *,
    genes: NDArray[np.intp],
    fabric: Fabric,
    settings: InferSettings,
    blocks: BlockSink | None = None,
    block_px: int | None = None,
    rows: RegionSink | None = None,
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
    blocks
        Where blocks of the gene map go; None predicts regions only.
    block_px
        Side of the blocks, map pixels; needed with `blocks`.
    rows
        Where the regions' sums go; None predicts the map only.
    stored
        What is there of the same map already; windows it covers are not computed again.
    show_progress_bar
        Show a bar over the tiles.

    Returns
    -------
    How much was computed and reused.
    """
    step = settings.tile_px // MAP_STRIDE
    visits = _plan_visits(plan, window_side(step, block_px), step, blocks, rows, stored)
    run = _Pass(network, read, plan, genes, fabric, settings)
    total = sum(len(v.tiles) for v in visits)
    inputs = prefetch(_tasks(run, visits), ahead=max(AHEAD, settings.batch_size + 1))
    with tqdm(total=total, unit="tile", disable=not show_progress_bar or not total) as bar, Writer() as writer:
        for visit in visits:
            _walk(run, visit, inputs, blocks, rows, stored, writer)
            bar.update(len(visit.tiles))
    return Inference(total, sum(v.reuse for v in visits))


def _tasks(run: _Pass, visits: list[_Visit]) -> Iterator[Callable[[], Any]]:
    """What is prepared ahead, in the order in which `_walk` takes it: a window's regions, then its tiles."""
    for visit in visits:
        if visit.regions:
            yield partial(run.plan.window, visit.window)
        for origin in visit.tiles:
            yield partial(run.tile_image, origin)


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


def _walk(
    run: _Pass,
    visit: _Visit,
    inputs: Iterator[Any],
    blocks: BlockSink | None,
    rows: RegionSink | None,
    stored: StoredMap | None,
    writer: Writer,
) -> None:
    regions: WindowRegions | None = next(inputs) if visit.regions else None
    if visit.reuse and stored is not None:
        values = torch.from_numpy(stored.read(visit.window))
        share = regions.share(values.flatten(1).T) if regions is not None else None
    else:
        d = run.window_features(visit, inputs)
        for block in visit.blocks:
            assert blocks is not None  # blocks are only planned with a sink
            writer.submit(_write_block, blocks, block, on_host(run.block_values(visit.window, block, d)))
        share = run.share_of_features(regions, d) if regions is not None else None
    if rows is not None and visit.regions:
        if regions is None or share is None:
            writer.submit(_put_nothing, rows, visit.window, run.weight.shape[0])
        else:
            writer.submit(_put, rows, visit.window, regions, on_host(share[0]), on_host(share[1]))


def _write_block(sink: BlockSink, block: Block, values: Callable[[], NDArray[np.float32]]) -> None:
    sink.write(block, values())


def _put(
    sink: RegionSink,
    window: Window,
    regions: WindowRegions,
    sums: Callable[[], NDArray[np.float32]],
    weight: Callable[[], NDArray[np.float32]],
) -> None:
    sink.put(window, regions.index, sums(), weight().astype(np.float64), regions.complete)


def _put_nothing(sink: RegionSink, window: Window, n_genes: int) -> None:
    empty = np.empty(0)
    sink.put(window, empty.astype(np.intp), np.empty((0, n_genes), np.float32), empty, empty.astype(bool))
