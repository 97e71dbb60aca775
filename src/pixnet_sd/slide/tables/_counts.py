"""Count matrices of any kind, in memory or on disk, read in blocks of rows.

Whether a matrix holds what is needed, told in the one pass that also sums it.

Log-normalisation of counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError
from pixnet_sd.slide.image import GuardedArray

from ._kind import Kind, Look

__all__ = ["Counts", "check_kind", "checked_blocks", "checked_totals", "log_normalise", "log_values", "target_rows"]

_BLOCK_VALUES = 2**25  # of a block made dense: 128 MiB in 32 bits
_BLOCK_STORED = 2**22  # stored values of a sparse block: 32 MiB with their columns, several times that while worked on
_LOOK_AHEAD = 2**18  # rows whose pointers are looked at for the end of a sparse block
_MANY_STORED = 2**26
_PIECE_BYTES = 2**24


class _CompressedRows:
    """Compressed rows on disk, of which consecutive ones are read.

    AnnData's own handle does the same, but keeps the pointers of all rows in memory.
    """

    def __init__(self, group: Any, shape: tuple[int, int]) -> None:
        self.indptr, self._indices, self._data = (GuardedArray(group[name]) for name in ("indptr", "indices", "data"))
        self.shape, self.dtype = shape, self._data.dtype

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        indptr = np.asarray(self.indptr[rows.start : rows.stop + 1]).astype(np.int64)
        start, stop = int(indptr[0]), int(indptr[-1])
        indices = np.asarray(self._indices[start:stop]).astype(np.int32, copy=False)
        parts = (_wide(np.asarray(self._data[start:stop])), indices, (indptr - start).astype(np.int32))
        return sparse.csr_matrix(parts, shape=(len(indptr) - 1, self.shape[1]))


@dataclass(frozen=True, eq=False)
class Counts:
    """Some rows of a count matrix, regions x genes, which is never made dense as a whole.

    Attributes
    ----------
    matrix
        NumPy, SciPy sparse, dask, or compressed rows on disk.
    rows
        Rows of `matrix` that count, ascending, shape (n,).
    files
        Folder that holds the matrix, of one that is on disk.
    genes
        Columns of `matrix` that count, ascending, shape (G,); None for all.
    is_half
        Whether the values were stored in 16 bits, which do not hold larger counts.
    """

    matrix: Any
    rows: NDArray[np.integer]
    files: Path | None = None
    genes: NDArray[np.integer] | None = None
    is_half: bool = False

    @classmethod
    def of(
        cls,
        matrix: Any,
        rows: ArrayLike,
        what: str,
        files: Path | None = None,
        genes: NDArray[np.integer] | None = None,
    ) -> Counts:
        """Wrap the X of a table; compressed columns, of which rows cannot be read, are turned once.

        Raises
        ------
        DataError
            If there is no matrix, or it is not of real numbers.
        """
        if matrix is None:
            raise DataError(f"{what} has no X. Put raw counts there.")
        if matrix.dtype.kind not in "biuf":
            raise DataError(f"{what} has an X of dtype {matrix.dtype}. Put raw counts there, whole numbers or floats.")
        is_half = matrix.dtype == np.float16
        kind, backed = getattr(matrix, "format", None), hasattr(matrix, "group")
        if sparse.issparse(matrix):
            matrix = _widened(matrix)
        if kind == "csc":
            matrix = _as_rows(_widened(matrix.to_memory()) if backed else matrix, what)
        elif kind == "csr" and backed:
            matrix = _CompressedRows(matrix.group, matrix.shape)
        elif isinstance(matrix, zarr.Array):
            matrix = GuardedArray(matrix)
        return cls(matrix, np.asarray(rows), files, genes, is_half)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_genes(self) -> int:
        """Number of columns that count."""
        return int(self.matrix.shape[1]) if self.genes is None else len(self.genes)

    def take(self, keep: ArrayLike) -> Counts:
        """Those of the rows that a boolean or ascending integer index picks."""
        return replace(self, rows=self.rows[np.asarray(keep)])

    def blocks(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Blocks of rows in turn, (rows of the block, genes), no value twice, with their place among the rows."""
        start = 0
        while start < len(self):
            stop = self._stop(start)
            yield slice(start, stop), self._read(self.rows[start:stop])
            start = stop

    def content(self) -> Iterator[bytes | memoryview]:
        """All that tells these counts from others, in pieces: files as they are, or values and where they stand."""
        yield np.ascontiguousarray(self.rows).data.cast("B")
        if self.genes is not None:
            yield np.ascontiguousarray(self.genes).data.cast("B")
        if self.files is not None:
            for path in sorted(path for path in self.files.rglob("*") if path.is_file()):
                yield path.relative_to(self.files).as_posix().encode()
                with path.open("rb") as file:
                    while piece := file.read(_PIECE_BYTES):
                        yield piece
            return
        for _, block in self.blocks():
            for array in (block.indptr, block.indices, block.data):
                yield array.data.cast("B")

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

    def _stop(self, start: int) -> int:
        """End of the block that starts there: by stored values, or by all values where zeros are stored too."""
        if not hasattr(self.matrix, "indptr"):
            return min(start + max(1, _BLOCK_VALUES // max(1, int(self.matrix.shape[1]))), len(self))
        rows = self.rows[start : start + _LOOK_AHEAD]
        indptr = np.asarray(self.matrix.indptr[int(rows[0]) : int(rows[-1]) + 2])
        stored = indptr[rows - rows[0] + 1] - indptr[0]
        return start + max(1, int(np.searchsorted(stored, _BLOCK_STORED, side="right")))

    def _read(self, rows: NDArray[np.integer]) -> sparse.csr_matrix:
        # A contiguous read and then a pick: h5py, zarr and dask all do that, and none is slow at it.
        part = self.matrix[int(rows[0]) : int(rows[-1]) + 1]
        part = part.compute() if hasattr(part, "compute") else part
        part = sparse.csr_matrix(_widened(part) if sparse.issparse(part) else _wide(np.asarray(part)))
        part = part if part.shape[0] == len(rows) else part[rows - rows[0]]
        if not part.has_canonical_format:
            part = part.astype(np.float64)  # a copy, as it may be a view of what the user has; sums must not overflow
            part.sum_duplicates()
        return part if self.genes is None else part[:, self.genes]


def _wide(values: NDArray[Any]) -> NDArray[Any]:
    """Values in a type that SciPy works on and that holds their sums of two."""
    if (values.dtype.kind in "biu" and values.dtype.itemsize < 4) or values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(np.float64) if values.dtype.itemsize > 8 else values


def _widened(matrix: Any) -> Any:
    """A sparse matrix with such values."""
    values = _wide(matrix.data)
    if values is matrix.data:
        return matrix
    if matrix.format in ("csr", "csc"):
        return type(matrix)((values, matrix.indices, matrix.indptr), shape=matrix.shape)
    return matrix.astype(values.dtype)


def _as_rows(matrix: Any, what: str) -> Any:
    if matrix.nnz > _MANY_STORED:
        logger.warning(
            "%s: X is stored by columns (CSC), so all of its %.0f million values are loaded and turned to rows. Store "
            "it by rows, table.X = table.X.tocsr(), to have it read in parts.",
            *(what, matrix.nnz / 1e6),
        )
    return matrix.tocsr()


_MOST = 2**31  # no region has more counts of a gene
_EXACT, _EXACT_HALF = 2**24, 2**11  # whole numbers up to which 32 bits, and 16, hold each
_LOG_MAX = 20.0  # log1p of anything countable stays below
_RAW = "Put raw counts there, for instance table.X = table.layers['counts'] or table.raw.X."
_IS: dict[Kind, str] = {
    "normalised": "counts that were scaled or normalised",
    "logged": "logarithms",
    "rooted": "square roots",
    "other": "values that are neither whole nor about whole",
}


def checked_blocks(
    counts: Counts, var_names: pd.Index, what: str, look: Look | None = None
) -> Iterator[tuple[slice, sparse.csr_matrix, NDArray[np.float64]]]:
    """Blocks of rows, with a look at every value on the way.

    Parameters
    ----------
    counts
        Raw counts, n x G.
    var_names
        Genes, shape (G,), for messages.
    what
        Name of the table, for messages.
    look
        Takes the values in.

    Yields
    ------
    Place among the rows, counts, and the sum over all genes of each row.

    Raises
    ------
    DataError
        If a value is NaN, infinite, negative, or larger than any count or than its type holds exactly.
    """
    for place, block in counts.blocks():
        rows = counts.rows[place]
        for bad, how, remedy in _faults(block.data, counts.is_half):
            if bad.any():
                raise DataError(_where(block, bad, rows, var_names, what, how, remedy))
        if look is not None:
            look.at(block)
        yield place, block, _row_sums(block)


def _faults(values: NDArray[Any], is_half: bool) -> Iterator[tuple[NDArray[np.bool_], str, str]]:
    yield ~np.isfinite(values), "NaN or infinite", "Remove or recompute them"
    yield values < 0, "negative", "Scaled values will not do: give raw counts"
    yield values > _MOST, "absurdly large", "No region has more than 2³¹ counts of a gene: remove or recompute them"
    if is_half:
        remedy = "16 bits do not hold counts above 2,048 exactly: read the table again with X in 32 bits"
        yield values > _EXACT_HALF, "inexact", remedy


def checked_totals(counts: Counts, var_names: pd.Index, what: str) -> NDArray[np.float64]:
    """Sum over all genes of each region; warns when the values are logarithms already.

    Parameters and errors are those of `checked_blocks`.

    Returns
    -------
    Totals, shape (n,).
    """
    look, total = Look(), np.zeros(len(counts))
    for place, _, sums in checked_blocks(counts, var_names, what, look):
        total[place] = sums
    check_kind(look.kind, look.largest, what)
    return total


def _row_sums(block: sparse.csr_matrix) -> NDArray[np.float64]:
    """Sums in 64 bits; those of SciPy stay in the 32 bits of the values, whatever dtype is asked for."""
    row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    return np.bincount(row, block.data, block.shape[0]).astype(np.float64)


def _where(
    block: sparse.csr_matrix,
    bad: NDArray[np.bool_],
    rows: NDArray[np.integer],
    var_names: pd.Index,
    what: str,
    how: str,
    remedy: str,
) -> str:
    first = int(np.flatnonzero(bad)[0])
    gene, row = var_names[block.indices[first]], rows[np.searchsorted(block.indptr, first, side="right") - 1]
    found = f"{int(bad.sum())} in {block.shape[0]} rows, first {block.data[first]:g} for gene {gene!r} in row {row}"
    return f"{what}: X holds {how} values ({found}). {remedy}."


def check_kind(kind: Kind, largest: float, what: str, objective: str = "mse_pcc") -> None:
    """Refuse, or warn of, a table whose values are not what is learnt from.

    Parameters
    ----------
    kind, largest
        What the values of the table are, and the largest of them, as `Look` says.
    what
        Name of the table, for messages.
    objective
        What they are for: ``"mse_pcc"`` takes counts to log-normalised expression, so that a factor of each region
        does not matter; the others are likelihoods of counts.

    Raises
    ------
    DataError
        If a likelihood of counts is to be learnt from anything else.
    """
    if largest > _EXACT:
        warn(f"{what}: X has values up to {largest:.0f}; above {_EXACT} they are rounded to 32 bits.")
    if objective != "mse_pcc":
        _check_counts(kind, what, objective)
    elif kind in ("logged", "rooted"):
        warn(f"{what}: X holds {_IS[kind]} already, and they will be normalised and logged again. {_RAW}")
    elif kind == "other" and largest < _LOG_MAX:
        warn(f"{what}: X holds {_IS[kind]}, none above {_LOG_MAX:.0f}. If they are logarithms: {_RAW.lower()}")


def _check_counts(kind: Kind, what: str, objective: str) -> None:
    if kind in _IS:
        raise DataError(
            f"{what}: X holds {_IS[kind]}, and objective={objective!r} is a likelihood of raw counts. {_RAW} Corrected "
            "counts can be rounded, table.X = np.rint(table.X); objective='mse_pcc' does without."
        )
    if kind == "corrected":
        warn(f"{what}: X holds counts that are not whole, as destriping leaves them, and they are taken as they are.")
    if kind == "multiples":
        warn(f"{what}: X holds whole numbers with a common divisor, so they may be counts times a factor. {_RAW}")


def log_normalise(
    counts: sparse.spmatrix | sparse.sparray | NDArray[np.generic], total: ArrayLike, target_sum: float = 1e4
) -> NDArray[np.float32]:
    """Log-normalised expression: ``log1p(target_sum * x / sum(x))``, natural logarithm.

    Parameters
    ----------
    counts
        Raw counts of the genes wanted, shape (n, M), sparse (no value stored twice) or dense.
    total
        Sum of each region over all genes of its table, not only those M, shape (n,). Where it is 0 the result is 0.
    target_sum
        Counts that every region is scaled to.

    Returns
    -------
    Targets, shape (n, M), float32.
    """
    dense: NDArray[np.float32] = target_rows(sparse.csr_matrix(counts), total, target_sum).toarray()
    return dense


def target_rows(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float | None) -> sparse.csr_matrix:
    """What is learnt of some regions, as sparse as their counts.

    Parameters
    ----------
    counts, total
        As in `log_normalise`.
    target_sum
        As in `log_normalise`; None: raw counts, with the total as one more column.

    Returns
    -------
    float32, shape (n, M), or (n, M + 1).
    """
    if target_sum is None:
        last = sparse.csr_matrix(np.asarray(total, dtype=np.float64)[:, None])
        return sparse.hstack([counts, last], format="csr", dtype=np.float32)
    values = log_values(counts, total, target_sum).astype(np.float32)
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def log_values(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float) -> NDArray[np.float64]:
    """Log-normalised expression of the stored values alone: that of a zero is zero."""
    total = np.asarray(total, dtype=np.float64)
    factor = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr))))
