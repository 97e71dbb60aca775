"""The closed forms equal the general operator of the same squares and circles, and the literal equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.nn.literal import aggregates, example_map
from tests.nn.strategies import lattices, turned

from pixnet_sd.geometry import Grid, Lattice, Window
from pixnet_sd.model import Operator, build_operator
from pixnet_sd.model._aggregation import lattice_operator
from pixnet_sd.model._operators import SeparableOperator, SparseOperator

GRID = Grid(11, 13, 4)
SLIDE = GRID.window.times(4)


def dense(operator: Operator, window: Window) -> NDArray[np.float32]:
    """A, by applying it to every map pixel in turn."""
    return operator.apply(torch.eye(window.shape[0] * window.shape[1])).numpy()


def whole(pitch: float, angle: float = 0.0, side: int = 6, radius: float | None = None, mirror: int = 1) -> Lattice:
    """All positions of a square lattice inside the slide."""
    row, col = (part.ravel() for part in np.mgrid[:side, :side])
    return Lattice(row, col, turned(pitch, np.deg2rad(angle), (9.137, 8.731), mirror), radius)


@settings(deadline=None, max_examples=100)
@given(lattice=lattices(GRID))
def test_equals_the_general_operator(lattice: Lattice) -> None:
    found = lattice_operator(lattice, GRID, GRID.window, SLIDE)
    assume(found is not None)
    assert found is not None
    expected = build_operator(lattice.plain(), GRID)
    np.testing.assert_array_equal(found.n_px, expected.n_px)
    scale = max(lattice.reach**2, 1)
    np.testing.assert_allclose(dense(found, GRID.window), dense(expected, GRID.window), atol=1e-5 * scale)


@settings(deadline=None)
@given(data=st.data())
def test_equals_the_literal_equations(data: st.DataObject) -> None:
    lattice = data.draw(lattices(GRID))
    low = example_map(GRID)
    total, n_px = aggregates(lattice.plain(), low, GRID.stride)
    found = build_operator(lattice, GRID)
    np.testing.assert_allclose(found.n_px, n_px, rtol=1e-9)
    rows = low.float().flatten(1).T.contiguous()
    np.testing.assert_allclose(found.apply(rows), total, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@example(lattice=Lattice([1], [2], turned(1.2034641, 0.0, (0.00314159, 0.00314159)), 0.57173205), rows=1, cols=1)
@given(lattice=lattices(GRID), rows=st.integers(1, 10), cols=st.integers(1, 12))
def test_windows_add_up(lattice: Lattice, rows: int, cols: int) -> None:
    expected = dense(build_operator(lattice, GRID), GRID.window).reshape(-1, 11, 13)
    total = np.zeros_like(expected)
    for row0, row1 in ((0, rows), (rows, 11)):
        for col0, col1 in ((0, cols), (cols, 13)):
            window = Window(row0, row1, col0, col1)
            part = dense(build_operator(lattice, GRID, window=window, n_px=np.ones(len(lattice))), window)
            total[:, row0:row1, col0:col1] += part.reshape(-1, *window.shape)
    spans = lattice.plain().spans(*SLIDE)
    keep = (
        np.bincount(spans.region, spans.stop - spans.start, len(lattice)) > 0
    )  # of the others n_px was not given truly
    np.testing.assert_allclose(total[keep], expected[keep], atol=2e-4)


@settings(deadline=None)
@given(lattice=lattices(GRID), cut=st.tuples(*[st.integers(0, 20)] * 4))
def test_pixels_outside_a_box_do_not_count(lattice: Lattice, cut: tuple[int, int, int, int]) -> None:
    inside = Window(cut[0], 44 - cut[1], cut[2], 52 - cut[3])
    spans = lattice.plain().spans(*SLIDE).clipped(*inside)
    n_px = np.bincount(spans.region, spans.stop - spans.start, len(lattice))
    found = lattice_operator(lattice.subset(np.flatnonzero(n_px)), GRID, GRID.window, inside)
    if found is not None:
        np.testing.assert_array_equal(found.n_px, n_px[n_px > 0])
        np.testing.assert_allclose(dense(found, GRID.window).sum(axis=1), found.n_px, rtol=1e-4)
    else:
        assert not n_px.any() or min(lattice.pitch, 2 * (lattice.radius or lattice.pitch)) < 1.5


def test_aligned_squares_are_two_small_matrices() -> None:
    found = build_operator(whole(5.0), GRID)
    assert isinstance(found, SeparableOperator)
    assert found.rows.shape == (6, 11)
    assert found.cols.shape == (6, 13)


@pytest.mark.parametrize("lattice", [whole(5.0, 0.5), whole(5.0, 90), whole(5.0, mirror=-1), whole(5.0, radius=2.3)])
def test_others_are_sparse(lattice: Lattice) -> None:
    assert isinstance(build_operator(lattice, GRID), SparseOperator)


def test_few_regions_of_a_large_lattice_are_sparse() -> None:
    scattered = whole(2.0, side=16).subset([0, 255])
    assert isinstance(build_operator(scattered, GRID), SparseOperator)


@pytest.mark.parametrize("lattice", [whole(1.0), whole(5.0, radius=0.3), whole(200.0, side=1), whole(5.0, side=12)])
def test_where_the_closed_form_does_not_hold_the_general_way_is_gone(lattice: Lattice) -> None:
    """Too small, too large, or partly off the slide so that a bin holds no pixel."""
    assert lattice_operator(lattice, GRID, GRID.window, SLIDE) is None
    general = build_operator(lattice.plain(), GRID)
    np.testing.assert_allclose(
        dense(build_operator(lattice, GRID), GRID.window), dense(general, GRID.window), atol=1e-4
    )


@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_every_pixel_belongs_to_one_bin(angle: float) -> None:
    """Neighbours share their sides: a lattice of bins is a partition, also where a side runs through pixel centres."""
    row, col = (part.ravel() for part in np.mgrid[-20:40, -20:40])
    bins = Lattice(row, col, turned(3.0, np.deg2rad(angle), (0.5, 0.5)))
    inner = bins.subset(bins.touching(-2, -2, 60, 50))
    on_slide = inner.subset(np.flatnonzero([len(inner.subset([k]).spans(*SLIDE).row) > 0 for k in range(len(inner))]))
    found = lattice_operator(on_slide, GRID, GRID.window, SLIDE)
    assert found is not None
    assert found.n_px.sum() == 44 * 52
    np.testing.assert_allclose(dense(found, GRID.window).sum(axis=0), 16, rtol=1e-5)


@pytest.mark.parametrize("lattice", [whole(5.0), whole(5.0, 0.5)])
def test_gradients(lattice: Lattice) -> None:
    found = build_operator(lattice, GRID)
    features = torch.randn(11 * 13, 4, requires_grad=True)
    weight = torch.randn(len(lattice), 4)
    (found.apply(features) * weight).sum().backward()
    expected = torch.from_numpy(dense(found, GRID.window)).T @ weight
    torch.testing.assert_close(features.grad, expected, rtol=1e-4, atol=1e-4)
