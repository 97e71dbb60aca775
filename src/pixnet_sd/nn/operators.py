"""Aggregation operators: what turns feature rows into regions, differentiable, exact, in whichever form is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from .regions import Float, Int

__all__ = ["Operator", "SeparableOperator", "SparseOperator", "TiledOperator", "aggregate"]


class Operator(Protocol):
    """A = mask · R of some regions over a window of the low-resolution grid."""

    @property
    def n_px(self) -> Float:
        """Pixels of each region inside the slide, shape (n,), by which a mean divides. 0: wholly outside."""

    def apply(self, features: Tensor) -> Tensor:
        """A times feature rows: (window rows * window columns, C) float32 -> (n, C) float32, differentiable."""


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

    matrix: sparse.csr_array
    n_px: Float

    def apply(self, features: Tensor) -> Tensor:
        """See `Operator.apply`."""
        return aggregate(features, self.matrix)


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

    rows: sparse.csr_array
    cols: sparse.csr_array
    pick: Int
    n_px: Float

    def apply(self, features: Tensor) -> Tensor:
        """See `Operator.apply`."""
        (n_rows, height), (n_cols, width) = self.rows.shape, self.cols.shape
        channels = features.shape[1]
        down = aggregate(features.reshape(height, width * channels), self.rows).view(n_rows, width, channels)
        across = aggregate(down.transpose(0, 1).reshape(width, n_rows * channels), self.cols)
        pick = torch.from_numpy(self.pick).to(features.device)
        return across.view(n_cols * n_rows, channels).index_select(0, pick)


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
    def n_px(self) -> Float:
        """See `Operator.n_px`."""
        return np.concatenate([part.n_px for part in self.parts])

    def apply(self, features: Tensor) -> Tensor:
        """See `Operator.apply`."""
        tiles = features.chunk(len(self.parts))
        return torch.cat([part.apply(tile) for part, tile in zip(self.parts, tiles, strict=True)])


def _product(matrix: Any, x: Tensor) -> Tensor:
    """Sparse matrix times tensor: by torch on CUDA, elsewhere by SciPy, as torch needs MKL and does not know MPS."""
    if not x.is_cuda:
        return torch.from_numpy(matrix @ x.cpu().numpy()).to(x.device)
    entries = matrix.tocoo()
    index, value = (torch.from_numpy(part) for part in (np.stack(entries.coords), entries.data))
    return torch.sparse_coo_tensor(index, value, matrix.shape, device=x.device, check_invariants=False) @ x


class _SparseProduct(torch.autograd.Function):
    """A @ x for a constant sparse A; the gradient is Aᵀ @ g."""

    @staticmethod
    def forward(ctx: Any, matrix: sparse.csr_array, x: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _product(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _product(ctx.matrix.T, grads[0])


def aggregate(features: Tensor, matrix: sparse.csr_array) -> Tensor:
    """Apply a sparse operator to feature rows, differentiable in the features.

    Parameters
    ----------
    features
        Rows to combine, shape (pixels, C), float32.
    matrix
        Constant sparse operator, shape (regions, pixels).

    Returns
    -------
    Shape (regions, C), float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        return _SparseProduct.apply(_single(matrix), features.float())


def _single(matrix: sparse.csr_array) -> sparse.csr_array:
    data: NDArray[np.float32] = matrix.data.astype(np.float32, copy=False)
    return sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)
