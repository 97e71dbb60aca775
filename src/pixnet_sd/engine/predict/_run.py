"""The network over windows: tiles into feature maps, feature maps into blocks and shares of regions.

One pass over a slide: the network where it is needed, the gene map block by block, the regions on the way.

The slide is walked in windows of the map. A window's feature map D is put together from tiles, each read with a halo
as wide as the network can see, so where tiles end leaves no trace. From D the window's blocks of the gene map are
written, and its share of every region's sum is handed on. Memory holds a few windows, whatever the slide.

Three things go on at once: threads read tiles and build operators ahead of the network; the network computes; writers
take what it made. On a GPU, copies in both directions go through page-locked memory and nothing waits for them but
the writers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd._util import bar_class
from pixnet_sd.engine import (
    AHEAD,
    BLOCK_WRITERS,
    Buffers,
    Copies,
    Pairs,
    ReadTile,
    Writer,
    apply_symmetry,
    fixed_shapes,
    kept_memory,
    prefetch,
    undo_symmetry,
)
from pixnet_sd.geometry import MAP_STRIDE, RegionShare, Window
from pixnet_sd.model import Factors, Head, Network

from ._plan import Block, BlockSink, RegionPlan, RegionSink, StoredMap, Visit, WindowRegions, plan_visits, window_side

__all__ = ["InferSettings", "Inference", "OpenWindow", "WindowPass", "infer"]

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
        Tiles per forward pass, of one window or several.
    n_symmetries
        1, 4 or 8: average the feature map over mirrored and turned copies.
    compile
        Run the network through ``torch.compile``: pays for many tiles on a GPU.
    """

    tile_px: int
    halo_px: int
    batch_size: int = 1
    n_symmetries: int = 1
    compile: bool = False


@dataclass
class OpenWindow:
    """A window whose tiles are under way.

    Attributes
    ----------
    visit
        What is to be done.
    regions
        Regions that it touches; None: none, or none asked for.
    n_tiles
        Tiles that are in `d` already.
    d
        Feature map (C, rows, columns), zero where no tile was needed; None before the first tile.
    """

    visit: Visit
    regions: WindowRegions | None
    n_tiles: int = 0
    d: Tensor | None = None


