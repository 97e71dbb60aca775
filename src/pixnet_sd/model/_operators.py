"""Aggregation operators A: what turns feature rows into regions, differentiable and exact.

SciPy makes an operator, which can be applied as it is. For a GPU it is staged in the thread that made it: put into
torch's compressed rows, with its transpose, in page-locked memory, from where `moved` copies it without waiting.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pixnet_sd.geometry import Float, Int

Move = Callable[[Tensor], Tensor]
"""Returns a copy of a tensor on another device, or the tensor itself."""

Rows = list[Tensor]
"""Compressed rows: pointers, columns, values."""


def staged_array(values: NDArray[Any] | Tensor, dtype: type[np.generic], *, pin: bool) -> Tensor:
    """Make a tensor of an array, in page-locked memory if asked for."""
    tensor = torch.from_numpy(np.ascontiguousarray(np.asarray(values), dtype=dtype))
    return tensor.pin_memory() if pin else tensor


@dataclass(frozen=True, eq=False)
class StagedMatrix:
    """A constant float32 sparse matrix of torch, and its transpose where a gradient is asked for."""

    shape: tuple[int, int]
    forward: Rows
    backward: Rows | None

    @classmethod
    def of(cls, matrix: sparse.csr_array, *, gradient: bool, pin: bool) -> StagedMatrix:
        """Stage a matrix of SciPy, see `Operator.staged`; indices have 32 bits wherever they suffice."""
        index = np.int32 if max(matrix.nnz, *matrix.shape) <= np.iinfo(np.int32).max else np.int64

        def rows(csr: sparse.csr_array) -> Rows:
            pieces = ((csr.indptr, index), (csr.indices, index), (csr.data, np.float32))
            return [staged_array(piece, dtype, pin=pin) for piece, dtype in pieces]

        return cls(matrix.shape, rows(matrix), rows(matrix.T.tocsr()) if gradient else None)

    def moved(self, move: Move) -> StagedMatrix:
        """Move every tensor."""
        return StagedMatrix(self.shape, [*map(move, self.forward)], self.backward and [*map(move, self.backward)])

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor | None]:
        """The matrix and its transpose, as torch multiplies them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            make: Any = partial(torch.sparse_csr_tensor, check_invariants=False)
            backward = None if self.backward is None else make(*self.backward, size=self.shape[::-1])
            return make(*self.forward, size=self.shape), backward


Matrix: TypeAlias = "sparse.csr_array | StagedMatrix"


