"""Batches of tiles: pixels or kept pyramids, operators and targets, made ahead of the network in threads.

Targets of a whole transcriptome stay sparse on the host, and are made dense some outputs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pixnet_sd.engine import N_SYMMETRIES, Tile, TrainingSlide, TrainingTiles
from pixnet_sd.geometry import MAP_STRIDE, Grid, Regions, Window, neighbour_groups
from pixnet_sd.model import Move, Operator, SparseOperator, TiledOperator, build_operator, sharing_pixels

DENSE_OUTPUTS = 1024  # most that are held for all regions of a batch
_BLOCK_BYTES = 2**27
_FEWEST = 64  # outputs that are worth a look of their own

Pyramid: TypeAlias = list[Tensor]  # F_1..F_L of a tile, each (1, C_l, h_l, w_l)
Target: TypeAlias = "Tensor | sparse.csc_matrix"  # (regions, M): dense, or on the host as compressed columns


def block_of(target: Target, outputs: slice, device: torch.device) -> Tensor:
    """Copy the targets of a group of outputs to a device, dense, float32."""
    block = target[:, outputs]
    return (block if isinstance(block, Tensor) else torch.from_numpy(block.toarray().astype(np.float32))).to(device)


def output_blocks(n_outputs: int, n_rows: int, size: int | None = None) -> list[slice]:
    """Cut outputs into groups of a size, by default as many as may be held for so many regions or pixels."""
    if size is None:
        size = n_outputs if n_outputs <= DENSE_OUTPUTS else max(_FEWEST, _BLOCK_BYTES // (4 * max(n_rows, 1)))
    return [slice(start, min(start + size, n_outputs)) for start in range(0, n_outputs, size)]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Tiles of one slide that make a batch (indices into the tiling), and how all of them are turned."""

    tiling: TrainingTiles
    picked: tuple[int, ...]
    symmetry: int = 0

    @property
    def slide(self) -> TrainingSlide:
        """The slide of all tiles."""
        return self.tiling.slide

    @property
    def tiles(self) -> list[Tile]:
        """The tiles."""
        return [self.tiling.tiles[k] for k in self.picked]


@dataclass(frozen=True, eq=False)
class Batch:
    """Tiles of one slide, all of one size; operators (over the tiles' map pixels) and targets (regions, M) per size.

    `sums` add up neighbouring regions, see `Densities`; None where there are none to add.
    """

    plan: BatchPlan
    image: Tensor | None  # uint8 (b, 3, H, W) of the tiles whose pyramid is not kept; None: there are none
    kept: list[Pyramid | None]  # of each tile; None where its pixels are in the image
    operators: list[Operator]
    targets: list[Target]
    sums: list[Operator | None]

    def moved(self, move: Move) -> Batch:
        """Move all tensors; sparse targets stay until they are asked for."""
        return replace(
            self,
            image=None if self.image is None else move(self.image),
            kept=[None if pyramid is None else [move(level) for level in pyramid] for pyramid in self.kept],
            operators=[operator.moved(move) for operator in self.operators],
            targets=[move(target) if isinstance(target, Tensor) else target for target in self.targets],
            sums=[None if operator is None else operator.moved(move) for operator in self.sums],
        )


def plan_batches(
    tilings: Sequence[TrainingTiles], batch_size: int, rng: np.random.Generator | None = None
) -> list[BatchPlan]:
    """Group tiles into batches of one slide each, every tile once.

    The generator shuffles tiles and batches and draws symmetries; None keeps them in order and unturned.
    """
    plans = []
    for tiling in tilings:
        n = len(tiling.tiles)
        order = np.arange(n) if rng is None else rng.permutation(n)
        for start in range(0, n, batch_size):
            turn = 0 if rng is None else int(rng.integers(N_SYMMETRIES))
            plans.append(BatchPlan(tiling, tuple(order[start : start + batch_size].tolist()), turn))
    if rng is not None:
        rng.shuffle(plans)
    return plans