class WindowPass:
    """The state of one pass."""

    def __init__(
        self,
        network: Network,
        read: ReadTile,
        plan: RegionPlan,
        head: Head,
        fabric: Fabric,
        settings: InferSettings,
        *,
        shown: Head | Factors,
        pooled: bool,
        stored: StoredMap | None,
    ) -> None:
        self.pooled, self.stored = pooled, stored
        self.read, self.plan, self.fabric, self.settings = read, plan, fabric, settings
        self.device = fabric.device
        self.copies = Copies(self.device)
        self.layout = torch.channels_last if self.copies.gpu else torch.contiguous_format
        self.network = network.to(self.device).to(memory_format=self.layout).eval()
        self.forward = torch.compile(self.network, dynamic=False) if settings.compile else self.network
        self.buffers = Buffers()
        self.pairs = Pairs(self.device) if not settings.compile else None
        self.batch_size = max(settings.batch_size, 2 if self.pairs else 1)
        self.tissue = torch.as_tensor(plan.tissue, device=self.device)
        self.head = head.to(self.device)
        self.shown = self.head if shown is head else shown
        self.n_columns = head.in_features if pooled else head.n_outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pairs:
            self.pairs.close()

    def tile_image(self, origin: tuple[int, int]) -> Tensor:
        """A tile with its halo, (3, rows, columns)."""
        row0, col0 = (v - self.settings.halo_px for v in origin)
        side = self.settings.tile_px + 2 * self.settings.halo_px
        image = torch.from_numpy(self.read(row0, row0 + side, col0, col0 + side)).permute(2, 0, 1)
        return image.pin_memory() if self.copies.gpu else image

    def reads_values(self, visit: Visit) -> bool:
        """Whether a window's values are read back, which stay on the host; a feature map goes where the head is."""
        return visit.reuse and self.stored is not None and not self.stored.has_features

    def window_regions(self, visit: Visit) -> WindowRegions | None:
        """Regions of a window, ready for where they will be multiplied."""
        regions = self.plan.window(visit.window)
        on_gpu = self.copies.gpu and not self.reads_values(visit)
        return regions.staged(pin=True) if regions is not None and on_gpu else regions

    def seconds_per_tile(self) -> float:
        """Time that a tile takes in the network, without what is done ahead of it and after it."""
        side = self.settings.tile_px + 2 * self.settings.halo_px
        blank = [torch.full((3, side, side), 255, dtype=torch.uint8)] * self.batch_size
        for _ in range(2 if self.copies.gpu or self.settings.compile else 1):  # there the first warms up
            started = time.perf_counter()
            self.features(blank).flatten()[0].item()
        return (time.perf_counter() - started) / len(blank)

    def features(self, images: list[Tensor]) -> Tensor:
        """D of some tiles without their halos, (B, C, t, t), float32, averaged over the symmetries."""
        return self.pairs.map(self._features, images) if self.pairs else self._features(images)

    @torch.inference_mode()
    def _features(self, images: list[Tensor]) -> Tensor:
        n_tiles = len(images)
        if self.settings.compile:  # for one shape, so that what is left over at the end is filled up
            images = images + images[-1:] * (self.settings.batch_size - n_tiles)
        image = torch.stack([self.copies.up(tile) for tile in images]).float()
        turns = SYMMETRIES[self.settings.n_symmetries]
        total: Tensor | None = None
        for k in turns:
            turned = apply_symmetry(image, k)
            with self.fabric.autocast():
                d = self.forward(turned.contiguous(memory_format=self.layout))
            d = undo_symmetry(d.float(), k)
            total = d if total is None else total + d
        assert total is not None  # there is at least one symmetry
        halo = self.settings.halo_px // MAP_STRIDE
        inner = total[:n_tiles, :, halo : total.shape[2] - halo, halo : total.shape[3] - halo]
        return inner / len(turns) if len(turns) > 1 else inner

    def windows(self, visits: list[Visit], inputs: Iterator[Any], say: Callable[[int], object]) -> Iterator[OpenWindow]:
        """Windows, in order, each when its feature map is whole; a forward pass takes tiles of as many as it holds.

        `say` is told how many tiles each pass took.
        """
        waiting: deque[OpenWindow] = deque()
        images: list[Tensor] = []
        for visit in visits:
            waiting.append(OpenWindow(visit, next(inputs) if visit.regions else None))
            for _ in visit.tiles:
                images.append(next(inputs))
                if len(images) == self.batch_size:
                    self._place(images, waiting)
                    say(len(images))
                    images = []
                    yield from _complete(waiting)
            yield from _complete(waiting)
        if images:
            self._place(images, waiting)
            say(len(images))
        yield from waiting

    def _place(self, images: list[Tensor], waiting: deque[OpenWindow]) -> None:
        """Compute some tiles and put them into the windows that wait for them."""
        missing = (there for there in list(waiting) for _ in there.visit.tiles[there.n_tiles :])
        for part, there in zip(self.features(images), missing, strict=False):
            self._put(part, there)

    def whole(self, there: OpenWindow) -> Tensor:
        """D of a window all of whose tiles are there, zero if it needed none, or as it is stored."""
        if there.visit.reuse and self.stored is not None:
            return torch.from_numpy(self.stored.read(there.visit.window)).to(self.device)
        if there.d is None:
            return torch.zeros(self.network.head.in_features, *there.visit.window.shape, device=self.device)
        return there.d

    def _put(self, part: Tensor, there: OpenWindow) -> None:
        window, step = there.visit.window, self.settings.tile_px // MAP_STRIDE
        row, col = (v // MAP_STRIDE for v in there.visit.tiles[there.n_tiles])
        r, c = row - window.row0, col - window.col0
        there.n_tiles += 1
        if part.shape[1:] == window.shape and (r, c) == (0, 0):
            there.d = part
            return
        if there.d is None:
            there.d = torch.zeros(self.network.head.in_features, *window.shape, device=self.device)
        rows, cols = min(step, window.shape[0] - r), min(step, window.shape[1] - c)
        there.d[:, r : r + rows, c : c + cols] = part[:, :rows, :cols]

    def _output(self, *shape: int) -> Tensor | None:
        """Where to put what will be written next; None: torch's own memory, which on a GPU is kept anyway."""
        return self.buffers.take(*shape) if self.device.type == "cpu" else None

    @torch.inference_mode()
    def share_of_features(self, regions: WindowRegions, d: Tensor) -> tuple[Tensor, Tensor]:
        """A window's share of its regions: A D, or A times what the head makes of D, and A 1."""
        if self.copies.gpu:
            regions = regions.moved(self.copies.up)
        rows = d.flatten(1).T
        if not self.head.is_linear:
            rows = self.head(rows)
        found, weight = regions.share(rows)
        if self.pooled or not self.head.is_linear:
            return found.contiguous(), weight
        sums = torch.mm(found, self.head.weight.T, out=self._output(len(found), self.head.n_outputs))
        return sums.addr_(weight, self.head.bias), weight

    @torch.inference_mode()
    def block_values(self, window: Window, block: Block, d: Tensor) -> Tensor:
        """What is shown of a block's D, zero off tissue."""
        row0, row1, col0, col1 = block
        part = d[:, row0 - window.row0 : row1 - window.row0, col0 - window.col0 : col1 - window.col0]
        out = self._output(self.shown.n_outputs, part[0].numel()) if self.shown.is_linear else None
        values = self.shown.columns(part.flatten(1), out=out).view(-1, *part.shape[1:])
        if not self.plan.tissue[row0:row1, col0:col1].all():
            values *= self.tissue[row0:row1, col0:col1]
        return values


def _complete(waiting: deque[OpenWindow]) -> Iterator[OpenWindow]:
    """Take the first windows, as far as all of their tiles are there."""
    while waiting and waiting[0].n_tiles == len(waiting[0].visit.tiles):
        yield waiting.popleft()


_MANY_TILES = 50  # from which on it is worth two more to say how long they take


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


def infer(
    network: Network,
    read: ReadTile,
    plan: RegionPlan,
    *,
    head: Head,
    fabric: Fabric,
    settings: InferSettings,
    blocks: BlockSink | None = None,
    block_px: int | None = None,
    rows: RegionSink | None = None,
    shown: Head | Factors | None = None,
    pooled: bool = False,
    stored: StoredMap | None = None,
    announce: Callable[[int, float | None], None] | None = None,
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
    head
        The network's head, or one for some of its outputs (`Head.select`).
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
    shown
        What blocks hold: values of `head`, which is the default, or D itself.
    pooled
        Sum D over the regions, C columns, and leave W and b to whoever reads the sums; of a linear head only.
    stored
        What is there of the same map already; windows it covers are not computed again, if it has what they need.
    announce
        Told, before the walk, how many tiles will run, and how many seconds one takes (None: not measured, for few).
    show_progress_bar
        Show a bar over the tiles.

    Returns
    -------
    How much was computed and reused.
    """
    step = settings.tile_px // MAP_STRIDE
    visits = plan_visits(plan, window_side(step, block_px), step, blocks, rows, stored)
    shown = head if shown is None else shown
    run = WindowPass(network, read, plan, head, fabric, settings, shown=shown, pooled=pooled, stored=stored)
    total = sum(len(v.tiles) for v in visits)
    with fixed_shapes(fabric.device), kept_memory(fabric.device), run:
        if announce is not None:
            announce(total, run.seconds_per_tile() if total >= _MANY_TILES else None)
        bar = bar_class()(total=total, unit="tile", disable=not show_progress_bar or not total)
        inputs = prefetch(_tasks(run, visits), ahead=max(AHEAD, run.batch_size + 1))
        with bar, Writer(BLOCK_WRITERS) as block_writer, Writer() as row_writer:
            for there in run.windows(visits, inputs, bar.update):
                _walk(run, there, blocks, rows, block_writer, row_writer)
    return Inference(total, sum(v.reuse for v in visits))


def _tasks(run: WindowPass, visits: list[Visit]) -> Iterator[Callable[[], Any]]:
    """What is prepared ahead, in the order in which `_walk` takes it: a window's regions, then its tiles."""
    for visit in visits:
        if visit.regions:
            yield partial(run.window_regions, visit)
        for origin in visit.tiles:
            yield partial(run.tile_image, origin)


def _walk(
    run: WindowPass,
    there: OpenWindow,
    blocks: BlockSink | None,
    rows: RegionSink | None,
    block_writer: Writer,
    row_writer: Writer,
) -> None:
    visit, regions = there.visit, there.regions
    if run.stored is not None and run.reads_values(visit):
        values = torch.from_numpy(run.stored.read(visit.window))
        share = regions.share(values.flatten(1).T) if regions is not None else None
    else:
        d = run.whole(there)
        for block in visit.blocks:
            assert blocks is not None  # blocks are only planned with a sink
            values_down = run.copies.down(run.block_values(visit.window, block, d))
            block_writer.submit(_write_block, blocks, block, values_down, run.buffers)
        share = run.share_of_features(regions, d) if regions is not None else None
    if rows is not None and visit.regions:
        if regions is None or share is None:
            row_writer.submit(rows.put, RegionShare.empty(visit.window, run.n_columns))
        else:
            row_writer.submit(_put, rows, visit.window, regions, *map(run.copies.down, share), run.buffers)


def _write_block(sink: BlockSink, block: Block, values: Callable[[], NDArray[np.float32]], buffers: Buffers) -> None:
    array = values()
    sink.write(block, array)
    buffers.give(array)


def _put(
    sink: RegionSink,
    window: Window,
    regions: WindowRegions,
    sums: Callable[[], NDArray[np.float32]],
    weight: Callable[[], NDArray[np.float32]],
    buffers: Buffers,
) -> None:
    array = sums()
    sink.put(RegionShare(window, regions.index, array, weight().astype(np.float64), regions.complete))
    buffers.give(array)
