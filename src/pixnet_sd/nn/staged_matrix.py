"""Sparse matrices in torch's form, made on the host and moved to a GPU as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

__all__ = ["Move", "StagedMatrix", "staged_array"]

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
