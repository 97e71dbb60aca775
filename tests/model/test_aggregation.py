"""The operators equal the literal Eq. 4-5 for every kind of region, in whichever form they come."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.geometry.strategies import KINDS, grid_and_regions, lattices, regions_on, turned
from tests.model.literal import aggregates, dense_operator, example_map, masks, resize
from torch import Tensor
from torch.nn import functional

from pixnet_sd.geometry import Circles, Grid, LabelGrid, Lattice, Regions, Window, squares
from pixnet_sd.model import Operator, TiledOperator, build_operator, count_pixels

GRID = Grid(6, 5, 4)  # 24 × 20 px
WIDE = Grid(11, 13, 4)
SLIDE = Window(0, 44, 0, 52)


def dense(operator: Operator, n_columns: int = 11 * 13) -> NDArray[np.float32]:
    """A, by applying it to every map pixel in turn."""
    return operator.apply(torch.eye(n_columns)).numpy()


def rows_of(grid: Grid) -> Tensor:
    """Feature rows of an example, (pixels, 3) float32."""
    return example_map(grid).float().flatten(1).T


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_operator_is_the_literal_one(kind: str, data: st.DataObject) -> None:
    grid, regions = data.draw(grid_and_regions(kind))
    operator = build_operator(regions, grid)
    expected, n_px = dense_operator(regions, grid)
    np.testing.assert_allclose(operator.matrix.toarray(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(operator.n_px, n_px, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(
        count_pixels(regions, grid.height * grid.stride, grid.width * grid.stride),
        masks(regions, grid.height * grid.stride, grid.width * grid.stride).sum((1, 2)),
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 5)])
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
            operator = build_operator(regions, grid, window=window)
            np.testing.assert_array_equal(operator.n_px, whole.n_px)
            total[:, row0:row1, col0:col1] += operator.matrix.toarray().reshape(-1, *window.shape)
    np.testing.assert_allclose(total.reshape(len(regions), -1), whole.matrix.toarray(), rtol=1e-9, atol=1e-9)


def test_pixels_of_a_tall_slide_are_counted_in_strips() -> None:
    labels = LabelGrid(np.arange(40).reshape(8, 5) % 7, np.array([3, 5, 0]), np.diag([2.314, 610.171, 1.0]))
    np.testing.assert_array_equal(count_pixels(labels, 5000, 14), masks(labels, 5000, 14).sum((1, 2)))


def test_no_pixel_centre_inside() -> None:
    """A region between pixel centres: the resized map at its centre, times its area (1 px² if it has none)."""
    values = example_map(GRID)
    points = build_operator(Circles([[9.0, 13.0]] * 2, [0.3, 0.0]), GRID)
    between = resize(values, 4)[:, 12:14, 8:10].mean((1, 2)).numpy()  # (9, 13) is where four pixels meet
    np.testing.assert_allclose(points.n_px, [np.pi * 0.3**2, 1])
    np.testing.assert_allclose(points.matrix @ values.flatten(1).T.numpy(), np.outer(points.n_px, between), rtol=1e-9)


@pytest.mark.parametrize(
    "regions",
    [
        Circles([[-5.0, 10.0], [10.0, 24.4], [10.0, -0.1]], [4.0, 0.3, 0.2]),
        squares([[-5.0, 10.0], [10.0, 24.4], [20.1, 3.0]], 0.6, 0.3),
        LabelGrid(np.array([[7]]), np.array([7]), np.array([[1.0, 0, 30], [0, 1, 0], [0, 0, 1]])),
        LabelGrid(np.array([[7]]), np.array([8])),
        Circles(np.empty((0, 2)), []),
    ],
    ids=["circles", "squares", "labels", "absent label", "no regions"],
)
@pytest.mark.filterwarnings("error")
def test_off_the_slide_is_nothing(regions: Regions) -> None:
    operator = build_operator(regions, GRID)
    assert operator.matrix.nnz == 0
    np.testing.assert_array_equal(operator.n_px, 0)
    assert operator.apply(torch.zeros(30, 4)).shape == (len(regions), 4)


def test_only_what_a_region_covers_is_stored() -> None:
    """Holes, and what lies between the parts of a region, take no memory."""
    labels = np.zeros((24, 20), int)
    labels[:, 0], labels[:, 19] = 1, 1
    operator = build_operator(LabelGrid(labels, np.array([1])), GRID)
    np.testing.assert_array_equal(np.unique(operator.matrix.indices % 5), [0, 4])


@settings(deadline=None, max_examples=30)
@given(grid_and_regions())
def test_applying_and_its_gradient(example: tuple[Grid, Regions]) -> None:
    grid, regions = example
    operator = build_operator(regions, grid)
    rows = rows_of(grid).requires_grad_()
    upstream = torch.randn(len(regions), 3, generator=torch.Generator().manual_seed(1))
    result = operator.apply(rows)
    result.backward(upstream)
    matrix = torch.from_numpy(operator.matrix.toarray())
    scale = max(1.0, float(matrix.abs().sum(1).max()))
    torch.testing.assert_close(result.detach().double(), matrix @ rows.double(), rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(rows.grad.double(), matrix.T @ upstream.double(), rtol=1e-5, atol=1e-6 * scale)


def test_applying_keeps_float32_under_autocast_and_warns_of_nothing() -> None:
    operator = build_operator(Circles([[10.0, 12.0]], 6.0), GRID)
    rows = rows_of(GRID).bfloat16().requires_grad_()
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only at the first call of a process
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("error")
            result = operator.apply(rows)
            result.sum().backward()
    finally:
        torch.set_warn_always(before)
    assert torch.equal(result, operator.apply(rows.float()))


def test_gradients_pass_through_views() -> None:
    """Gradients that are not contiguous, to features that are not, as the network has them."""
    operator = build_operator(Circles([[10.0, 12.0], [4.0, 4.0]], 6.0), GRID)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    gradients = []
    for apply in (operator.apply, lambda rows: torch.from_numpy(operator.matrix.toarray()).float() @ rows):
        maps = example_map(GRID).float().requires_grad_()
        functional.linear(apply(maps.flatten(1).T), weight).T.square().sum().backward()
        gradients.append(maps.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


# Lattices, in closed form


def whole(pitch: float, degrees: float = 0.0, side: int = 6, radius: float | None = None, mirror: int = 1) -> Lattice:
    """All positions of a square lattice inside the wide slide."""
    row, col = (part.ravel() for part in np.mgrid[:side, :side])
    return Lattice(row, col, turned(pitch, np.deg2rad(degrees), (9.137, 8.731), mirror), radius)


@settings(deadline=None)
@given(lattice=lattices(WIDE))
def test_a_lattice_equals_its_regions_one_by_one(lattice: Lattice) -> None:
    """The closed form equals the general operator and the literal equations."""
    operator, general = build_operator(lattice, WIDE), build_operator(lattice.plain(), WIDE)
    np.testing.assert_allclose(operator.n_px, general.n_px, rtol=1e-12)
    np.testing.assert_allclose(dense(operator), dense(general), atol=1e-5 * max(lattice.reach**2, 1))
    total, n_px = aggregates(lattice.plain(), example_map(WIDE), WIDE.stride)
    np.testing.assert_allclose(operator.n_px, n_px, rtol=1e-9)
    np.testing.assert_allclose(operator.apply(rows_of(WIDE)), total, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@example(lattice=Lattice([1], [2], turned(1.2034641, 0.0, (0.00314159, 0.00314159)), 0.57173205), rows=1, cols=1)
@given(lattice=lattices(WIDE), rows=st.integers(1, 10), cols=st.integers(1, 12))
def test_windows_of_a_lattice_add_up(lattice: Lattice, rows: int, cols: int) -> None:
    expected = dense(build_operator(lattice, WIDE)).reshape(-1, 11, 13)
    total = np.zeros_like(expected)
    n_px = np.maximum(count_pixels(lattice, 44, 52), 1)
    for row0, row1 in ((0, rows), (rows, 11)):
        for col0, col1 in ((0, cols), (cols, 13)):
            window = Window(row0, row1, col0, col1)
            height, width = window.shape
            operator = build_operator(lattice, WIDE, window=window, n_px=n_px)
            total[:, row0:row1, col0:col1] += dense(operator, height * width).reshape(-1, height, width)
    keep = count_pixels(lattice, 44, 52) > 0  # of the others n_px was not given truly
    np.testing.assert_allclose(total[keep], expected[keep], atol=2e-4)


@settings(deadline=None)
@given(lattice=lattices(WIDE), cut=st.tuples(*[st.integers(0, 20)] * 4))
def test_pixels_outside_a_box_do_not_count(lattice: Lattice, cut: tuple[int, int, int, int]) -> None:
    inside = Window(cut[0], 44 - cut[1], cut[2], 52 - cut[3])
    spans = lattice.plain().spans(*SLIDE).clipped(*inside)
    n_px = np.bincount(spans.region, spans.stop - spans.start, len(lattice))
    picked = lattice.subset(np.flatnonzero(n_px))
    operator = build_operator(picked, WIDE, inside=inside, n_px=n_px[n_px > 0])
    np.testing.assert_array_equal(operator.n_px, n_px[n_px > 0])
    np.testing.assert_allclose(dense(operator).sum(axis=1), operator.n_px, rtol=1e-4)


def test_the_form_is_the_cheapest_that_holds() -> None:
    aligned = build_operator(whole(5.0), WIDE)
    assert (aligned.rows.shape, aligned.cols.shape) == ((6, 11), (6, 13))
    # turned, upright, mirrored, circles, and few regions of a large lattice
    others = [whole(5.0, 0.5), whole(5.0, 90), whole(5.0, mirror=-1), whole(5.0, radius=2.3)]
    for lattice in (*others, whole(2.0, side=16).subset([0, 255])):
        assert build_operator(lattice, WIDE).matrix.shape == (len(lattice), 11 * 13)


@pytest.mark.parametrize("lattice", [whole(1.0), whole(5.0, radius=0.3), whole(200.0, side=1), whole(5.0, side=12)])
def test_where_the_closed_form_does_not_hold_the_general_one_does(lattice: Lattice) -> None:
    """Too small, too large, or partly off the slide so that a bin holds no pixel."""
    general = build_operator(lattice.plain(), WIDE)
    assert (build_operator(lattice, WIDE).matrix != general.matrix).nnz == 0


@pytest.mark.parametrize("degrees", [0.0, 0.5])
def test_every_pixel_belongs_to_one_bin(degrees: float) -> None:
    """Neighbours share their sides: a lattice of bins is a partition, also where a side runs through pixel centres."""
    row, col = (part.ravel() for part in np.mgrid[-20:40, -20:40])
    bins = Lattice(row, col, turned(3.0, np.deg2rad(degrees), (0.5, 0.5)))
    operator = build_operator(bins.subset(np.flatnonzero(count_pixels(bins, 44, 52))), WIDE)
    assert operator.n_px.sum() == 44 * 52
    np.testing.assert_allclose(dense(operator).sum(axis=0), 16, rtol=1e-5)


# Staged: in torch's form, as a GPU multiplies


staging = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() or torch.cuda.is_available()), reason="torch multiplies CSR with MKL or CUDA"
)
circles = build_operator(Circles([[10.0, 12.0], [31.0, 20.0], [-90.0, 0.0]], 6.0), WIDE)
nothing = build_operator(Circles(np.empty((0, 2)), np.empty(0)), WIDE)
aligned, sparse = build_operator(whole(5.3), WIDE), build_operator(whole(5.3, 3), WIDE)
# Each with its number of tiles, and of the tensors that it is moved with.
STAGED = {
    "circles": (circles, 1, 7),
    "aligned bins": (aligned, 1, 14),
    "nothing": (nothing, 1, 7),
    "tiles": (TiledOperator([circles, sparse, nothing]), 3, 7),  # they become one matrix
    "tiles of both forms": (TiledOperator([aligned, sparse]), 2, 21),
    "tiles of nothing": (TiledOperator([nothing, nothing]), 2, 7),
}


def applied(operator: Operator, device: str, n_tiles: int) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of a weighted sum of it."""
    rows = rows_of(WIDE).repeat(n_tiles, 1).to(device).requires_grad_()
    result = operator.apply(rows)
    (result * torch.linspace(-1, 1, result.numel(), device=device).view_as(result)).sum().backward()
    return result.detach().cpu(), rows.grad.cpu()


