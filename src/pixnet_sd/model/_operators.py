"""Sparse matrices in torch's form, made on the host and moved to a GPU as they are.

Aggregation operators: what turns feature rows into regions, differentiable, exact, in whichever form is cheapest.

An operator is made by SciPy and can be applied as it is. For a GPU it is staged first, in the thread that made it: put
into torch's compressed rows, with its transpose for the gradient, in page-locked memory, from where `moved` copies it
without anyone waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pixnet_sd.geometry import Float, Int

__all__ = [
    "Move",
    "Operator",
    "SeparableOperator",
    "SparseOperator",
    "StagedMatrix",
    "TiledOperator",
    "aggregate",
    "staged_array",
]

Move = Callable[[Tensor], Tensor]
"""Where a tensor goes: a copy on another device, or itself."""

Rows = tuple[Tensor, Tensor, Tensor]
"""Compressed rows: pointers, columns, values."""


def staged_array(values: NDArray[Any] | Tensor, kind: type[np.generic], *, pin: bool) -> Tensor:
    """An array as a tensor of a type, in page-locked memory if asked for."""
    tensor = torch.from_numpy(np.ascontiguousarray(np.asarray(values), dtype=kind))
    return tensor.pin_memory() if pin else tensor


@dataclass(frozen=True, eq=False)
class StagedMatrix:
    """A constant sparse matrix and, for the gradient, its transpose.

    Attributes
    ----------
    shape
        Rows, columns.
    forward
        The matrix, float32, with 32-bit indices wherever they suffice.
    backward
        The transpose; None: no gradient is asked for.
    """

    shape: tuple[int, int]
    forward: Rows
    backward: Rows | None

    @classmethod
    def of(cls, matrix: sparse.csr_array, *, gradient: bool, pin: bool) -> StagedMatrix:
        """From SciPy's form; see `Operator.staged`."""
        n_rows, n_cols = matrix.shape
        transpose = _rows(matrix.T.tocsr(), pin=pin) if gradient else None
        return cls((n_rows, n_cols), _rows(matrix, pin=pin), transpose)

    def moved(self, move: Move) -> StagedMatrix:
        """The same with every tensor moved."""
        forward, backward = (None if rows is None else _each(rows, move) for rows in (self.forward, self.backward))
        assert forward is not None  # only the transpose may be absent
        return StagedMatrix(self.shape, forward, backward)

    def product(self, x: Tensor) -> Tensor:
        """A @ x, (rows, C) float32; differentiable in x if there is a transpose."""
        if len(x) != self.shape[1]:  # torch would read beyond the end
            raise ValueError(f"A matrix of {self.shape[1]} columns cannot multiply {len(x)} rows.")
        if self._transposed is None:
            return _times(self._matrix, x.detach())
        return _StagedProduct.apply(self._matrix, self._transposed, x)

    @cached_property
    def _matrix(self) -> Tensor:
        return _compressed(self.forward, self.shape)

    @cached_property
    def _transposed(self) -> Tensor | None:
        return None if self.backward is None else _compressed(self.backward, self.shape[::-1])


def _rows(matrix: sparse.csr_array, *, pin: bool) -> Rows:
    kind = np.int32 if max(matrix.nnz, *matrix.shape) <= np.iinfo(np.int32).max else np.int64
    parts = ((matrix.indptr, kind), (matrix.indices, kind), (matrix.data, np.float32))
    pointers, columns, values = (staged_array(part, wanted, pin=pin) for part, wanted in parts)
    return pointers, columns, values


def _each(rows: Rows, move: Move) -> Rows:
    pointers, columns, values = rows
    return move(pointers), move(columns), move(values)


def _compressed(rows: Rows, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*rows, size=shape, check_invariants=False)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    if not matrix.values().numel():
        return x.new_zeros(matrix.shape[0], x.shape[1])
    return matrix @ x


