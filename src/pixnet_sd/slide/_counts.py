"""Count matrices of any kind, in memory or on disk, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pixnet_sd._errors import DataError

__all__ = ["Counts"]

_BLOCK_VALUES = 2**25  # of a block made dense: 128 MiB in 32 bits


@dataclass(frozen=True, eq=False)
class Counts:
    """Some rows of a count matrix, regions x genes, which is never made dense as a whole.

    Attributes
    ----------
    matrix
        NumPy, SciPy sparse, dask, or an AnnData backed dataset.
    rows
        Rows of `matrix` that count, ascending, shape (n,).
    """

    matrix: Any
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, matrix: Any, rows: ArrayLike, what: str) -> Counts:
        """Wrap the X of a table; compressed columns, of which rows cannot be read, are turned once.

        Raises
        ------
        DataError
            If there is no matrix, or it is not numeric.
        """
        if matrix is None:
            raise DataError(f"{what} has no X. Put raw counts there.")
        if not np.issubdtype(matrix.dtype, np.number) and matrix.dtype != bool:
            raise DataError(f"{what} has an X of dtype {matrix.dtype}. Put raw counts there.")
        if getattr(matrix, "format", None) == "csc":
            matrix = (matrix.to_memory() if hasattr(matrix, "to_memory") else matrix).tocsr()
        return cls(matrix, np.asarray(rows, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_genes(self) -> int:
        """Number of columns."""
        return int(self.matrix.shape[1])

    def take(self, keep: ArrayLike) -> Counts:
        """Those of the rows that a boolean or ascending integer index picks."""
        return Counts(self.matrix, self.rows[np.asarray(keep)])

    def blocks(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Consecutive blocks of rows with their place among the rows, shape (rows of the block, genes)."""
        size = max(1, _BLOCK_VALUES // max(1, self.n_genes))
        for start in range(0, len(self), size):
            place = slice(start, min(start + size, len(self)))
            yield place, self._read(self.rows[place])

    def columns(self, genes: ArrayLike) -> sparse.csr_matrix:
        """Counts of some genes in memory, shape (n, len(genes)), float32.

        Parameters
        ----------
        genes
            Positions of the genes, in the order wanted.
        """
        genes = np.asarray(genes, dtype=np.int64)
        parts = [block[:, genes].astype(np.float32) for _, block in self.blocks()]
        return sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, len(genes)), dtype=np.float32)

    def _read(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        # A contiguous read and then a pick: h5py, zarr and dask all do that, and none is slow at it.
        part = self.matrix[int(rows[0]) : int(rows[-1]) + 1]
        part = part.compute() if hasattr(part, "compute") else part
        part = sparse.csr_matrix(part if sparse.issparse(part) else np.asarray(part))
        return part if part.shape[0] == len(rows) else part[rows - rows[0]]