def tile_operators(plan: BatchPlan, members: Sequence[tuple[NDArray[np.intp], ...]], stride: int) -> list[Operator]:
    """Build, per size, the operators of each tile's `members` side by side; pixels off the slide do not count."""
    slide, per_size = plan.slide, [list[Operator]() for _ in plan.slide.measured]
    for (row0, col0, height, width), of_tile in zip(plan.tiles, members, strict=True):
        grid = Grid(height // stride, width // stride, stride)
        inside = Window(-row0, slide.height - row0, -col0, slide.width - col0)
        to_tile = np.array([[1, 0, -col0], [0, 1, -row0], [0, 0, 1]], np.float64)
        for operators, measured, index in zip(per_size, slide.measured, of_tile, strict=True):
            operators.append(build_operator(measured.regions.subset(index).transform(to_tile), grid, inside=inside))
    n_pixels = sum((height // stride) * (width // stride) for _, _, height, width in plan.tiles)
    return sharing_pixels([TiledOperator(operators).joined() for operators in per_size], n_pixels)


def _sums_of_few(
    regions: Regions, members: Sequence[NDArray[np.intp]], target: Target, least: float
) -> Operator | None:
    """Add up neighbouring regions, of the same tile, that have fewer counts than `least`; None where no region has."""
    totals = target[:, -1].numpy() if isinstance(target, Tensor) else target[:, [-1]].toarray()[:, 0]
    groups, n_groups = [], 0
    for index, total in zip(members, np.split(totals, np.cumsum([len(k) for k in members])[:-1]), strict=True):
        groups.append(n_groups + neighbour_groups(regions.subset(index).centre_xy, total, least))
        n_groups = int(groups[-1].max(initial=n_groups - 1)) + 1
    if n_groups == len(totals):
        return None
    rows, columns, ones = np.concatenate(groups), np.arange(len(totals)), np.ones(len(totals), np.float32)
    matrix = sparse.csr_array((ones, (rows, columns)), shape=(n_groups, len(totals)))
    return SparseOperator(matrix, np.asarray(matrix.sum(axis=1), np.float64))


def make_batch(
    plan: BatchPlan,
    *,
    least_counts: float | None = None,
    kept: Callable[[TrainingSlide, Tile, int], Pyramid | None] | None = None,
    pin: bool = False,
    gradient: bool = True,
) -> Batch:
    """Read a batch's pixels, build its operators and collect its targets.

    `least_counts` is that of the `sums` of regions; None: nothing is added up. `kept` reads a turned tile's kept
    pyramid, instead of its pixels. To pin puts all into page-locked memory, and
    operators into torch's form, differentiable or not: a GPU copies these while it computes.
    """
    members = [plan.tiling.members(tile) for tile in plan.tiles]
    targets: list[Target] = []
    sums: list[Operator | None] = [None] * len(plan.slide.measured)
    for size, (measured, index) in enumerate(zip(plan.slide.measured, zip(*members, strict=True), strict=True)):
        values = measured.values
        if isinstance(values, np.ndarray) or values.shape[1] <= DENSE_OUTPUTS:
            targets.append(_joined([values[k] for k in index], pin=pin))
        else:
            targets.append(sparse.vstack([values.rows(k) for k in index], format="csc"))
        if least_counts is not None:
            sums[size] = _sums_of_few(measured.regions, index, targets[-1], least_counts)
    pyramids = [None if kept is None else kept(plan.slide, tile, plan.symmetry) for tile in plan.tiles]
    image, to_read = None, [t for t, pyramid in zip(plan.tiles, pyramids, strict=True) if pyramid is None]
    if to_read:
        read = [plan.slide.read(t.row0, t.row0 + t.height, t.col0, t.col0 + t.width)[None] for t in to_read]
        image = _joined(read, pin=pin).permute(0, 3, 1, 2)
        image = image if pin else image.contiguous()  # a GPU's layout is that of the pixels
    operators = tile_operators(plan, members, MAP_STRIDE)
    if pin:
        operators = [operator.staged(gradient=gradient, pin=True) for operator in operators]
        sums = [each and each.staged(gradient=gradient, pin=True) for each in sums]
        pyramids = [pyramid and [level.pin_memory() for level in pyramid] for pyramid in pyramids]
    return Batch(plan, image, pyramids, operators, targets, sums)


def _joined(pieces: list[NDArray[Any]], *, pin: bool) -> Tensor:
    """Join arrays end to end, straight into page-locked memory if asked for."""
    if not pin:
        return torch.from_numpy(np.concatenate(pieces))
    shape, dtype = (sum(map(len, pieces)), *pieces[0].shape[1:]), torch.from_numpy(pieces[0]).dtype
    joined = torch.empty(shape, dtype=dtype, pin_memory=True)
    np.concatenate(pieces, out=joined.numpy())
    return joined
