"""Count matrices of any kind, in memory or on disk, read in blocks of rows, and their log-normalisation.

Regions may have their rows in any order: blocks come in the order of the matrix, each with its place among the regions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError
from pixnet_sd.slide.image import GuardedArray

Place: TypeAlias = slice | NDArray[np.integer]  # where the rows of a block are among all rows

_BLOCK_VALUES = 2**25  # of a block made dense: 128 MiB in 32 bits
_STORED_SHARE = 8  # so many times fewer stored values in a sparse block: they have columns, and copies while worked on
_LOOK_AHEAD = 2**18  # rows whose pointers are looked at for the end of a sparse block
_MANY_STORED = 2**26
_PIECE_BYTES = 2**24


class _CompressedRows:
    """Compressed rows on disk; AnnData's own handle keeps the pointers of all rows in memory."""

    def __init__(self, group: Any, shape: tuple[int, int]) -> None:
        self.indptr, self._indices, self._data = (GuardedArray(group[name]) for name in ("indptr", "indices", "data"))
        self.shape, self.dtype = shape, self._data.dtype

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        indptr = np.asarray(self.indptr[rows.start : rows.stop + 1]).astype(np.int64)
        start, stop = int(indptr[0]), int(indptr[-1])
        indices = np.asarray(self._indices[start:stop]).astype(np.int32, copy=False)
        arrays = (_widened(np.asarray(self._data[start:stop])), indices, (indptr - start).astype(np.int32))
        return sparse.csr_matrix(arrays, shape=(len(indptr) - 1, self.shape[1]))


