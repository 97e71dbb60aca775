from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import eye, from_numpy
from torch.nn.functional import interpolate

from pixnet_sd.engine.predict import RegionPlan, plan_regions, windows_of
from pixnet_sd.geometry import Circles, Grid, Lattice
from pixnet_sd.model import build_operator

GRID = Grid(30, 41, 4)
HEIGHT, WIDTH = 120, 164
WHOLE = max(GRID.height, GRID.width)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """A disk, with a hole."""
    y, x = np.mgrid[: GRID.height, : GRID.width]
    return ((y - 14) ** 2 + (x - 16) ** 2 < 13**2) & ((y - 12) ** 2 + (x - 20) ** 2 > 9)


@pytest.fixture(scope="module")
def circles() -> Circles:
    rng = np.random.default_rng(2)
    anywhere = rng.uniform([-10, -10], [WIDTH + 10, HEIGHT + 10], (60, 2))
    return Circles(anywhere, rng.uniform(0.2, 25, 60))


def mask_of(circle: np.ndarray, radius: float) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (x - circle[0]) ** 2 + (y - circle[1]) ** 2 <= radius**2


def resized(low: np.ndarray) -> np.ndarray:
    """Eq. 4's Resize."""
    full = from_numpy(low.astype(np.float64))[None, None]
    return interpolate(full, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0, 0].numpy()


def test_weight_counts_tissue_or_all_pixels_of_glass(tissue, circles) -> None:
    plan = plan_regions(circles, GRID, tissue, WHOLE)
    seen, weights = resized(tissue), dense(plan, WHOLE).sum(axis=1)
    for k, (centre, radius) in enumerate(zip(circles.centre_xy, circles.radius, strict=True)):
        mask = mask_of(centre, radius)
        if not mask.any():
            continue
        on_tissue = seen[mask].sum()
        assert plan.on_glass[k] == (on_tissue == 0)
        assert weights[k] == pytest.approx(on_tissue if on_tissue else mask.sum(), rel=1e-5)
    assert plan.on_glass.any()
    assert (~plan.on_glass).any()


def test_off_the_slide_and_between_pixel_centres(tissue) -> None:
    circles = Circles([[-50, 50], [40, 40], [160, 2]], [5, 0.2, 0.2])
    plan = plan_regions(circles, GRID, tissue, WHOLE)
    assert plan.n_px.tolist() == [0, 0, 0]
    np.testing.assert_allclose(dense(plan, WHOLE).sum(axis=1), [0, np.pi * 0.04, np.pi * 0.04], rtol=1e-5)
    assert plan.on_glass.tolist() == [True, False, True]


def test_glass_support_is_where_glass_regions_have_weight(tissue, circles) -> None:
    plan = plan_regions(circles, GRID, tissue, WHOLE)
    weight = build_operator(circles.subset(plan.on_glass), GRID).matrix.sum(axis=0).reshape(tissue.shape)
    assert plan.glass_support[weight > 0].all()
    assert plan.glass_support.sum() < 1.6 * (weight > 0).sum()  # boxes, whose corners a circle leaves out
    assert not (plan.glass_support & tissue).any()


def dense(plan: RegionPlan, side: int) -> np.ndarray:
    """Weights of every region on every map pixel, put together from windows."""
    whole = np.zeros((len(plan.regions), GRID.height, GRID.width))
    for window in windows_of(GRID, side):
        found = plan.window(window)
        if found is not None:
            part, weight = found.share(eye(window.shape[0] * window.shape[1]))
            np.testing.assert_allclose(part.sum(dim=1), weight, rtol=1e-5, atol=1e-5)
            place = found.index, slice(window.row0, window.row1), slice(window.col0, window.col1)
            whole[place] += part.numpy().reshape(-1, *window.shape)
    return whole.reshape(len(plan.regions), -1)


@settings(max_examples=12, deadline=None)
@given(plan_side=st.integers(3, 45), side=st.integers(3, 45))
def test_windows_leave_no_trace(tissue, circles, plan_side: int, side: int) -> None:
    one, cut = plan_regions(circles, GRID, tissue, WHOLE), plan_regions(circles, GRID, tissue, plan_side)
    np.testing.assert_array_equal(cut.on_glass, one.on_glass)
    np.testing.assert_array_equal(cut.glass_support, one.glass_support)
    np.testing.assert_allclose(dense(cut, side), dense(one, WHOLE), atol=1e-4)


def test_operator_leaves_glass_out_except_of_glass_regions(tissue, circles) -> None:
    plan = plan_regions(circles, GRID, tissue, WHOLE)
    weights = dense(plan, WHOLE)
    full = build_operator(circles, GRID).matrix.toarray()
    expected = np.where(plan.on_glass[:, None] | tissue.ravel(), full, 0)
    np.testing.assert_allclose(weights, expected, atol=1e-4)


def test_only_regions_near_a_window_are_looked_at(tissue) -> None:
    row, col = (part.ravel() for part in np.mgrid[: HEIGHT // 8, : WIDTH // 8])
    bins = Lattice(row, col, np.diag([8, 8, 1.0])).plain()
    plan = plan_regions(bins, GRID, tissue, WHOLE)
    found = plan.window(next(windows_of(GRID, 4)))
    assert found is not None
    assert 4 <= len(found.index) <= 25


@pytest.mark.parametrize("side", [4, 9, 45])
def test_complete_regions_have_all_their_weight_in_the_window(tissue, circles, side: int) -> None:
    plan = plan_regions(circles, GRID, tissue, WHOLE)
    whole = dense(plan, WHOLE).sum(axis=1)
    n_complete = np.zeros(len(circles), int)
    for window in windows_of(GRID, side):
        found = plan.window(window)
        if found is not None:
            weight = found.share(eye(window.shape[0] * window.shape[1]))[1]
            np.testing.assert_allclose(weight[found.complete], whole[found.index[found.complete]], rtol=1e-5)
            n_complete[found.index[found.complete]] += 1
    assert set(n_complete) <= {0, 1}
    assert n_complete.any()


def test_no_regions(tissue) -> None:
    plan = plan_regions(Circles(np.empty((0, 2)), np.empty(0)), GRID, tissue, 8)
    assert not plan.glass_support.any()
    assert plan.window(GRID.window) is None
