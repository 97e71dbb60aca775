"""One pass over a slide: the network where it is needed, blocks of the gene map, the regions' sums on the way.

The slide is walked in windows of the map. A window's feature map D is put together from tiles, each read with a halo
as wide as the network can see, so where tiles end leaves no trace. Memory holds a few windows, whatever the slide.
Threads read tiles and build operators ahead of the network; results leave while later ones are computed. On a GPU,
copies in both directions go through page-locked memory, and only whoever takes a result waits for its copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd._util import bar_class
from pixnet_sd.engine import (
    AHEAD,
    Buffers,
    Copies,
    ReadTile,
    apply_symmetry,
    fixed_shapes,
    freed_memory,
    prefetch,
    two_threads,
    undo_symmetry,
)
from pixnet_sd.geometry import MAP_STRIDE, RegionShare, Window
from pixnet_sd.model import Network

from ._plan import Block, PredictPlan, Visit, WindowRegions

SYMMETRIES = {1: (0,), 4: (0, 2, 4, 6), 8: tuple(range(8))}
"""Which symmetries an average over 1, 4 or 8 takes; the four keep a tile's sides."""

T = TypeVar("T")
Lent = Callable[[], AbstractContextManager[T]]
"""Opened, in any thread, it waits for a value's copy to the host; the value's memory is used again afterwards."""


@dataclass(frozen=True)
class WindowResult:
    """What is computed of one window: blocks of the map as they are asked for, so that few are held at once."""

    window: Window
    blocks: Iterator[tuple[Block, Lent[NDArray[np.float32]]]]  # (channels, rows, columns), zero off tissue
    share: Lent[RegionShare] | None  # None where no regions are asked for, or they were summed before


@dataclass
class _OpenWindow:
    """A window whose tiles are under way; D (C, rows, columns) is zero where no tile is needed."""

    visit: Visit
    regions: WindowRegions | None
    n_tiles: int = 0
    d: Tensor | None = None