@dataclass(frozen=True, eq=False)
class Counts:
    """Raw counts of n regions x G genes, which are never made dense as a whole."""

    matrix: Any  # NumPy, SciPy sparse, dask, or compressed rows on disk
    rows: NDArray[np.integer]  # row of `matrix` of each region, in any order, shape (n,)
    files: Path | None = None  # folder of a matrix on disk
    genes: NDArray[np.integer] | None = None  # columns that are genes, ascending, shape (G,); None for all
    is_half: bool = False  # values were stored in 16 bits, which do not hold larger counts

    @classmethod
    def of(cls, matrix: Any, rows: ArrayLike, what: str, files: Path | None = None, genes: Any = None) -> Counts:
        """Wrap the X of a table; compressed columns, of which rows cannot be read, are turned once."""
        if matrix is None:
            raise DataError(f"{what} has no X. Put raw counts there.")
        if matrix.dtype.kind not in "biuf":
            raise DataError(f"{what} has an X of dtype {matrix.dtype}. Put raw counts there, whole numbers or floats.")
        is_half, layout = matrix.dtype == np.float16, getattr(matrix, "format", None)
        is_backed = hasattr(matrix, "group")
        matrix = _widened(matrix) if sparse.issparse(matrix) else matrix
        if layout == "csc":
            matrix = _widened(matrix.to_memory()) if is_backed else matrix
            if matrix.nnz > _MANY_STORED:
                said = "%s: X is stored by columns (CSC), so all of it is loaded. Store it by rows, table.X.tocsr()."
                logger.warning(said, what)
            matrix = matrix.tocsr()
        elif layout == "csr" and is_backed:
            matrix = _CompressedRows(matrix.group, matrix.shape)
        elif isinstance(matrix, zarr.Array):
            matrix = GuardedArray(matrix)
        return cls(matrix, np.asarray(rows), files, genes, is_half)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return int(self.matrix.shape[1]) if self.genes is None else len(self.genes)

    def take(self, index: ArrayLike) -> Counts:
        """Pick regions by a mask or an index, none of them twice."""
        return replace(self, rows=self.rows[np.asarray(index)])

    def order(self) -> NDArray[np.int32] | None:
        """Order the regions by their rows; None where they are in that order."""
        if (self.rows[1:] > self.rows[:-1]).all():
            return None
        return np.argsort(self.rows, kind="stable").astype(np.int32)

    def blocks(self, values: int = _BLOCK_VALUES) -> Iterator[tuple[Place, sparse.csr_matrix]]:
        """Read blocks of at most so many values when dense, in the order of the matrix, no value stored twice."""
        order = self.order()
        rows = self.rows if order is None else self.rows[order]
        start = 0
        while start < len(rows):
            stop = self._stop(rows, start, values)
            yield slice(start, stop) if order is None else order[start:stop], self._read(rows[start:stop])
            start = stop

    def to_csr(self) -> sparse.csr_matrix:
        """Read the counts of all regions, at least one, into memory, in the order of the regions."""
        blocks = [block for _, block in self.blocks()]
        matrix, order = sparse.vstack(blocks, format="csr"), self.order()
        return matrix if order is None else matrix[np.argsort(order)]

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield all that tells these counts from others: files as they are, or values and where they stand."""
        yield np.ascontiguousarray(self.rows).data.cast("B")
        if self.genes is not None:
            yield np.ascontiguousarray(self.genes).data.cast("B")
        if self.files is None:
            for _, block in self.blocks():
                yield from (array.data.cast("B") for array in (block.indptr, block.indices, block.data))
            return
        for path in sorted(path for path in self.files.rglob("*") if path.is_file()):
            yield path.relative_to(self.files).as_posix().encode()
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece

    def _stop(self, rows: NDArray[np.integer], start: int, values: int) -> int:
        """Find the end of a block by its stored values, or by all values where zeros are stored too."""
        if not hasattr(self.matrix, "indptr"):
            return min(start + max(1, values // max(1, int(self.matrix.shape[1]))), len(rows))
        ahead = rows[start : start + _LOOK_AHEAD]
        indptr = np.asarray(self.matrix.indptr[int(ahead[0]) : int(ahead[-1]) + 2])
        stored = indptr[ahead - ahead[0] + 1] - indptr[0]
        return start + max(1, int(np.searchsorted(stored, values // _STORED_SHARE, side="right")))

    def _read(self, rows: NDArray[np.integer]) -> sparse.csr_matrix:
        # A contiguous read and then a pick: h5py, zarr and dask all do that, and none is slow at it.
        read = self.matrix[int(rows[0]) : int(rows[-1]) + 1]
        read = read.compute() if hasattr(read, "compute") else read
        block = sparse.csr_matrix(_widened(read if sparse.issparse(read) else np.asarray(read)))
        block = block if block.shape[0] == len(rows) else block[rows - rows[0]]
        if not block.has_canonical_format:
            block = block.astype(np.float64)  # a copy, as it may be a view of what the user has; sums must not overflow
            block.sum_duplicates()
        return block if self.genes is None else block[:, self.genes]


def _widened(x: Any) -> Any:
    """Convert a sparse or dense matrix to a type that SciPy works on and that holds sums of two values."""
    is_small = (x.dtype.kind in "biu" and x.dtype.itemsize < 4) or x.dtype == np.float16
    if not is_small and x.dtype.itemsize <= 8:
        return x
    dtype = np.float32 if is_small else np.float64
    if sparse.issparse(x) and x.format in ("csr", "csc"):
        return type(x)((x.data.astype(dtype), x.indices, x.indptr), shape=x.shape)
    return x.astype(dtype)


def log_normalise(counts: Any, total: ArrayLike, target_sum: float = 1e4) -> NDArray[np.float32]:
    """Compute ``log1p(target_sum * counts / total)``, dense, (n, M); ``total`` (n,) is over all genes of the table."""
    return np.asarray(target_rows(sparse.csr_matrix(counts), total, target_sum).toarray())


def target_rows(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float | None) -> sparse.csr_matrix:
    """Log-normalise counts, as sparse as they are; without a target sum keep them, and append the total: (n, M + 1)."""
    if target_sum is None:
        last = sparse.csr_matrix(np.asarray(total, dtype=np.float64)[:, None])
        return sparse.hstack([counts, last], format="csr", dtype=np.float32)
    values = log_values(counts, total, target_sum).astype(np.float32)
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def log_values(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float) -> NDArray[np.float64]:
    """Log-normalise the stored values alone: that of a zero is zero."""
    total = np.asarray(total, dtype=np.float64)
    factor = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr))))
