from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.engine.train import hold_out_blocks
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Circles

HEIGHT, WIDTH = 400, 640
N_BLOCKS_A_SIDE = 8


def lattice(pitch: float, radius: float) -> Circles:
    y, x = np.mgrid[pitch / 2 : HEIGHT : pitch, pitch / 2 : WIDTH : pitch]
    return Circles(np.stack([x.ravel(), y.ravel()], 1), radius)


def with_row_numbers(slide_of, *regions: Circles) -> TrainingSlide:
    """Targets tell which region they belong to."""
    return slide_of(*regions, values=[np.arange(len(r), dtype=np.float32)[:, None] for r in regions])


def kept(slide: TrainingSlide, size: int) -> np.ndarray:
    (found,) = (m for m in slide.measured if m.size_name == f"size{size}")
    return found.values[:, 0].astype(int)


def block_of(centres: np.ndarray, every: np.ndarray) -> np.ndarray:
    low, side = every.min(axis=0), np.ptp(every, axis=0).max() / N_BLOCKS_A_SIDE
    cell = np.minimum((centres - low) // side, N_BLOCKS_A_SIDE - 1)
    return (cell[:, 1] * N_BLOCKS_A_SIDE + cell[:, 0]).astype(int)


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0.02, 0.9), seed=st.integers(0, 1000))
def test_blocks_hold_together(slide_of, fraction: float, seed: int) -> None:
    fine, coarse = lattice(10, 4), lattice(25, 20)
    every = np.concatenate([fine.centre_xy, coarse.centre_xy])
    low, side = every.min(axis=0), np.ptp(every, axis=0).max() / N_BLOCKS_A_SIDE
    training, held_out = hold_out_blocks(with_row_numbers(slide_of, fine, coarse), fraction, seed)
    held = np.unique(block_of(fine.centre_xy[kept(held_out, 0)], every))
    for size, regions in ((0, fine), (1, coarse)):
        blocks = block_of(regions.centre_xy, every)
        np.testing.assert_array_equal(kept(held_out, size), np.nonzero(np.isin(blocks, held))[0])
        if size < len(training.measured):
            bounds = regions.bounds[kept(training, size)]
            for block in held:
                left, top = low + side * np.array([block % N_BLOCKS_A_SIDE, block // N_BLOCKS_A_SIDE])
                into = (bounds[:, 2] > left + 1e-6) & (bounds[:, 0] < left + side - 1e-6)
                into &= (bounds[:, 3] > top + 1e-6) & (bounds[:, 1] < top + side - 1e-6)
                assert not into.any()
    occupied = len(np.unique(block_of(every, every)))
    assert len(held) == min(max(round(fraction * occupied), 1), occupied - 1)


def test_only_regions_at_the_border_are_left_out_of_both(slide_of) -> None:
    regions = lattice(10, 4)
    training, held_out = hold_out_blocks(with_row_numbers(slide_of, regions), 0.2, 0)
    assert not set(kept(training, 0)) & set(kept(held_out, 0))
    lost = np.setdiff1d(np.arange(len(regions)), np.concatenate([kept(training, 0), kept(held_out, 0)]))
    nearest = np.abs(regions.centre_xy[lost][:, None] - regions.centre_xy[kept(held_out, 0)]).max(axis=2).min(axis=1)
    assert 0 < len(lost) < 0.2 * len(regions)
    assert nearest.max() <= 10


def test_values_stay_with_their_regions(slide_of) -> None:
    regions = lattice(20, 4)
    for part in hold_out_blocks(with_row_numbers(slide_of, regions), 0.3, 1):
        (measured,) = part.measured
        np.testing.assert_array_equal(measured.regions.centre_xy, regions.centre_xy[kept(part, 0)])


def test_deterministic_by_seed(slide_of) -> None:
    slide = with_row_numbers(slide_of, lattice(20, 4))
    once, again, other = (kept(hold_out_blocks(slide, 0.2, seed)[1], 0).tolist() for seed in (5, 5, 6))
    assert once == again != other


def test_a_size_without_held_out_regions_is_dropped_there(slide_of) -> None:
    slide = with_row_numbers(slide_of, lattice(20, 4), Circles([[1.0, 1.0]], 1.0))
    found = [hold_out_blocks(slide, 0.1, seed) for seed in range(12)]
    assert {len(held_out.measured) for _, held_out in found} == {1, 2}


def test_something_is_left_to_train_on(slide_of) -> None:
    """Two blocks, and regions so large that every one touches the other block."""
    slide = with_row_numbers(slide_of, Circles([[0, 0], [100, 0]], 95.0))
    training, held_out = hold_out_blocks(slide, 0.5, 0)
    assert sorted([*kept(training, 0), *kept(held_out, 0)]) == [0, 1]


@pytest.mark.parametrize("centres", [[[5.0, 5.0]], [[5.0, 5.0]] * 3])
def test_one_block_cannot_be_split(slide_of, centres) -> None:
    with pytest.raises(PixNetError, match=rf"'slide' has {len(centres)} measured regions .*validation="):
        hold_out_blocks(with_row_numbers(slide_of, Circles(centres, 2.0)), 0.2, 0)
