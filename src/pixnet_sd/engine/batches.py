"""Batches of tiles: pixels, aggregation operators and targets, made ahead of the network in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import sparse
from torch import Tensor

from pixnet_sd.nn.aggregation import Grid, Operator, build_operator
from pixnet_sd.nn.regions import Regions, Spans

from .slides import TrainingSlide
from .tiling import Tile, TrainingTiles

__all__ = ["Batch", "BatchPlan", "make_batch", "plan_batches", "prefetch", "tile_regions"]

T = TypeVar("T")

_AHEAD = 3


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
        Per size, shape (regions, M), float32.
    members
        Per size, indices of the regions among the slide's.
    """

    plan: BatchPlan
    image: Tensor | None
    operators: list[Operator]
    targets: list[Tensor]
    members: list[np.ndarray]


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


class _OnSlide:
    """What `build_operator` asks of a tile's regions, without the pixels that lie outside the slide."""

    def __init__(self, regions: Regions, tile: Tile, slide: TrainingSlide) -> None:
        self._regions = tile_regions(regions, tile)
        self._slide = (-tile.row0, slide.height - tile.row0, -tile.col0, slide.width - tile.col0)

    def __len__(self) -> int:
        return len(self._regions)

    def subset(self, index: ArrayLike) -> Regions:
        return self._regions.subset(index)

    def spans(self, *window: int) -> Spans:
        return self._regions.spans(*window).clipped(*self._slide)


def _tile_operator(regions: Regions, tile: Tile, slide: TrainingSlide, stride: int) -> Operator:
    grid = Grid(tile.height // stride, tile.width // stride, stride)
    return build_operator(cast(Regions, _OnSlide(regions, tile, slide)), grid)


def _operators(slide: TrainingSlide, found: TrainingTiles, plan: BatchPlan, stride: int) -> list[Operator]:
    """Per size, the tiles' operators side by side: each tile has its own columns."""
    joined = []
    for size, measured in enumerate(slide.measured):
        parts = [
            _tile_operator(measured.regions.subset(found.members[t][size]), found.tiles[t], slide, stride)
            for t in plan.tiles
        ]
        matrix = sparse.csr_array(sparse.block_diag([p.matrix for p in parts], format="csr"))
        joined.append(Operator(matrix, np.concatenate([p.n_px for p in parts])))
    return joined


def make_batch(
    slide: TrainingSlide, found: TrainingTiles, plan: BatchPlan, stride: int, *, with_image: bool = True
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

    Returns
    -------
    The batch.
    """
    members = [np.concatenate([found.members[t][size] for t in plan.tiles]) for size in range(len(slide.measured))]
    targets = [torch.from_numpy(m.values[index]) for m, index in zip(slide.measured, members, strict=True)]
    image = None
    if with_image:
        tiles = (found.tiles[t] for t in plan.tiles)
        pixels = [slide.read(t.row0, t.row0 + t.height, t.col0, t.col0 + t.width) for t in tiles]
        image = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Batch(plan, image, _operators(slide, found, plan, stride), targets, members)


def prefetch(tasks: Iterable[Callable[[], T]], ahead: int = _AHEAD) -> Iterator[T]:
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
    with ThreadPoolExecutor(max_workers=min(ahead, 2)) as pool:
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
