"""One pass over a slide: the network where it is needed, the gene map block by block, the regions on the way.

The slide is walked in windows of the map. A window's feature map D is put together from tiles, each read with a halo
as wide as the network can see, so where tiles end leaves no trace. From D the window's blocks of the gene map are
written, and its share of every region's sum is handed on. Memory holds a few windows, whatever the slide.

Three things go on at once: threads read tiles and build operators ahead of the network; the network computes; writers
take what it made. On a GPU, copies in both directions go through page-locked memory and nothing waits for them but
the writers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from pixnet_sd._progress import bar_class
from pixnet_sd.nn.grid import Window
from pixnet_sd.nn.head import Factors, Head
from pixnet_sd.nn.model import MAP_STRIDE, Network

from .batches import AHEAD, prefetch
from .device import fixed_shapes
from .heap import kept_memory
from .region_plan import RegionPlan, WindowRegions
from .sinks import Block, BlockSink, RegionSink, StoredMap
from .slides import ReadTile
from .visits import Visit, plan_visits, window_side
from .window_pass import InferSettings, OpenWindow, WindowPass
from .writer import BLOCK_WRITERS, Buffers, Writer

__all__ = ["Inference", "infer"]

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
            row_writer.submit(_put_nothing, rows, visit.window, run.n_columns)
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
    sink.put(window, regions.index, array, weight().astype(np.float64), regions.complete)
    buffers.give(array)


def _put_nothing(sink: RegionSink, window: Window, n_columns: int) -> None:
    empty = np.empty(0)
    sink.put(window, empty.astype(np.intp), np.empty((0, n_columns), np.float32), empty, empty.astype(bool))