class _Product(torch.autograd.Function):
    """A @ x for a constant A; the gradient is Aᵀ @ g."""

    @staticmethod
    def forward(ctx: Any, matrix: Any, transposed: Any, x: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _times(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _times(ctx.transposed, grads[0].contiguous())


def _times(matrix: Any, x: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor):  # SciPy's: on a CPU torch would need MKL
        return torch.from_numpy(matrix @ x.cpu().numpy()).to(x.device)
    return matrix @ x if matrix.values().numel() else x.new_zeros(matrix.shape[0], x.shape[1])


def _aggregate(features: Tensor, matrix: Matrix) -> Tensor:
    """Multiply feature rows (pixels, C) by a constant matrix, differentiable in the features: (regions, C) float32.

    A staged matrix has to be on the device of the features; without a transpose it gives no gradient.
    """
    if features.is_cuda and not isinstance(matrix, StagedMatrix):
        staged = StagedMatrix.of(matrix, gradient=features.requires_grad, pin=False)
        matrix = staged.moved(lambda tensor: tensor.to(features.device))
    if len(features) != matrix.shape[1]:  # torch would read beyond the end
        raise ValueError(f"A matrix of {matrix.shape[1]} columns cannot multiply {len(features)} rows.")
    with torch.autocast(features.device.type, enabled=False):
        if isinstance(matrix, StagedMatrix):
            forward, backward = matrix.factors
            return _Product.apply(forward, backward, (features.detach() if backward is None else features).float())
        # Not astype of the whole matrix, which copies and sorts its indices.
        data = matrix.data.astype(np.float32, copy=False)
        single = sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)
        return _Product.apply(single, single.T, features.float())


class Operator(ABC):
    """A = mask · R of n regions over a window of the low-resolution grid; its kinds are dataclasses.

    `n_px` are the pixels of each region inside the slide, shape (n,), by which a mean divides. 0: wholly outside.
    """

    n_px: Float | Tensor

    @abstractmethod
    def apply(self, features: Tensor) -> Tensor:
        """Multiply feature rows: (window rows * window columns, C) float32 -> (n, C) float32, differentiable."""

    def gather(self, features: Tensor) -> Tensor:
        """Pick the feature rows that `total` needs, to compute something of each: (window pixels, C) -> (p, C)."""
        return features

    def total(self, rows: Tensor) -> Tensor:
        """Multiply what was computed of gathered rows: (p, C) float32 -> (n, C) float32, differentiable."""
        return self.apply(rows)

    def staged(self, *, gradient: bool, pin: bool) -> Operator:
        """Put into torch's form, on the host: differentiable, and in page-locked memory, if asked for."""
        staged: dict[str, Any] = {
            name: StagedMatrix.of(value, gradient=gradient, pin=pin)
            if isinstance(value, sparse.csr_array)
            else staged_array(value, np.int64 if value.dtype.kind == "i" else np.float32, pin=pin)
            for name, value in vars(self).items()
        }
        return type(self)(**staged)

    def moved(self, move: Move) -> Operator:
        """Move every tensor of a staged operator."""
        staged = vars(self).items()
        return type(self)(**{k: v.moved(move) if isinstance(v, StagedMatrix) else move(v) for k, v in staged})


@dataclass(frozen=True, eq=False)
class SparseOperator(Operator):
    """Operator of any regions: A itself, shape (n, window rows * window columns), the weights of a sum over pixels."""

    matrix: Matrix
    n_px: Float | Tensor

    def apply(self, features: Tensor) -> Tensor:
        return _aggregate(features, self.matrix)


@dataclass(frozen=True, eq=False)
class TouchedOperator(Operator):
    """Operator of regions that touch few pixels of a window, as spots do: A without its empty columns.

    `pixels` are those that it touches, shape (p,), ascending; the matrix has shape (n, p).
    """

    pixels: Int | Tensor
    matrix: Matrix
    n_px: Float | Tensor

    def gather(self, features: Tensor) -> Tensor:
        return features.index_select(0, torch.as_tensor(self.pixels, device=features.device))

    def total(self, rows: Tensor) -> Tensor:
        return _aggregate(rows, self.matrix)

    def apply(self, features: Tensor) -> Tensor:
        return self.total(self.gather(features))

    def of_all_pixels(self, n_pixels: int) -> SparseOperator:
        """Put the empty columns back; before it is staged."""
        assert isinstance(self.matrix, sparse.csr_array)
        columns = np.asarray(self.pixels, self.matrix.indices.dtype)[self.matrix.indices]
        shape = self.matrix.shape[0], n_pixels
        return SparseOperator(sparse.csr_array((self.matrix.data, columns, self.matrix.indptr), shape=shape), self.n_px)


@dataclass(frozen=True, eq=False)
class SeparableOperator(Operator):
    """Operator of lattice squares whose sides lie along rows and columns: A is the product of two small matrices.

    `rows` and `cols` weigh the window's rows for lattice rows and its columns for lattice columns; `pick` is the place
    of each region among lattice columns × lattice rows, shape (n,).
    """

    rows: Matrix
    cols: Matrix
    pick: Int | Tensor
    n_px: Float | Tensor

    def apply(self, features: Tensor) -> Tensor:
        (n_rows, height), (n_cols, width) = self.rows.shape, self.cols.shape
        channels = features.shape[1]
        down = _aggregate(features.reshape(height, width * channels), self.rows).view(n_rows, width, channels)
        across = _aggregate(down.transpose(0, 1).reshape(width, n_rows * channels), self.cols)
        pick = torch.as_tensor(self.pick, device=features.device)
        return across.view(n_cols * n_rows, channels).index_select(0, pick)


@dataclass(frozen=True, eq=False)
class TiledOperator(Operator):
    """One operator a tile, all tiles of one size, whose feature rows follow each other."""

    tiles: Sequence[Operator]

    @property
    def n_px(self) -> Float | Tensor:  # type: ignore[override]
        each = [tile.n_px for tile in self.tiles]
        return torch.cat(each) if isinstance(each[0], Tensor) else np.concatenate(each)  # type: ignore[arg-type]

    def apply(self, features: Tensor) -> Tensor:
        rows = features.chunk(len(self.tiles))
        return torch.cat([tile.apply(own) for tile, own in zip(self.tiles, rows, strict=True)])

    def joined(self) -> Operator:
        """Make one matrix of sparse tiles, as many small products keep a GPU waiting, of the pixels that they touch."""
        sparse_tiles = [tile for tile in self.tiles if isinstance(tile, SparseOperator)]
        if len(sparse_tiles) < len(self.tiles):
            return self
        matrix = _block_diagonal([tile.matrix for tile in sparse_tiles])
        pixels, columns = np.unique(matrix.indices, return_inverse=True)
        shape = matrix.shape[0], len(pixels)
        touched = sparse.csr_array((matrix.data, columns.astype(matrix.indices.dtype), matrix.indptr), shape=shape)
        return TouchedOperator(pixels.astype(np.int64), touched, self.n_px)

    def staged(self, *, gradient: bool, pin: bool) -> Operator:
        return TiledOperator([tile.staged(gradient=gradient, pin=pin) for tile in self.tiles])

    def moved(self, move: Move) -> Operator:
        return TiledOperator([tile.moved(move) for tile in self.tiles])


def sharing_pixels(operators: Sequence[Operator], n_pixels: int) -> list[Operator]:
    """Let all operators need all pixels, where one does or they touch more in all: each is then computed but once."""
    touched = [len(operator.pixels) for operator in operators if isinstance(operator, TouchedOperator)]
    if len(touched) == len(operators) and sum(touched) <= n_pixels:
        return list(operators)
    return [o.of_all_pixels(n_pixels) if isinstance(o, TouchedOperator) else o for o in operators]


def _block_diagonal(matrices: Sequence[sparse.csr_array]) -> sparse.csr_array:
    """Join matrices of one width, each with rows and columns of its own; SciPy's block_diag goes by way of COO."""
    n, n_cols, stacked = len(matrices), matrices[0].shape[1], sparse.vstack(matrices, "csr")
    index = sparse.get_index_dtype(maxval=max(stacked.nnz, n * n_cols))
    columns = stacked.indices + np.repeat(np.arange(n, dtype=index) * index(n_cols), [m.nnz for m in matrices])
    return sparse.csr_array((stacked.data, columns, stacked.indptr), shape=(stacked.shape[0], n * n_cols))
