"""The operators equal the literal Eq. 4-5 for every kind of region."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tests.nn.literal import dense_operator, example_map, masks, resize
from tests.nn.strategies import KINDS, grid_and_regions, grids, regions_on
from torch.nn import functional

from pixnet_sd.geometry import Circles, Grid, LabelGrid, Regions, Window, chunks
from pixnet_sd.geometry._regions import squares
from pixnet_sd.model import _aggregation as aggregation
from pixnet_sd.model import build_operator, count_pixels
from pixnet_sd.model._operators import aggregate

GRID = Grid(6, 5, 4)  # 24 × 20 px


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_operator_is_the_literal_one(kind: str, data: st.DataObject) -> None:
    grid, regions = data.draw(grid_and_regions(kind))
    operator = build_operator(regions, grid)
    expected, n_px = dense_operator(regions, grid)
    np.testing.assert_allclose(operator.matrix.toarray(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(operator.n_px, n_px, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("height", [1, 2])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_grids_of_one_or_two_pixels(height: int, width: int, data: st.DataObject) -> None:
    grid = Grid(height, width, 4)
    regions = data.draw(regions_on(grid))
    expected, _ = dense_operator(regions, grid)
    np.testing.assert_allclose(build_operator(regions, grid).matrix.toarray(), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_windows_add_up_to_the_whole(data: st.DataObject) -> None:
    grid, regions = data.draw(grid_and_regions())
    whole = build_operator(regions, grid)
    cuts = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in (grid.height, grid.width)
    ]
    total = np.zeros((len(regions), grid.height, grid.width))
    for row0, row1 in pairwise(cuts[0]):
        for col0, col1 in pairwise(cuts[1]):
            window = Window(row0, row1, col0, col1)
            part = build_operator(regions, grid, window=window)
            np.testing.assert_array_equal(part.n_px, whole.n_px)
            total[:, row0:row1, col0:col1] += part.matrix.toarray().reshape(-1, *window.shape)
    np.testing.assert_allclose(total.reshape(len(regions), -1), whole.matrix.toarray(), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.booleans(), st.booleans(), st.booleans())
def test_commutes_with_flips_and_right_angles(data: st.DataObject, swap: bool, flip_x: bool, flip_y: bool) -> None:
    grid, regions = data.draw(grid_and_regions())
    height, width = grid.height * grid.stride, grid.width * grid.stride
    matrix = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) if flip_x else np.eye(3)
    matrix = np.array([[1, 0, 0], [0, -1, height], [0, 0, 1]]) @ matrix if flip_y else matrix
    matrix = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]]) @ matrix if swap else matrix
    values = example_map(grid).numpy()
    turned = values[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
    turned = turned.transpose(0, 2, 1) if swap else turned
    before = build_operator(regions, grid)
    after = build_operator(regions.transform(matrix), Grid(*turned.shape[1:], grid.stride))
    np.testing.assert_allclose(after.n_px, before.n_px, rtol=1e-9)
    np.testing.assert_allclose(
        after.matrix @ turned.reshape(3, -1).T, before.matrix @ values.reshape(3, -1).T, rtol=1e-7, atol=1e-7
    )


def test_count_pixels_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "_STRIP_PX", 7)
    labels = LabelGrid(np.arange(40).reshape(8, 5) % 7, np.array([3, 5, 0]), np.diag([6.314, 5.171, 1.0]))
    np.testing.assert_array_equal(count_pixels(labels, 45, 40), masks(labels, 45, 40).sum((1, 2)))


def test_count_pixels_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "chunks", partial(chunks, size=3))
    regions = Circles([[20.3, 256.2], [30.1, 511.7], [10.2, 600.1], [20.0, 90.0]], [17.3, 9.2, 30.7, 0.2])
    np.testing.assert_array_equal(count_pixels(regions, 600, 40), masks(regions, 600, 40).sum((1, 2)))


def test_mean_of_a_constant_is_the_constant() -> None:
    regions = Circles([[10.0, 12.0], [0.0, 0.0], [5.3, 5.1], [19.9, 23.9]], [6.0, 3.0, 0.1, 0.01])
    operator = build_operator(regions, GRID)
    np.testing.assert_allclose(operator.matrix.sum(axis=1) / operator.n_px, 1.0, rtol=1e-12)


def test_no_pixel_centre_inside() -> None:
    """A region between pixel centres: the resized map at its centre, times its area."""
    values = example_map(GRID)
    point = build_operator(Circles([[9.0, 13.0]], 0.3), GRID)
    (total,) = point.matrix @ values.reshape(3, -1).T.numpy()
    between = resize(values, 4)[:, 12:14, 8:10].mean((1, 2)).numpy()  # (9, 13) is where four pixels meet
    np.testing.assert_allclose(total, between * np.pi * 0.3**2, rtol=1e-9)
    np.testing.assert_allclose(point.n_px, np.pi * 0.3**2)


def test_no_area_counts_as_one_pixel() -> None:
    point = build_operator(Circles([[9.0, 14.0]], 0.0), GRID)
    np.testing.assert_allclose(point.matrix.sum(), 1.0)
    np.testing.assert_array_equal(point.n_px, 1.0)


@pytest.mark.parametrize(
    "regions",
    [
        Circles([[-5.0, 10.0], [10.0, 24.4], [10.0, -0.1]], [4.0, 0.3, 0.2]),
        squares([[-5.0, 10.0], [10.0, 24.4], [20.1, 3.0]], 0.6, 0.3),
        LabelGrid(np.array([[7]]), np.array([7]), np.diag([1.0, 1.0, 1.0]) + np.array([[0, 0, 30], [0] * 3, [0] * 3])),
        LabelGrid(np.array([[7]]), np.array([8])),
    ],
    ids=["circles", "squares", "labels", "absent label"],
)
@pytest.mark.filterwarnings("error")
def test_off_the_slide_is_nothing(regions: Regions) -> None:
    operator = build_operator(regions, GRID)
    assert operator.matrix.nnz == 0
    np.testing.assert_array_equal(operator.n_px, 0)


@pytest.mark.parametrize("regions", [Circles(np.empty((0, 2)), []), squares(np.empty((0, 2)), 2.0)])
def test_no_regions(regions: Regions) -> None:
    operator = build_operator(regions, GRID)
    assert operator.matrix.shape == (0, 30)
    assert aggregate(torch.zeros(30, 4), operator.matrix).shape == (0, 4)


def test_only_what_a_region_covers_is_stored() -> None:
    """Holes, and what lies between the parts of a region, take no memory."""
    labels = np.zeros((24, 20), int)
    labels[:, 0], labels[:, 19] = 1, 1
    operator = build_operator(LabelGrid(labels, np.array([1])), Grid(6, 5, 4))
    np.testing.assert_array_equal(np.unique(operator.matrix.indices % 5), [0, 4])


@settings(deadline=None, max_examples=30)
@given(grid_and_regions())
def test_aggregate_and_its_gradient(example: tuple[Grid, Regions]) -> None:
    grid, regions = example
    operator = build_operator(regions, grid)
    features = example_map(grid).reshape(3, -1).T
    upstream = torch.randn(len(regions), 3, generator=torch.Generator().manual_seed(1))
    fast = features.float().requires_grad_()
    result = aggregate(fast, operator.matrix)
    result.backward(upstream)
    dense = torch.from_numpy(operator.matrix.toarray())
    scale = max(1.0, float(dense.abs().sum(1).max()))
    torch.testing.assert_close(result.detach().double(), dense @ features, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(fast.grad.double(), dense.T @ upstream.double(), rtol=1e-5, atol=1e-6 * scale)


def test_aggregate_keeps_float32_under_autocast() -> None:
    operator = build_operator(Circles([[10.0, 12.0]], 6.0), GRID)
    features = example_map(GRID).reshape(3, -1).T.float()
    with torch.autocast("cpu", torch.bfloat16):
        result = aggregate(features.bfloat16(), operator.matrix)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, aggregate(features.bfloat16().float(), operator.matrix), rtol=0, atol=0)


def test_aggregate_warns_of_nothing() -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only at the first call of a process
    operator = build_operator(Circles([[10.0, 12.0]], 6.0), GRID)
    features = torch.ones(30, 2, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            aggregate(features, operator.matrix).sum().backward()
        finally:
            torch.set_warn_always(before)


def test_aggregate_passes_gradients_on_through_views() -> None:
    """Gradients that are not contiguous, to features that are not, as the network has them."""
    operator = build_operator(Circles([[10.0, 12.0], [4.0, 4.0]], 6.0), GRID)
    maps = example_map(GRID).float().requires_grad_()
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    functional.linear(aggregate(maps.flatten(1).T, operator.matrix), weight).T.square().sum().backward()
    dense = torch.from_numpy(operator.matrix.toarray()).float()
    reference = maps.detach().clone().requires_grad_()
    functional.linear(dense @ reference.flatten(1).T, weight).square().sum().backward()
    torch.testing.assert_close(maps.grad, reference.grad, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
def test_aggregate_on_a_gpu() -> None:
    operator = build_operator(Circles([[10.0, 12.0], [4.0, 4.0]], 6.0), GRID)
    results = {}
    for device in ("cpu", "cuda"):
        features = example_map(GRID).reshape(3, -1).T.float().to(device).requires_grad_()
        result = aggregate(features, operator.matrix)
        result.square().sum().backward()
        results[device] = result.detach().cpu(), features.grad.cpu()
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=1e-5, atol=1e-4)


def test_operator_is_sparse_and_in_the_grids_order() -> None:
    operator = build_operator(squares([[10.0, 4.0]], 4.0), GRID)
    assert isinstance(operator.matrix, sparse.csr_array)
    weight = operator.matrix.toarray().reshape(6, 5)
    assert weight[:3, 1:4].sum() == pytest.approx(16)  # rows 2 to 6 and columns 8 to 12 of the slide
    assert weight.sum() == pytest.approx(16)


@settings(deadline=None, max_examples=30)
@given(grids)
def test_the_whole_slide_weighs_every_pixel_alike(grid: Grid) -> None:
    """The resize hands each low-resolution pixel to stride² pixels, at the border too."""
    height, width = grid.height * grid.stride, grid.width * grid.stride
    regions = squares([[width / 2, height / 2]], 2.0 * max(height, width))
    matrix = build_operator(regions, grid).matrix.toarray()
    np.testing.assert_allclose(matrix, grid.stride**2, rtol=1e-9)
