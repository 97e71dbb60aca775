from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from pixnet_sd.engine import Tile, TrainingSlide, TrainingTiles, prefetch, training_tiles
from pixnet_sd.engine.train._batches import BatchPlan, make_batch, plan_batches, tile_regions
from pixnet_sd.geometry import Circles, Grid
from pixnet_sd.model import Operator, build_operator

AHEAD = 3


@pytest.fixture(scope="module")
def slide(learnable) -> TrainingSlide:
    return learnable(96, 128, radii=(4.0, 9.0))


@pytest.fixture(scope="module")
def found(slide) -> TrainingTiles:
    return training_tiles(slide, 64)


def on_slide(bounds: np.ndarray, slide: TrainingSlide) -> np.ndarray:
    return (bounds[:, :2] >= 0).all(axis=1) & (bounds[:, 2:] <= (slide.width, slide.height)).all(axis=1)


def dense(operator: Operator, plan: BatchPlan, found: TrainingTiles, stride: int) -> np.ndarray:
    """An operator as a matrix, by applying it to every map pixel in turn."""
    n = sum(found.tiles[t].height * found.tiles[t].width // stride**2 for t in plan.tiles)
    return operator.apply(torch.eye(n)).numpy()


@pytest.mark.parametrize("stride", [4, 8, 32])
def test_operator_is_block_diagonal(slide, found, stride: int) -> None:
    plan = BatchPlan(0, (2, 0, 5))
    batch = make_batch(slide, found, plan, stride)
    for size, measured in enumerate(slide.measured):
        operator = batch.operators[size]
        row = col = 0
        rest = dense(operator, plan, found, stride)
        for t in plan.tiles:
            tile, members = found.tiles[t], found.members(t)[size]
            grid = Grid(tile.height // stride, tile.width // stride, stride)
            alone = build_operator(tile_regions(measured.regions.subset(members), tile), grid)
            rows, cols = slice(row, row + len(members)), slice(col, col + grid.height * grid.width)
            whole = on_slide(measured.regions.bounds[members], slide)
            np.testing.assert_allclose(rest[rows, cols][whole], alone.matrix.toarray()[whole], rtol=1e-5)
            np.testing.assert_array_equal(operator.n_px[rows][whole], alone.n_px[whole])
            rest[rows, cols] = 0
            row, col = rows.stop, cols.stop
        assert rest.shape == (row, col)
        assert not rest.any()


def test_pixels_targets_and_members_go_together(slide, found) -> None:
    plan = BatchPlan(0, (1, 3))
    batch = make_batch(slide, found, plan, 4)
    for picture, t in zip(batch.image, plan.tiles, strict=True):
        row0, col0, height, width = found.tiles[t]
        expected = slide.read(row0, row0 + height, col0, col0 + width)
        np.testing.assert_array_equal(picture.permute(1, 2, 0), expected)
    for size, measured in enumerate(slide.measured):
        members = np.concatenate([found.members(t)[size] for t in plan.tiles])
        np.testing.assert_array_equal(batch.members[size], members)
        np.testing.assert_array_equal(batch.targets[size], measured.values[members])
        assert len(batch.operators[size].n_px) == len(members)


def test_a_size_absent_from_a_tile(slide_of, draw, reader) -> None:
    small, large = Circles([[20, 20], [500, 20]], [3, 3]), Circles([[20, 20]], [20])
    slide = slide_of(small, large, read=reader(draw(64, 512)))
    found = training_tiles(slide, 128)
    empty = next(t for t in range(len(found.tiles)) if not len(found.members(t)[1]))
    batch = make_batch(slide, found, BatchPlan(0, (empty,)), 4)
    assert batch.operators[1].apply(torch.ones(32 * found.tiles[0].height // 4, 2)).shape == (0, 2)
    assert batch.targets[1].shape == (0, 1)
    both = make_batch(slide, found, BatchPlan(0, (empty, 1 - empty)), 4)
    assert len(both.operators[1].n_px) == 1


def test_regions_partly_off_the_slide_count_what_is_inside(slide_of, draw, reader) -> None:
    """A quarter of a circle, half a circle, a whole one, and one that holds no pixel centre."""
    circles = Circles([[0, 0], [50, 0], [50, 44], [30, 30.01]], [9, 9, 9, 0.3])
    slide = slide_of(circles, read=reader(draw(64, 64)), height=64, width=64)
    found = training_tiles(slide, 128)
    (operator,) = make_batch(slide, found, BatchPlan(0, (0,)), 4).operators
    y, x = np.mgrid[:64, :64] + 0.5
    inside = [((x - cx) ** 2 + (y - cy) ** 2 <= 81).sum() for cx, cy in circles.centre_xy[:3]]
    np.testing.assert_array_equal(operator.n_px[:3], inside)
    assert 0 < operator.n_px[3] < 1
    n_columns = found.tiles[0].height * found.tiles[0].width // 16
    np.testing.assert_allclose(operator.apply(torch.ones(n_columns, 1))[:, 0], operator.n_px, rtol=1e-5)


def test_pixels_are_left_out_when_not_asked_for(slide_of) -> None:
    slide = slide_of(Circles([[20, 20]], [3]))  # fails when read
    assert make_batch(slide, training_tiles(slide, 64), BatchPlan(0, (0,)), 4, with_image=False).image is None


def test_lazy_targets_are_asked_for_each_tile_in_ascending_order(slide, found) -> None:
    """What a batch of a slide with targets on disk holds, without ever having them all."""

    class Lazy:
        def __init__(self, values: np.ndarray) -> None:
            self.values, self.shape = values, values.shape

        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            assert (np.diff(index) > 0).all()
            return self.values[index]

    lazy = replace(slide, measured=tuple(replace(m, values=Lazy(m.values)) for m in slide.measured))
    plan = BatchPlan(0, (2, 0, 5))
    one, other = (make_batch(s, training_tiles(s, 64), plan, 4) for s in (lazy, slide))
    for got, expected in zip(one.targets, other.targets, strict=True):
        assert torch.equal(got, expected)


def tiles_of(*numbers: int) -> list[TrainingTiles]:
    return [TrainingTiles(None, [Tile(0, k, 32, 32) for k in range(n)], 2) for n in numbers]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_plans_hold_every_tile_once(seed: int | None) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    plans = plan_batches(tiles_of(7, 1, 4), 3, rng, n_symmetries=8)
    assert sorted((p.slide, t) for p in plans for t in p.tiles) == [
        (slide, t) for slide, n in enumerate((7, 1, 4)) for t in range(n)
    ]
    assert max(len(p.tiles) for p in plans) == 3
    assert {p.symmetry for p in plans} <= set(range(8))


def test_plans_without_chance_are_in_order_and_unturned() -> None:
    assert plan_batches(tiles_of(3, 2), 2, None, n_symmetries=8) == [
        BatchPlan(0, (0, 1)),
        BatchPlan(0, (2,)),
        BatchPlan(1, (0, 1)),
    ]


def test_plans_follow_the_seed() -> None:
    once, again, other = (plan_batches(tiles_of(40), 2, np.random.default_rng(s), 8) for s in (0, 0, 1))
    assert once == again
    assert once != other
    assert len({p.symmetry for p in once}) > 1


def test_prefetch_keeps_the_order() -> None:
    second_done = threading.Event()

    def first() -> int:
        assert second_done.wait(10)  # the first ends last
        return 0

    def second() -> int:
        second_done.set()
        return 1

    assert list(prefetch([first, second, lambda: 2, lambda: 3, lambda: 4])) == [0, 1, 2, 3, 4]


def test_prefetch_of_nothing() -> None:
    assert list(prefetch([])) == []


def test_prefetch_raises_a_tasks_exception_at_its_place() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    results = prefetch([lambda: 0, lambda: 1, fail, lambda: 3])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def endless(started: list[int]) -> Iterator[Callable[[], int]]:
    return (lambda k=k: started.append(k) or k for k in itertools.count())


@pytest.mark.parametrize("ahead", [1, AHEAD])
def test_prefetch_does_not_run_away(ahead: int) -> None:
    started: list[int] = []
    results = prefetch(endless(started), ahead)
    for taken in range(1, 6):
        next(results)
        assert len(started) <= taken + ahead
    results.close()


def test_prefetch_closes_when_the_consumer_stops() -> None:
    started: list[int] = []
    before = threading.active_count()
    results = prefetch(endless(started), AHEAD)
    next(results)
    results.close()
    at_close = len(started)
    assert threading.active_count() == before
    assert len(started) == at_close <= 1 + AHEAD


def test_batches_feed_an_aggregation(slide, found) -> None:
    """The batch's operator on the tiles' own colours gives the regions' mean colours."""
    batch = make_batch(slide, found, BatchPlan(0, tuple(range(len(found.tiles)))), 4)
    colours = torch.nn.functional.avg_pool2d(batch.image.float(), 4).permute(0, 2, 3, 1).reshape(-1, 3)
    for operator, target in zip(batch.operators, batch.targets, strict=True):
        mean = operator.apply(colours).numpy() / operator.n_px[:, None] / 128
        assert np.corrcoef(mean.ravel(), target.numpy().ravel())[0, 1] > 0.95
