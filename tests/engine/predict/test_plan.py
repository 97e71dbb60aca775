"""Operators of regions, window by window, against those of the whole slide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import eye

from pixnet_sd.engine.predict import plan_regions, windows_of
from pixnet_sd.geometry import Circles, Grid, Lattice
from pixnet_sd.model import build_operator

GRID = Grid(30, 41, 4)
HEIGHT, WIDTH = 120, 164


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """A disk, with a hole."""
    y, x = np.mgrid[: GRID.height, : GRID.width]
    return ((y - 14) ** 2 + (x - 16) ** 2 < 13**2) & ((y - 12) ** 2 + (x - 20) ** 2 > 9)


@pytest.fixture(scope="module")
def circles() -> Circles:
    """Anywhere, off the slide, between pixel centres on tissue and on glass, and on glass with tissue in its box."""
    rng = np.random.default_rng(2)
    anywhere = rng.uniform([-10, -10, 0.2], [WIDTH + 10, HEIGHT + 10, 25], (60, 3))
    x, y, radius = np.concatenate([anywhere, [[-50, 50, 5], [40, 40, 0.2], [160, 2, 0.2], [121, 113, 20]]]).T
    return Circles(np.stack([x, y], 1), radius)


@settings(max_examples=12, deadline=None)
@given(side=st.integers(3, 45))
def test_windows_leave_no_trace(tissue, circles, side: int) -> None:
    """Together they weigh tissue, and glass exactly nothing; one has all the weight of what it completes."""
    plan, full = plan_regions(circles, GRID, tissue), build_operator(circles, GRID).matrix.toarray()
    expected = np.where(tissue.ravel(), full, 0)
    on_tissue = expected.any(axis=1)
    assert 0 < on_tissue.sum() < len(circles)
    found = np.zeros((len(circles), *tissue.shape))
    n_windows, n_complete = np.zeros((2, len(circles)), int)
    for window in windows_of(GRID, side):
        regions = plan.window(window)
        if regions is None:
            continue
        part, weight = regions.share(eye(window.shape[0] * window.shape[1]))
        np.testing.assert_allclose(part.sum(dim=1), weight, rtol=1e-5, atol=1e-5)
        place = regions.index, slice(window.row0, window.row1), slice(window.col0, window.col1)
        found[place] += part.numpy().reshape(-1, *window.shape)
        n_windows[regions.index[part.numpy().any(axis=1)]] += 1
        complete = regions.index[regions.complete]
        np.testing.assert_allclose(weight[regions.complete], expected[complete].sum(axis=1), rtol=1e-5)
        n_complete[complete] += 1
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)
    np.testing.assert_array_equal(found.any(axis=(1, 2)), on_tissue)
    assert [plan_regions(circles.subset([k]), GRID, tissue).has_tissue(side) for k in range(-9, 0)] == [*on_tissue[-9:]]
    assert (n_complete <= (n_windows <= 1)).all()
    assert n_complete.sum() >= (1 if side >= GRID.width else 0.3) * (n_windows == 1).sum()  # by their boxes


def test_only_regions_near_a_window_are_looked_at(tissue) -> None:
    row, col = (part.ravel() for part in np.mgrid[: HEIGHT // 8, : WIDTH // 8])
    bins = Lattice(row, col, np.diag([8, 8, 1.0])).plain()
    near, *_, far = windows_of(GRID, 4)
    assert 4 <= len(plan_regions(bins, GRID, tissue).window(near).index) <= 25
    assert plan_regions(bins.subset([0]), GRID, tissue).window(far) is None
