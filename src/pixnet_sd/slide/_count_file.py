"""Counts of the chosen genes on disk: rows of any region are had by a few short reads, and nothing stays in memory.

A folder holds plain little-endian arrays: ``total`` (sum over all genes of each row, float64), ``indptr`` (int64),
and of each stored value its gene (position among the chosen ones) and its count, both in the smallest type that holds
them exactly, as a CSR matrix has them. ``meta.json`` says what they are and hashes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._errors import StoreError

from ._count_kind import Kind

__all__ = ["CountFile", "Rows", "open_counts", "write_counts"]

Rows = tuple[sparse.csr_matrix, NDArray[np.float64]]
"""Counts of the chosen genes in some rows, shape (n, M), and the sum over all genes of each row, shape (n,)."""

_FORMAT = "pixnet_sd counts/2"
_COUNTS = tuple(np.dtype(f"<{code}") for code in ("u1", "u2", "u4", "f4"))
_NAMES = ("total", "indptr", "gene", "count")
_BLOCK_ROWS = 2**16
_COPY_BYTES = 2**24


@dataclass(frozen=True)
class CountFile:
    """Counts in a folder, to be read from any number of threads at once.

    Attributes
    ----------
    folder
        Where they are.
    n, n_genes
        Rows and chosen genes.
    gene, count
        Types of the gene and the count of a stored value.
    kind, largest
        What all values of the table are, and the largest, as `Look` said when they were written.
    sha256
        Of the content: equal for equal counts, wherever they came from.
    """

    folder: Path
    n: int
    n_genes: int
    gene: np.dtype[Any]
    count: np.dtype[Any]
    kind: Kind
    largest: float
    sha256: str

    def rows(self, index: NDArray[np.integer]) -> Rows:
        """Some rows; quick when many of them follow on one another."""
        starts, stops = _runs(index)
        total = _gather(self._path("total"), np.dtype("<f8"), starts, stops)
        pointers = _gather(self._path("indptr"), np.dtype("<i8"), starts, stops + 1)
        last = np.cumsum(stops - starts + 1) - 1  # of each run's pointers
        stored = np.delete(np.diff(pointers), last[:-1])
        spans = pointers[np.append(0, last[:-1] + 1)] if len(last) else pointers, pointers[last]
        gene, count = (_gather(self._path(k), t, *spans) for k, t in (("gene", self.gene), ("count", self.count)))
        indptr = np.concatenate([[0], np.cumsum(stored)]).astype(np.int32)
        shape = (len(total), self.n_genes)
        return sparse.csr_matrix((count.astype(np.float32), gene.astype(np.int32), indptr), shape=shape), total

    def blocks(self, index: NDArray[np.integer] | None = None) -> Iterator[Rows]:
        """All rows, or those of an index, some at a time."""
        for start in range(0, self.n if index is None else len(index), _BLOCK_ROWS):
            stop = start + _BLOCK_ROWS
            yield self.rows(np.arange(start, min(stop, self.n)) if index is None else index[start:stop])

    def totals(self) -> NDArray[np.float64]:
        """Sum over all genes of every row."""
        return np.fromfile(self._path("total"), "<f8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"


def _runs(index: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the stretches of rows that follow on one another."""
    rows: NDArray[np.int64] = np.asarray(index, np.int64)
    first = np.append(True, np.diff(rows) != 1)[: len(rows)]
    return rows[first], rows[np.append(first[1:], True)[: len(rows)]] + 1


def _gather(path: Path, dtype: np.dtype[Any], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[Any]:
    """Stretches of a file, one after the other. A mapping would be shorter, but what it touches counts as memory."""
    out = np.empty(int((stops - starts).sum()), dtype)
    into, done = out.view(np.uint8).data, 0
    with path.open("rb", buffering=0) as file:
        for start, stop in zip((starts * dtype.itemsize).tolist(), (stops * dtype.itemsize).tolist(), strict=True):
            file.seek(start)
            _fill(file, into[done : done + stop - start], path)
            done += stop - start
    return out


def _fill(file: Any, into: memoryview, path: Path) -> None:
    while len(into):
        n = file.readinto(into)
        if not n:
            raise StoreError(
                f"The counts in {str(path.parent)!r} were cut short while in use. Make the same call again."
            )
        into = into[n:]


class _Narrow:
    """An array that grows on disk in the smallest type that holds all of it."""

    def __init__(self, path: Path) -> None:
        self._path, self.dtype = path, _COUNTS[0]
        self._file: BinaryIO = path.open("wb")

    def append(self, values: NDArray[Any]) -> None:
        dtype = max((self.dtype, _smallest(values)), key=_COUNTS.index)
        if dtype != self.dtype:
            self._widen(dtype)
        self._file.write(values.astype(dtype).data)

    def _widen(self, dtype: np.dtype[Any]) -> None:
        self.close()
        narrow = self._path.replace(self._path.with_suffix(".narrow"))
        self._file = self._path.open("wb")
        with narrow.open("rb") as file:
            while part := file.read(_COPY_BYTES):
                self._file.write(np.frombuffer(part, self.dtype).astype(dtype).data)
        narrow.unlink()
        self.dtype = dtype

    def close(self) -> None:
        self._file.close()


def _smallest(values: NDArray[Any]) -> np.dtype[Any]:
    if (values != np.rint(values)).any():
        return _COUNTS[-1]
    largest = values.max(initial=0)
    return next((t for t in _COUNTS[:-1] if largest <= np.iinfo(t).max), _COUNTS[-1])


def write_counts(folder: Path, blocks: Iterable[Rows], n_genes: int, **meta: Any) -> None:
    """Write counts into an empty folder.

    Parameters
    ----------
    folder
        Where to.
    blocks
        Consecutive rows, in the order that they are to have.
    n_genes
        Number of chosen genes.
    meta
        What else to note; a value that can be called is asked for at the end.
    """
    gene_type = np.min_scalar_type(max(n_genes - 1, 0))
    count = _Narrow(folder / "count.bin")
    n, stored = 0, 0
    try:
        with (
            (folder / "total.bin").open("wb") as total,
            (folder / "indptr.bin").open("wb") as indptr,
            (folder / "gene.bin").open("wb") as gene,
        ):
            indptr.write(np.zeros(1, "<i8").data)
            for block, sums in blocks:
                total.write(sums.astype("<f8").data)
                indptr.write((block.indptr[1:].astype("<i8") + stored).data)
                gene.write(block.indices.astype(gene_type).data)
                count.append(block.data)
                n, stored = n + block.shape[0], stored + block.nnz
    finally:
        count.close()
    types = {"gene": gene_type.newbyteorder("<").str, "count": count.dtype.str}
    noted = {key: value() if callable(value) else value for key, value in meta.items()}
    meta = {"format": _FORMAT, "n": n, "n_genes": n_genes, **types, **noted, "sha256": _hash(folder)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def open_counts(folder: Path, **expected: Any) -> CountFile | None:
    """Counts that are already there.

    Parameters
    ----------
    folder
        Where to look.
    expected
        What must have been noted.

    Returns
    -------
    The counts; None if there are none, they are of something else, or they are damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != _FORMAT or any(meta[key] != value for key, value in expected.items()):
            return None
        types = np.dtype(meta["gene"]), np.dtype(meta["count"])
        if _hash(folder) != meta["sha256"]:
            return None
        return CountFile(folder, meta["n"], meta["n_genes"], *types, meta["kind"], meta["largest"], meta["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _NAMES:
        with (folder / f"{name}.bin").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
