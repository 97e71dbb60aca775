"""Held-out blocks: whole, disjoint, and apart from what is trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import lattice

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.engine.train import hold_out_blocks
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Circles

N_A_SIDE = 8


def with_row_numbers(slide_of, *regions: Circles) -> TrainingSlide:
    """Targets tell which region they belong to."""
    return slide_of(*regions, values=[np.arange(len(r), dtype=np.float32)[:, None] for r in regions])


def kept(slide: TrainingSlide, size: int = 0) -> np.ndarray:
    (measured,) = (m for m in slide.measured if m.size_name == f"size{size}")
    return measured.values[:, 0].astype(int)


@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0.02, 0.9), seed=st.integers(0, 1000))
def test_blocks_hold_together(slide_of, fraction: float, seed: int) -> None:
    fine, coarse = lattice(400, 640, 10, 4), lattice(400, 640, 25, 20)
    every = np.concatenate([fine.centre_xy, coarse.centre_xy])
    low, side = every.min(axis=0), np.ptp(every, axis=0).max() / N_A_SIDE

    def block_of(centres: np.ndarray) -> np.ndarray:
        cell = np.minimum((centres - low) // side, N_A_SIDE - 1)
        return (cell[:, 1] * N_A_SIDE + cell[:, 0]).astype(int)

    training, held_out = hold_out_blocks(with_row_numbers(slide_of, fine, coarse), fraction, seed)
    held = np.unique(block_of(fine.centre_xy[kept(held_out)]))
    for size, regions in ((0, fine), (1, coarse)):
        np.testing.assert_array_equal(kept(held_out, size), np.nonzero(np.isin(block_of(regions.centre_xy), held))[0])
        if size < len(training.measured):
            bounds = regions.bounds[kept(training, size)]
            for block in held:
                left, top = low + side * np.array([block % N_A_SIDE, block // N_A_SIDE])
                into = (bounds[:, 2] > left + 1e-6) & (bounds[:, 0] < left + side - 1e-6)
                into &= (bounds[:, 3] > top + 1e-6) & (bounds[:, 1] < top + side - 1e-6)
                assert not into.any()
    occupied = len(np.unique(block_of(every)))
    assert len(held) == min(max(round(fraction * occupied), 1), occupied - 1)


def test_only_regions_at_the_border_are_left_out_of_both(slide_of) -> None:
    regions = lattice(400, 640, 10, 4)
    training, held_out = map(kept, hold_out_blocks(with_row_numbers(slide_of, regions), 0.2, 0))
    lost = np.setdiff1d(np.arange(len(regions)), np.concatenate([training, held_out]))
    nearest = np.abs(regions.centre_xy[lost][:, None] - regions.centre_xy[held_out]).max(axis=2).min(axis=1)
    assert 0 < len(lost) < 0.2 * len(regions)
    assert nearest.max() <= 10


def test_a_size_without_held_out_regions_is_dropped_there(slide_of) -> None:
    slide = with_row_numbers(slide_of, lattice(400, 640, 20, 4), Circles([[1.0, 1.0]], 1.0))
    assert {len(hold_out_blocks(slide, 0.1, seed)[1].measured) for seed in range(12)} == {1, 2}


def test_something_is_left_to_train_on(slide_of) -> None:
    """Two blocks, and regions so large that every one touches the other block."""
    slide = with_row_numbers(slide_of, Circles([[0, 0], [100, 0]], 95.0))
    assert sorted(np.concatenate([kept(part) for part in hold_out_blocks(slide, 0.5, 0)])) == [0, 1]


def test_one_block_cannot_be_split(slide_of) -> None:
    with pytest.raises(PixNetError, match=r"'slide'.* 3 .*validation="):
        hold_out_blocks(with_row_numbers(slide_of, Circles([[5.0, 5.0]] * 3, 2.0)), 0.2, 0)