@staging
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", STAGED)
def test_a_staged_operator_equals_its_own(case: str, device: str) -> None:
    operator, n_tiles, n_tensors = STAGED[case]
    moved = []

    def move(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return tensor.to(device, copy=True)

    staged = operator.staged(gradient=True, pin=device == "cuda").moved(move)
    assert len(moved) == n_tensors
    assert {tensor.dtype for tensor in moved} <= {torch.int32, torch.int64, torch.float32}
    torch.testing.assert_close(
        applied(staged, device, n_tiles), applied(operator, "cpu", n_tiles), rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(staged.n_px.cpu(), operator.n_px, rtol=1e-6)


@staging
def test_without_a_gradient_there_is_no_transpose() -> None:
    staged = circles.staged(gradient=False, pin=False)
    assert staged.matrix.backward is None
    torch.testing.assert_close(staged.apply(rows_of(WIDE)), circles.apply(rows_of(WIDE)))


@staging
def test_rows_of_another_number_are_refused() -> None:
    """Beyond them torch would read what is there."""
    with pytest.raises(ValueError, match="143 columns cannot multiply 142 rows"):
        circles.staged(gradient=False, pin=False).apply(torch.ones(142, 2))


@pytest.mark.gpu
def test_an_operator_that_is_not_staged_works_on_a_gpu() -> None:
    torch.testing.assert_close(applied(circles, "cuda", 1), applied(circles, "cpu", 1), rtol=1e-5, atol=1e-4)
