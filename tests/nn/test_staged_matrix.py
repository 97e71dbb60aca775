"""Operators in torch's form, on the CPU: what a GPU multiplies with equals what SciPy does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from tests.nn.literal import example_map
from tests.nn.strategies import turned

from pixnet_sd.geometry import Circles, Grid, Lattice
from pixnet_sd.model import Operator, TiledOperator, build_operator
from pixnet_sd.model._operators import SeparableOperator, SparseOperator, StagedMatrix

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() or torch.cuda.is_available()), reason="torch multiplies CSR with MKL or CUDA"
)

GRID = Grid(11, 13, 4)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def bins(degrees: float) -> Lattice:
    row, col = (part.ravel() for part in np.mgrid[:5, :5])
    return Lattice(row, col, turned(5.3, np.deg2rad(degrees), (9.1, 8.7), 1))


def operators() -> dict[str, Operator]:
    circles = build_operator(Circles([[10.0, 12.0], [31.0, 20.0], [-90.0, 0.0]], 6.0), GRID)
    nothing = build_operator(Circles(np.empty((0, 2)), np.empty(0)), GRID)
    aligned, turned_bins = build_operator(bins(0.0), GRID), build_operator(bins(3.0), GRID)
    assert isinstance(aligned, SeparableOperator)
    assert isinstance(turned_bins, SparseOperator)
    return {
        "circles": circles,
        "aligned bins": aligned,
        "turned bins": turned_bins,
        "nothing": nothing,
        "tiles": TiledOperator([circles, turned_bins, nothing]),
        "tiles of both kinds": TiledOperator([aligned, turned_bins]),
        "tiles of nothing": TiledOperator([nothing, nothing]),
    }


def applied(
    operator: Operator, device: str, *, gradient: bool, n_tiles: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = example_map(GRID).float().flatten(1).T.repeat(n_tiles, 1).to(device).requires_grad_(gradient)
    result = operator.apply(rows)
    if gradient:
        weight = torch.linspace(-1, 1, result.numel(), device=device).view_as(result)
        (result * weight).sum().backward()
    return result.detach().cpu(), None if rows.grad is None else rows.grad.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", operators())
def test_a_staged_operator_equals_its_own(kind: str, device: str) -> None:
    operator = operators()[kind]
    n_tiles = len(operator.parts) if isinstance(operator, TiledOperator) else 1
    result, gradient = applied(operator, "cpu", gradient=True, n_tiles=n_tiles)
    staged = operator.staged(gradient=True, pin=device == "cuda").moved(lambda part: part.to(device))
    found, found_gradient = applied(staged, device, gradient=True, n_tiles=n_tiles)
    torch.testing.assert_close(found, result, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(torch.as_tensor(staged.n_px).cpu(), operator.n_px, rtol=1e-6)


def test_tiles_become_one_matrix() -> None:
    staged = operators()["tiles"].staged(gradient=True, pin=False)
    assert isinstance(staged, SparseOperator)
    assert staged.matrix.shape == (3 + 25, 3 * 11 * 13)
    assert {part.dtype for part in staged.matrix.forward} == {torch.int32, torch.float32}


def test_without_a_gradient_there_is_no_transpose() -> None:
    operator = operators()["circles"]
    staged = operator.staged(gradient=False, pin=False)
    assert staged.matrix.backward is None
    found, expected = (applied(each, "cpu", gradient=False)[0] for each in (staged, operator))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["circles", "aligned bins", "tiles of both kinds"])
def test_every_tensor_is_moved(kind: str) -> None:
    moved = []

    def move(part: torch.Tensor) -> torch.Tensor:
        moved.append(part)
        return part.clone()

    staged = operators()[kind].staged(gradient=True, pin=False)
    n_tiles = 2 if kind.startswith("tiles") else 1
    again = staged.moved(move)
    assert len(moved) == {"circles": 7, "aligned bins": 14, "tiles of both kinds": 21}[kind]
    found, expected = (applied(each, "cpu", gradient=True, n_tiles=n_tiles)[0] for each in (again, staged))
    assert torch.equal(found, expected)


def test_rows_of_another_number_are_refused() -> None:
    staged = operators()["circles"].staged(gradient=False, pin=False)
    with pytest.raises(ValueError, match="143 columns cannot multiply 142 rows"):
        staged.apply(torch.ones(142, 2))


def test_a_matrix_without_entries() -> None:
    staged = StagedMatrix.of(sparse.csr_array((4, 6)), gradient=True, pin=False)
    x = torch.ones(6, 2, requires_grad=True)
    staged.product(x).sum().backward()
    assert not x.grad.any()
