"""The operators equal the literal Eq. 4-5 for every kind of region, in whichever form they come."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.geometry.strategies import KINDS, grid_and_regions, lattices, turned
from tests.model.literal import aggregates, dense_operator, example_map, masks
from torch import Tensor

from pixnet_sd.geometry import Circles, Grid, LabelGrid, Lattice, Regions, Window, squares
from pixnet_sd.model import Operator, TiledOperator, build_operator, count_pixels, sharing_pixels

GRID = Grid(6, 5, 4)  # 24 × 20 px
WIDE = Grid(11, 13, 4)


def dense(operator: Operator, height: int = 11, width: int = 13) -> NDArray[np.float32]:
    """A, (n, height, width), by applying it to every map pixel in turn."""
    return operator.apply(torch.eye(height * width)).numpy().reshape(-1, height, width)


def rows_of(grid: Grid) -> Tensor:
    """Feature rows of an example, (pixels, 3) float32."""
    return example_map(grid).float().flatten(1).T


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=st.data())
def test_operator_is_the_literal_one_and_so_are_its_products(kind: str, data: st.DataObject) -> None:
    grid, regions = data.draw(grid_and_regions(kind))
    operator = build_operator(regions, grid)
    expected, n_px = dense_operator(regions, grid)
    np.testing.assert_allclose(operator.matrix.toarray(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(operator.n_px, n_px, rtol=1e-9, atol=1e-12)
    size = (grid.height * grid.stride, grid.width * grid.stride)
    np.testing.assert_array_equal(count_pixels(regions, *size), masks(regions, *size).sum((1, 2)))
    rows, matrix = rows_of(grid).requires_grad_(), torch.from_numpy(expected)
    upstream = torch.randn(3, len(regions), generator=torch.Generator().manual_seed(1)).T  # not contiguous
    result = operator.apply(rows)
    result.backward(upstream)
    scale = max(1.0, float(matrix.abs().sum(1).max()))
    torch.testing.assert_close(result.detach().double(), matrix @ rows.double(), rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(rows.grad.double(), matrix.T @ upstream.double(), rtol=1e-5, atol=1e-6 * scale)


@settings(deadline=None)
@example(case=(WIDE, Lattice([1], [2], turned(1.2034641, 0.0, (0.00314159, 0.00314159)), 0.57173205)), row=1, col=1)
@given(
    case=grid_and_regions() | lattices(WIDE).map(lambda lattice: (WIDE, lattice)),
    row=st.integers(0, 10),
    col=st.integers(0, 12),
)
def test_windows_add_up_to_the_whole(case: tuple[Grid, Regions], row: int, col: int) -> None:
    grid, regions = case
    whole = build_operator(regions, grid)
    total = np.zeros((len(regions), grid.height, grid.width))
    for row0, row1 in pairwise(sorted({0, row % grid.height, grid.height})):
        for col0, col1 in pairwise(sorted({0, col % grid.width, grid.width})):
            window = Window(row0, row1, col0, col1)
            operator = build_operator(regions, grid, window=window)
            np.testing.assert_allclose(operator.n_px, whole.n_px)
            total[:, row0:row1, col0:col1] += dense(operator, *window.shape)
    np.testing.assert_allclose(total, dense(whole, grid.height, grid.width), atol=2e-4)


def test_pixels_of_a_tall_slide_are_counted_in_strips() -> None:
    labels = LabelGrid(np.arange(40).reshape(8, 5) % 7, np.array([3, 5, 0]), np.diag([2.314, 610.171, 1.0]))
    np.testing.assert_array_equal(count_pixels(labels, 5000, 14), masks(labels, 5000, 14).sum((1, 2)))


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


# Lattices, in closed form


def whole(pitch: float, degrees: float = 0.0, side: int = 6, radius: float | None = None, mirror: int = 1) -> Lattice:
    """All positions of a square lattice inside the wide slide."""
    row, col = (part.ravel() for part in np.mgrid[:side, :side])
    return Lattice(row, col, turned(pitch, np.deg2rad(degrees), (9.137, 8.731), mirror), radius)


@settings(deadline=None)
@given(lattice=lattices(WIDE))
def test_a_lattice_is_the_literal_one(lattice: Lattice) -> None:
    operator = build_operator(lattice, WIDE)
    total, n_px = aggregates(lattice.plain(), example_map(WIDE), WIDE.stride)
    np.testing.assert_allclose(operator.n_px, n_px, rtol=1e-9)
    np.testing.assert_allclose(operator.apply(rows_of(WIDE)), total, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(lattice=lattices(WIDE), cut=st.tuples(*[st.integers(0, 20)] * 4))
def test_pixels_outside_a_box_do_not_count(lattice: Lattice, cut: tuple[int, int, int, int]) -> None:
    inside = Window(cut[0], 44 - cut[1], cut[2], 52 - cut[3])
    spans = lattice.plain().spans(0, 44, 0, 52).clipped(*inside)
    n_px = np.bincount(spans.region, spans.stop - spans.start, len(lattice))
    picked = lattice.subset(np.flatnonzero(n_px))
    operator = build_operator(picked, WIDE, inside=inside, n_px=n_px[n_px > 0])
    np.testing.assert_array_equal(operator.n_px, n_px[n_px > 0])
    np.testing.assert_allclose(dense(operator).sum(axis=(1, 2)), operator.n_px, rtol=1e-4)


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
    "tiles": (TiledOperator([circles, sparse, nothing]).joined(), 3, 8),  # they become one matrix
    "tiles of both forms": (TiledOperator([aligned, sparse]).joined(), 2, 21),
    "tiles of nothing": (TiledOperator([nothing, nothing]).joined(), 2, 8),
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


def test_joined_tiles_take_only_the_pixels_that_they_touch() -> None:
    """What is done to each pixel can be done to those."""
    tiles = TiledOperator([circles, sparse, nothing])
    joined, rows = tiles.joined(), rows_of(WIDE).repeat(3, 1)
    for found, expected in zip(applied(joined, "cpu", 3), applied(tiles, "cpu", 3), strict=True):
        torch.testing.assert_close(found, expected)
    touched = joined.gather(rows)
    assert len(touched) < 0.5 * len(rows)
    torch.testing.assert_close(joined.total(touched.exp()), tiles.apply(rows.exp()))
    assert TiledOperator([aligned, sparse]).joined().gather(rows) is rows


def test_sizes_that_touch_most_pixels_need_the_same() -> None:
    """So that what is done to each is done once: turned bins, which have no separable operator."""
    rows, row_col = rows_of(WIDE).repeat(2, 1), [[each.ravel() for each in np.indices((n, n))] for n in (12, 6)]
    bins = [
        build_operator(Lattice(row, col, turned(bin_px, 0.05, (1, 1))), WIDE)
        for bin_px, (row, col) in zip((4, 8), row_col, strict=True)
    ]
    joined = [TiledOperator([each, each]).joined() for each in bins]
    few = TiledOperator([circles, nothing]).joined()
    for operators in (joined, [TiledOperator([aligned, aligned]).joined(), few]):
        for found, operator in zip(sharing_pixels(operators, len(rows)), operators, strict=True):
            assert found.gather(rows) is rows
            torch.testing.assert_close(found.total(rows), operator.apply(rows))
    for operators in (joined[:1], [few, few]):
        assert sharing_pixels(operators, len(rows)) == operators


@staging
def test_without_a_gradient_there_is_no_transpose_and_rows_of_another_number_are_refused() -> None:
    staged = circles.staged(gradient=False, pin=False)
    assert staged.matrix.backward is None
    torch.testing.assert_close(staged.apply(rows_of(WIDE)), circles.apply(rows_of(WIDE)))
    with pytest.raises(ValueError, match="143 columns cannot multiply 142 rows"):  # torch would read beyond them
        staged.apply(torch.ones(142, 2))


@pytest.mark.gpu
def test_an_operator_that_is_not_staged_works_on_a_gpu() -> None:
    torch.testing.assert_close(applied(circles, "cuda", 1), applied(circles, "cpu", 1), rtol=1e-5, atol=1e-4)
