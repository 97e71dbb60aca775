"""Batches of tiles: pixels, aggregation operators and targets, made ahead of the network in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pixnet_sd.nn.aggregation import build_operator
from pixnet_sd.nn.grid import Grid, Window
from pixnet_sd.nn.operators import Operator, TiledOperator
from pixnet_sd.nn.regions import Regions
from pixnet_sd.nn.staged_matrix import Move

from .slides import MeasuredRegions, TrainingSlide
from .targets import DENSE_OUTPUTS, SparseTargets, Target, moved
from .tiling import Tile, TrainingTiles

__all__ = ["AHEAD", "Batch", "BatchPlan", "make_batch", "plan_batches", "prefetch", "tile_regions"]

T = TypeVar("T")

WORKERS = min(max(os.cpu_count() or 1, 2), 8)
"""Threads that read tiles and build operators."""

AHEAD = WORKERS + 1
"""Results that may wait for the network."""


@dataclass(frozen=True)
class BatchPlan:
    """Which tiles of one slide make a batch, and how they are turned.

    Attributes
    ----------
    slide
        Index of the slide.
    tiles
        Indices into its tiles.
    symmetry
        One of the eight, for all of them.
    """

    slide: int
    tiles: tuple[int, ...]
    symmetry: int = 0


@dataclass(frozen=True)
class Batch:
    """Tiles of one slide, all of one size.

    Attributes
    ----------
    plan
        What it was made from.
    image
        uint8, shape (B, 3, H, W); None when pixels were not asked for.
    operators
        Per size, the operator of all regions over the B tiles' map pixels.
    targets
        Per size, shape (regions, M); empty when they were not asked for.
    members
        Per size, indices of the regions among the slide's.
    """

    plan: BatchPlan
    image: Tensor | None
    operators: list[Operator]
    targets: list[Target]
    members: list[NDArray[np.intp]]

    def moved(self, move: Move) -> Batch:
        """The same with pixels, operators and targets moved."""
        image = None if self.image is None else move(self.image)
        operators = [operator.moved(move) for operator in self.operators]
        return replace(self, image=image, operators=operators, targets=[moved(target, move) for target in self.targets])


def plan_batches(
    tiles: list[TrainingTiles], batch_size: int, rng: np.random.Generator | None, n_symmetries: int = 1
) -> list[BatchPlan]:
    """Group tiles into batches of one slide each.

    Parameters
    ----------
    tiles
        Tiles of each slide.
    batch_size
        Most tiles in a batch.
    rng
        Shuffles tiles and batches and draws symmetries; None keeps them in order and unturned.
    n_symmetries
        1 or 8.

    Returns
    -------
    Batches that hold every tile once.
    """
    plans = []
    for slide, found in enumerate(tiles):
        n = len(found.tiles)
        order = np.arange(n) if rng is None else rng.permutation(n)
        for start in range(0, n, batch_size):
            turn = 0 if rng is None else int(rng.integers(n_symmetries))
            plans.append(BatchPlan(slide, tuple(order[start : start + batch_size].tolist()), turn))
    if rng is not None:
        rng.shuffle(plans)
    return plans


def tile_regions(regions: Regions, tile: Tile) -> Regions:
    """Regions in the pixels of a tile."""
    return regions.transform(np.array([[1, 0, -tile.col0], [0, 1, -tile.row0], [0, 0, 1]], np.float64))


def _tile_operator(regions: Regions, tile: Tile, slide: TrainingSlide, stride: int) -> Operator:
    """Operator of a tile's regions; pixels outside the slide do not count."""
    grid = Grid(tile.height // stride, tile.width // stride, stride)
    inside = Window(-tile.row0, slide.height - tile.row0, -tile.col0, slide.width - tile.col0)
    return build_operator(tile_regions(regions, tile), grid, inside=inside)


def _operators(
    slide: TrainingSlide, tiles: list[Tile], members: list[tuple[NDArray[np.intp], ...]], stride: int
) -> list[Operator]:
    """Per size, the tiles' operators side by side: each tile has its own columns."""
    return [
        TiledOperator(
            [
                _tile_operator(measured.regions.subset(inside[size]), tile, slide, stride)
                for tile, inside in zip(tiles, members, strict=True)
            ]
        )
        for size, measured in enumerate(slide.measured)
    ]


def make_batch(
    slide: TrainingSlide,
    found: TrainingTiles,
    plan: BatchPlan,
    stride: int,
    *,
    with_image: bool = True,
    with_targets: bool = True,
    pin: bool = False,
    gradient: bool = True,
) -> Batch:
    """Read a batch's pixels, build its operators and collect its targets.

    Parameters
    ----------
    slide
        The slide.
    found
        Its tiles.
    plan
        Which of them.
    stride
        Working pixels per map pixel.
    with_image
        False leaves the pixels out, for features that are already known.
    with_targets
        False leaves the targets out.
    pin
        Put everything into page-locked memory and operators into torch's form, which a GPU copies while it computes.
    gradient
        Whether such operators are to be differentiable.

    Returns
    -------
    The batch.
    """
    tiles = [found.tiles[t] for t in plan.tiles]
    inside = [found.members(t) for t in plan.tiles]
    members = [np.concatenate(index) for index in zip(*inside, strict=True)]
    targets: list[Target] = []
    if with_targets:
        each = zip(slide.measured, zip(*inside, strict=True), strict=True)
        targets = [_targets(m, index, pin=pin) for m, index in each]
    image = None
    if with_image:
        pixels = [slide.read(t.row0, t.row0 + t.height, t.col0, t.col0 + t.width) for t in tiles]
        image = _joined([part[None] for part in pixels], pin=pin).permute(0, 3, 1, 2)
        image = image if pin else image.contiguous()  # a GPU's layout is that of the pixels
    operators = _operators(slide, tiles, inside, stride)
    if pin:
        operators = [operator.staged(gradient=gradient, pin=True) for operator in operators]
    return Batch(plan, image, operators, targets, members)


def _targets(measured: MeasuredRegions, members: Sequence[NDArray[np.intp]], *, pin: bool) -> Target:
    """Targets of the tiles' regions, one tile's after the other's."""
    values = measured.values
    if isinstance(values, np.ndarray) or values.shape[1] <= DENSE_OUTPUTS:
        return _joined([values[k] for k in members], pin=pin)
    return SparseTargets(sparse.vstack([values.rows(k) for k in members], format="csc"))


def _joined(parts: list[NDArray[Any]], *, pin: bool) -> Tensor:
    """Arrays end to end, put straight into page-locked memory if asked for."""
    if not pin:
        return torch.from_numpy(np.concatenate(parts))
    kind = torch.from_numpy(parts[0]).dtype
    joined = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=kind, pin_memory=True)
    np.concatenate(parts, out=joined.numpy())
    return joined


def prefetch(tasks: Iterable[Callable[[], T]], ahead: int = AHEAD) -> Iterator[T]:
    """Run tasks in threads, a few ahead of the consumer, and yield their results in order.

    Parameters
    ----------
    tasks
        What to run; reading zarr and building operators release the interpreter lock for most of their time.
    ahead
        How many results may wait.

    Yields
    ------
    Results, in the order of the tasks; a task's exception is raised at its place.
    """
    with ThreadPoolExecutor(max_workers=min(ahead, WORKERS)) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
