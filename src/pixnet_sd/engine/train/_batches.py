"""Targets of a batch: dense, or, of a whole transcriptome, made dense some outputs at a time.

Batches of tiles: pixels, aggregation operators and targets, made ahead of the network in threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pixnet_sd.engine import MeasuredRegions, Tile, TrainingSlide, TrainingTiles
from pixnet_sd.geometry import Grid, Regions, Window
from pixnet_sd.model import Move, Operator, TiledOperator, build_operator

__all__ = [
    "DENSE_OUTPUTS",
    "Batch",
    "BatchPlan",
    "SparseTargets",
    "Target",
    "block_of",
    "make_batch",
    "moved",
    "output_blocks",
    "plan_batches",
    "tile_regions",
]

DENSE_OUTPUTS = 1024
"""Most outputs that are held for all regions of a batch."""

_BLOCK_BYTES = 2**27
_FEWEST = 64  # outputs that are worth a look of their own


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Targets of n regions as compressed columns, on the host.

    Attributes
    ----------
    columns
        SciPy's CSC matrix, shape (n, M).
    """

    columns: Any

    def __len__(self) -> int:
        return int(self.columns.shape[0])

    def block(self, outputs: slice) -> Tensor:
        """Some outputs, shape (n, outputs), float32."""
        return torch.from_numpy(self.columns[:, outputs].toarray().astype(np.float32, copy=False))


Target: TypeAlias = "Tensor | SparseTargets"


def block_of(target: Target, outputs: slice, device: torch.device) -> Tensor:
    """Some outputs of a target, on a device."""
    found = target.block(outputs) if isinstance(target, SparseTargets) else target[:, outputs]
    return found.to(device)


def moved(target: Target, move: Move) -> Target:
    """A dense target moved; others stay until they are asked for."""
    return target if isinstance(target, SparseTargets) else move(target)


def output_blocks(n_outputs: int, n_rows: int) -> list[slice]:
    """Outputs in groups that are small enough to be looked at together, for so many regions or pixels."""
    size = n_outputs if n_outputs <= DENSE_OUTPUTS else max(_FEWEST, _BLOCK_BYTES // (4 * max(n_rows, 1)))
    return [slice(start, min(start + size, n_outputs)) for start in range(0, n_outputs, size)]


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