class _StagedProduct(torch.autograd.Function):
    """A @ x for a constant A; the gradient is Aᵀ @ g."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _times(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _times(ctx.transposed, grads[0].contiguous())


Matrix: TypeAlias = "sparse.csr_array | StagedMatrix"


class Operator(Protocol):
    """A = mask · R of some regions over a window of the low-resolution grid."""

    @property
    def n_px(self) -> Float | Tensor:
        """Pixels of each region inside the slide, shape (n,), by which a mean divides. 0: wholly outside."""

    def apply(self, features: Tensor) -> Tensor:
        """A times feature rows: (window rows * window columns, C) float32 -> (n, C) float32, differentiable."""

    def staged(self, *, gradient: bool, pin: bool) -> Operator:
        """The same in torch's form, on the host.

        Parameters
        ----------
        gradient
            Make it differentiable, which takes the transpose.
        pin
            Put it into page-locked memory.
        """

    def moved(self, move: Move) -> Operator:
        """A staged operator with every tensor moved."""


@dataclass(frozen=True, eq=False)
class SparseOperator:
    """Any regions.

    Attributes
    ----------
    matrix
        A, shape (n, window rows * window columns), the weights of a sum over pixels.
    n_px
        See `Operator`.
    """

    matrix: Matrix
    n_px: Float | Tensor

    def apply(self, features: Tensor) -> Tensor:
        """See `Operator.apply`."""
        return aggregate(features, self.matrix)

    def staged(self, *, gradient: bool, pin: bool) -> SparseOperator:
        """See `Operator.staged`."""
        matrix = StagedMatrix.of(self.matrix, gradient=gradient, pin=pin)
        return SparseOperator(matrix, staged_array(self.n_px, np.float32, pin=pin))

    def moved(self, move: Move) -> SparseOperator:
        """See `Operator.moved`."""
        return SparseOperator(_moved(self.matrix, move), move(torch.as_tensor(self.n_px)))


@dataclass(frozen=True, eq=False)
class SeparableOperator:
    """Squares of a lattice whose sides lie along rows and columns: A is the product of two small matrices.

    Attributes
    ----------
    rows, cols
        Weights of lattice rows on the window's rows and of lattice columns on its columns.
    pick
        Place of each region among lattice columns × lattice rows, shape (n,).
    n_px
        See `Operator`.
    """

    rows: Matrix
    cols: Matrix
    pick: Int | Tensor
    n_px: Float | Tensor

    def apply(self, features: Tensor) -> Tensor:
        """See `Operator.apply`."""
        (n_rows, height), (n_cols, width) = self.rows.shape, self.cols.shape
        channels = features.shape[1]
        down = aggregate(features.reshape(height, width * channels), self.rows).view(n_rows, width, channels)
        across = aggregate(down.transpose(0, 1).reshape(width, n_rows * channels), self.cols)
        pick = torch.as_tensor(self.pick, device=features.device)
        return across.view(n_cols * n_rows, channels).index_select(0, pick)

    def staged(self, *, gradient: bool, pin: bool) -> SeparableOperator:
        """See `Operator.staged`."""
        rows, cols = (StagedMatrix.of(matrix, gradient=gradient, pin=pin) for matrix in (self.rows, self.cols))
        pick, n_px = staged_array(self.pick, np.int64, pin=pin), staged_array(self.n_px, np.float32, pin=pin)
        return SeparableOperator(rows, cols, pick, n_px)

    def moved(self, move: Move) -> SeparableOperator:
        """See `Operator.moved`."""
        rows, cols = (_moved(matrix, move) for matrix in (self.rows, self.cols))
        pick, n_px = (move(torch.as_tensor(values)) for values in (self.pick, self.n_px))
        return SeparableOperator(rows, cols, pick, n_px)


@dataclass(frozen=True, eq=False)
class TiledOperator:
    """Operators of several tiles, whose feature rows follow each other.

    Attributes
    ----------
    parts
        One operator a tile; tiles have one size.
    """

    parts: Sequence[Operator]

    @property
    def n_px(self) -> Float | Tensor:
        """See `Operator.n_px`."""
        each = [part.n_px for part in self.parts]
        if isinstance(each[0], Tensor):
            return torch.cat([torch.as_tensor(n_px) for n_px in each])
        return np.concatenate([np.asarray(n_px) for n_px in each])

    def apply(self, features: Tensor) -> Tensor:
        """See `Operator.apply`."""
        tiles = features.chunk(len(self.parts))
        return torch.cat([part.apply(tile) for part, tile in zip(self.parts, tiles, strict=True)])

    def staged(self, *, gradient: bool, pin: bool) -> Operator:
        """See `Operator.staged`; sparse parts become one matrix, as many small products keep a GPU waiting."""
        sparse_parts = [part for part in self.parts if isinstance(part, SparseOperator)]
        if len(sparse_parts) < len(self.parts):
            return TiledOperator([part.staged(gradient=gradient, pin=pin) for part in self.parts])
        whole = SparseOperator(_block_diagonal([part.matrix for part in sparse_parts]), self.n_px)
        return whole.staged(gradient=gradient, pin=pin)

    def moved(self, move: Move) -> TiledOperator:
        """See `Operator.moved`."""
        return TiledOperator([part.moved(move) for part in self.parts])


def _block_diagonal(matrices: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Matrices of one width, each with rows and columns of its own."""
    n_cols = matrices[0].shape[1]
    starts = np.cumsum([0, *(m.nnz for m in matrices)])
    kind = sparse.get_index_dtype(maxval=max(int(starts[-1]), n_cols * len(matrices)))
    columns = [m.indices.astype(kind) + kind(k * n_cols) for k, m in enumerate(matrices)]
    pointers = [np.zeros(1, kind), *((m.indptr[1:] + n).astype(kind) for m, n in zip(matrices, starts, strict=False))]
    parts = [np.concatenate(part) for part in ([m.data for m in matrices], columns, pointers)]
    return sparse.csr_array(tuple(parts), shape=(len(parts[2]) - 1, n_cols * len(matrices)))


def _moved(matrix: Matrix, move: Move) -> StagedMatrix:
    staged = matrix if isinstance(matrix, StagedMatrix) else StagedMatrix.of(matrix, gradient=True, pin=False)
    return staged.moved(move)


class _SparseProduct(torch.autograd.Function):
    """A @ x for a constant A of SciPy, which torch on a CPU would need MKL for; the gradient is Aᵀ @ g."""

    @staticmethod
    def forward(ctx: Any, matrix: sparse.csr_array, x: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _product(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _product(ctx.matrix.T, grads[0])


def _product(matrix: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(matrix @ x.cpu().numpy()).to(x.device)


def aggregate(features: Tensor, matrix: Matrix) -> Tensor:
    """Apply a sparse operator to feature rows, differentiable in the features.

    Parameters
    ----------
    features
        Rows to combine, shape (pixels, C), float32.
    matrix
        Constant sparse operator, shape (regions, pixels); a staged one on the device of the features.

    Returns
    -------
    Shape (regions, C), float32.
    """
    if features.is_cuda and not isinstance(matrix, StagedMatrix):
        staged = StagedMatrix.of(matrix, gradient=features.requires_grad, pin=False)
        matrix = staged.moved(lambda part: part.to(features.device))
    with torch.autocast(features.device.type, enabled=False):
        if isinstance(matrix, StagedMatrix):
            return matrix.product(features.float())
        return _SparseProduct.apply(_single(matrix), features.float())


def _single(matrix: sparse.csr_array) -> sparse.csr_array:
    data: NDArray[np.float32] = matrix.data.astype(np.float32, copy=False)
    return sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)