class Walk:
    """The walk over the windows of a slide (`PredictPlan.visits`); a context manager, `results` is called inside."""

    def __init__(
        self, network: Network, read: ReadTile, plan: PredictPlan, visits: list[Visit], fabric: Fabric
    ) -> None:
        self._plan, self._visits, self._read, self._fabric, self._tiling = plan, visits, read, fabric, plan.tiling
        self._device, self._copies = fabric.device, Copies(fabric.device)
        self._layout = torch.channels_last if self._copies.gpu else torch.contiguous_format
        self._network = network.to(self._device).to(memory_format=self._layout).eval()
        self._buffers, self._tissue = Buffers(), torch.as_tensor(plan.regions.tissue, device=self._device)
        self._head = plan.head.to(self._device)
        self._shown = self._head if plan.shown is plan.head else plan.shown
        self._contexts = ExitStack()
        self._pool: ThreadPoolExecutor | None = None
        self.batch_size = self._tiling.batch_size  # tiles of a forward pass

    def __enter__(self) -> Self:
        self._contexts.enter_context(fixed_shapes(self._device))
        self._contexts.enter_context(freed_memory(self._device, kept=True))
        self._pool = self._contexts.enter_context(two_threads(self._device))
        self.batch_size = max(self._tiling.batch_size, 2 if self._pool else 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._buffers = Buffers()  # the memory of the old ones goes back with what else was kept
        self._contexts.close()

    @property
    def n_tiles(self) -> int:
        """Tiles that go through the network."""
        return sum(len(visit.tiles) for visit in self._visits)

    def seconds_per_tile(self) -> float:
        """Measure the time that a tile takes in the network, without what is done ahead of it and after it."""
        side = self._tiling.tile_px + 2 * self._tiling.halo_px
        blank = [torch.full((3, side, side), 255, dtype=torch.uint8)] * self.batch_size
        for _ in range(2 if self._copies.gpu else 1):  # there the first warms up
            started = time.perf_counter()
            self._features(blank).flatten()[0].item()
        return (time.perf_counter() - started) / len(blank)

    def results(self, *, show_progress_bar: bool = True) -> Iterator[WindowResult]:
        """Compute the windows, in order; a forward pass takes tiles of as many as it holds."""
        inputs: Iterator[Any] = prefetch(self._tasks(), ahead=max(AHEAD, self.batch_size + 1))
        waiting: deque[_OpenWindow] = deque()
        images: list[Tensor] = []
        n_left = n_tiles = self.n_tiles
        with bar_class()(total=n_tiles, unit="tile", disable=not show_progress_bar or not n_tiles) as bar:
            for visit in self._visits:
                waiting.append(_OpenWindow(visit, next(inputs) if visit.regions else None))
                for _ in visit.tiles:
                    n_left -= 1
                    images.append(next(inputs))
                    if len(images) == self.batch_size or not n_left:
                        self._place(images, waiting)
                        bar.update(len(images))
                        images = []
                        yield from self._whole(waiting)
                yield from self._whole(waiting)

    def _tasks(self) -> Iterator[Callable[[], Any]]:
        """List what is prepared ahead, in the order in which `results` takes it: a window's regions, then its tiles."""
        for visit in self._visits:
            if visit.regions:
                yield partial(self._window_regions, visit)
            for origin in visit.tiles:
                yield partial(self._tile_image, origin)

    def _tile_image(self, origin: tuple[int, int]) -> Tensor:
        """Read a tile with its halo, (3, rows, columns)."""
        row0, col0 = (v - self._tiling.halo_px for v in origin)
        side = self._tiling.tile_px + 2 * self._tiling.halo_px
        image = torch.from_numpy(self._read(row0, row0 + side, col0, col0 + side)).permute(2, 0, 1)
        return image.pin_memory() if self._copies.gpu else image

    def _window_regions(self, visit: Visit) -> WindowRegions | None:
        regions = self._plan.regions.window(visit.window)
        on_gpu = self._copies.gpu and not self._reads_values(visit)
        return regions.staged(pin=True) if regions is not None and on_gpu else regions

    def _reads_values(self, visit: Visit) -> bool:
        """Whether values are read back, which stay on the host; a feature map goes where the head is."""
        return visit.reuse and self._plan.stored is not None and not self._plan.stored.has_features

    def _features(self, images: list[Tensor]) -> Tensor:
        """D of tiles without their halos, (B, C, t, t), float32, averaged over the symmetries."""
        if self._pool is None:
            return self._forward(images)
        return torch.cat(list(self._pool.map(self._forward, [[image] for image in images])))

    @torch.inference_mode()
    def _forward(self, images: list[Tensor]) -> Tensor:
        image = torch.stack([self._copies.up(tile) for tile in images]).float()
        turns = SYMMETRIES[self._tiling.n_symmetries]
        total = torch.zeros(())
        for k in turns:
            turned = apply_symmetry(image, k).contiguous(memory_format=self._layout)
            with self._fabric.autocast():
                d = self._network(turned)
            d = undo_symmetry(d.float(), k)
            total = d if k == turns[0] else total + d
        halo = self._tiling.halo_px // MAP_STRIDE
        inner = total[:, :, halo : total.shape[2] - halo, halo : total.shape[3] - halo]
        return inner / len(turns) if len(turns) > 1 else inner

    def _place(self, images: list[Tensor], waiting: deque[_OpenWindow]) -> None:
        """Compute tiles, and put them into the windows that wait for them."""
        missing = (opened for opened in list(waiting) for _ in opened.visit.tiles[opened.n_tiles :])
        for d, opened in zip(self._features(images), missing, strict=False):
            window, step = opened.visit.window, self._tiling.tile_px // MAP_STRIDE
            row, col = opened.visit.tiles[opened.n_tiles]
            r, c = row // MAP_STRIDE - window.row0, col // MAP_STRIDE - window.col0
            opened.n_tiles += 1
            if d.shape[1:] == window.shape and (r, c) == (0, 0):
                opened.d = d
                continue
            if opened.d is None:
                opened.d = self._zeros(window)
            rows, cols = min(step, window.shape[0] - r), min(step, window.shape[1] - c)
            opened.d[:, r : r + rows, c : c + cols] = d[:, :rows, :cols]

    def _zeros(self, window: Window) -> Tensor:
        return torch.zeros(self._network.head.in_features, *window.shape, device=self._device)

    def _whole(self, waiting: deque[_OpenWindow]) -> Iterator[WindowResult]:
        """Take the first windows, as far as all of their tiles are computed, and make what is wanted of their D."""
        while waiting and waiting[0].n_tiles == len(waiting[0].visit.tiles):
            opened = waiting.popleft()
            visit, values = opened.visit, opened.d
            if visit.reuse and self._plan.stored is not None:
                values = torch.from_numpy(self._plan.stored.read(visit.window))
            if not self._reads_values(visit):
                values = self._zeros(visit.window) if values is None else values.to(self._device)
            assert values is not None
            share = self._share(opened, values) if visit.regions else None
            yield WindowResult(visit.window, self._blocks(visit, values), share)

    def _blocks(self, visit: Visit, d: Tensor) -> Iterator[tuple[Block, Lent[NDArray[np.float32]]]]:
        for block in visit.blocks:
            yield block, partial(self._lend, self._copies.down(self._block_values(visit.window, block, d)))

    @contextmanager
    def _lend(self, wait: Callable[[], NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        array = wait()
        yield array
        self._buffers.give(array)

    def _output(self, *shape: int) -> Tensor | None:  # on a GPU torch keeps its own memory
        return self._buffers.take(*shape) if self._device.type == "cpu" else None

    @torch.inference_mode()
    def _block_values(self, window: Window, block: Block, d: Tensor) -> Tensor:
        """Compute what is shown of a block's D, zero off tissue."""
        assert self._shown is not None  # blocks are only planned with it
        row0, row1, col0, col1 = block
        inner = d[:, row0 - window.row0 : row1 - window.row0, col0 - window.col0 : col1 - window.col0]
        out = self._output(self._shown.n_outputs, inner[0].numel()) if self._shown.is_linear else None
        values = self._shown.columns(inner.flatten(1), out=out).view(-1, *inner.shape[1:])
        if not self._plan.regions.tissue[row0:row1, col0:col1].all():
            values *= self._tissue[row0:row1, col0:col1]
        return values

    def _share(self, opened: _OpenWindow, values: Tensor) -> Lent[RegionShare]:
        """Start to sum a window's values, or its D, over its regions."""
        window, regions = opened.visit.window, opened.regions
        if regions is None:
            return lambda: nullcontext(RegionShare.empty(window, self._plan.n_columns))
        if self._reads_values(opened.visit):
            sums, weight = regions.share(values.flatten(1).T)
        else:
            sums, weight = self._share_of_features(regions, values)
        waits = self._copies.down(sums), self._copies.down(weight)

        @contextmanager
        def lend() -> Iterator[RegionShare]:
            with self._lend(waits[0]) as array:
                yield RegionShare(window, regions.index, array, waits[1]().astype(np.float64), regions.complete)

        return lend

    @torch.inference_mode()
    def _share_of_features(self, regions: WindowRegions, d: Tensor) -> tuple[Tensor, Tensor]:
        """A D, or A times what the head makes of D, and A 1."""
        if self._copies.gpu:
            regions = regions.moved(self._copies.up)
        rows = d.flatten(1).T
        if not self._head.is_linear:
            rows = self._head(rows)
        total, weight = regions.share(rows)
        if self._plan.pooled or not self._head.is_linear:
            return total.contiguous(), weight
        sums = torch.mm(total, self._head.weight.T, out=self._output(len(total), self._head.n_outputs))
        return sums.addr_(weight, self._head.bias), weight
