"""Batches: what is in them belongs together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from pixnet_sd.engine import Tile, TrainingSlide, TrainingTiles, training_tiles
from pixnet_sd.engine.train import BatchPlan, make_batch, plan_batches
from pixnet_sd.geometry import Circles, Grid
from pixnet_sd.model import build_operator


@pytest.fixture(scope="module")
def slide(learnable) -> TrainingSlide:
    return learnable(94, 112, radii=(4.0, 9.0))  # all regions lie inside


@pytest.fixture(scope="module")
def tiling(slide) -> TrainingTiles:
    return training_tiles(slide, 64)


def test_operators_pixels_and_targets_go_together(slide, tiling) -> None:
    """The operator is block diagonal: each tile has its own rows and columns."""
    plan = BatchPlan(tiling, (2, 0, 5))
    batch = make_batch(plan)
    for picture, (row0, col0, height, width) in zip(batch.image, plan.tiles, strict=True):
        np.testing.assert_array_equal(picture.permute(1, 2, 0), slide.read(row0, row0 + height, col0, col0 + width))
    for size, (measured, operator) in enumerate(zip(slide.measured, batch.operators, strict=True)):
        members = [tiling.members(tile)[size] for tile in plan.tiles]
        np.testing.assert_array_equal(batch.targets[size], measured.values[np.concatenate(members)])
        alone = []
        for tile, index in zip(plan.tiles, members, strict=True):
            to_tile = [[1, 0, -tile.col0], [0, 1, -tile.row0], [0, 0, 1]]
            grid = Grid(tile.height // 4, tile.width // 4, 4)
            alone.append(build_operator(measured.regions.subset(index).transform(to_tile), grid))
        expected = sparse.block_diag([one.matrix for one in alone]).toarray()
        np.testing.assert_allclose(operator.apply(torch.eye(expected.shape[1])), expected, rtol=1e-5)
        np.testing.assert_array_equal(operator.n_px, np.concatenate([one.n_px for one in alone]))


def test_a_size_absent_from_a_tile(slide_of, draw, reader) -> None:
    small, large = Circles([[20, 20], [500, 20]], [3, 3]), Circles([[20, 20]], [20])
    tiling = training_tiles(slide_of(small, large, read=reader(draw(64, 512))), 128)
    empty = next(k for k, tile in enumerate(tiling.tiles) if not len(tiling.members(tile)[1]))
    batch = make_batch(BatchPlan(tiling, (empty,)))
    assert batch.operators[1].apply(torch.ones(32 * tiling.tiles[0].height // 4, 2)).shape == (0, 2)
    assert batch.targets[1].shape == (0, 1)
    assert len(make_batch(BatchPlan(tiling, (empty, 1 - empty))).operators[1].n_px) == 1


def test_regions_partly_off_the_slide_count_what_is_inside(slide_of, draw, reader) -> None:
    """A quarter of a circle, half a circle, a whole one, and one that holds no pixel centre."""
    circles = Circles([[0, 0], [50, 0], [50, 44], [30, 30.01]], [9, 9, 9, 0.3])
    tiling = training_tiles(slide_of(circles, read=reader(draw(64, 64)), height=64, width=64), 128)
    (operator,) = make_batch(BatchPlan(tiling, (0,))).operators
    y, x = np.mgrid[:64, :64] + 0.5
    inside = [((x - cx) ** 2 + (y - cy) ** 2 <= 81).sum() for cx, cy in circles.centre_xy[:3]]
    np.testing.assert_array_equal(operator.n_px[:3], inside)
    assert 0 < operator.n_px[3] < 1


class Lazy:
    """Targets on disk, asked for in ascending order, a tile at a time."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape = values, values.shape

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        assert (np.diff(index) > 0).all()
        return self.values[index]

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix(self[index])


@pytest.mark.parametrize("n_outputs", [3, 1100])
def test_targets_on_disk_are_those_in_memory(slide, n_outputs: int) -> None:
    """Of a whole transcriptome they stay sparse."""
    values = [np.random.default_rng(0).poisson(0.1, (len(m.regions), n_outputs)).astype("f4") for m in slide.measured]
    batches = []
    for kind in (np.asarray, Lazy):
        measured = tuple(replace(m, values=kind(v)) for m, v in zip(slide.measured, values, strict=True))
        batches.append(make_batch(BatchPlan(training_tiles(replace(slide, measured=measured), 64), (2, 0, 5))))
    for dense, stored in zip(*(batch.targets for batch in batches), strict=True):
        assert sparse.issparse(stored) == (n_outputs > 1024)
        np.testing.assert_array_equal(stored.toarray() if sparse.issparse(stored) else stored, dense)


@pytest.mark.parametrize("n_outputs", [3, 1100])
def test_sums_of_neighbours_with_few_counts(slide, n_outputs: int) -> None:
    """Every region is in one of them, with others of its tile; nothing is added to enough counts."""
    rng, values = np.random.default_rng(0), []
    for measured, mean in zip(slide.measured, (3, 90), strict=True):
        total = rng.poisson(mean, len(measured.regions))
        values.append(np.concatenate([np.zeros((len(total), n_outputs - 1)), total[:, None]], axis=1).astype("f4"))
    measured = tuple(replace(m, values=Lazy(v)) for m, v in zip(slide.measured, values, strict=True))
    tiling = training_tiles(replace(slide, measured=measured), 64)
    plan = BatchPlan(tiling, (2, 0, 5))
    assert make_batch(plan).sums == [None, None]
    few, many = make_batch(plan, least_counts=20.0).sums
    assert many is None
    matrix = few.apply(torch.eye(few.matrix.shape[1])).numpy()
    np.testing.assert_array_equal(matrix.sum(axis=0), 1)
    members = [tiling.members(tile)[0] for tile in plan.tiles]
    total, tile = values[0][np.concatenate(members), -1], np.repeat(range(3), [len(k) for k in members])
    assert all(len(set(tile[row > 0])) == 1 for row in matrix)
    assert 15 < np.median(matrix @ total) < 25


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_plans_hold_every_tile_once_and_follow_the_seed(seed: int | None) -> None:
    found = [TrainingTiles(None, [Tile(0, k, 32, 32) for k in range(n)], 2) for n in (17, 1, 14)]
    plans, again = (plan_batches(found, 3, None if seed is None else np.random.default_rng(seed)) for _ in range(2))
    every = [(found.index(plan.tiling), k) for plan in plans for k in plan.picked]
    assert sorted(every) == [(slide, k) for slide, n in enumerate((17, 1, 14)) for k in range(n)]
    assert (every == sorted(every)) == (seed is None)
    assert max(len(plan.picked) for plan in plans) == 3
    assert ({plan.symmetry for plan in plans} == {0}) == (seed is None)
    assert [(p.picked, p.symmetry) for p in plans] == [(p.picked, p.symmetry) for p in again]
