"""Counts of the chosen genes on disk: rows of any region are had by a few short reads, and nothing stays in memory.

A folder holds plain little-endian arrays: ``total`` (sum over all genes of each row, float64), ``indptr`` (int64),
and of each stored value its gene (position among the chosen ones) and its count, both in the smallest type that holds
them exactly, as a CSR matrix has them. ``meta.json`` says what they are and hashes them.

Compact copies of tables' counts, kept beside the checkpoint and used again as long as the tables stay the same.

Coarse bins that are the exact sums of fine ones: seen, and summed from the fine ones' compact counts.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._files import no_empty_folders_left
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError
from pixnet_sd.geometry import Lattice

from ._counts import checked_blocks
from ._kind import Kind, Look
from ._measured import Measured

__all__ = [
    "CountFile",
    "Pooling",
    "Rows",
    "cached",
    "content_key",
    "find_pooling",
    "open_counts",
    "own_counts",
    "pooled_counts",
    "write_counts",
]

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


_SCRATCH = ".partial"
_ABANDONED_S = 24 * 3600


def own_counts(measured: Measured, genes: pd.Index, folder: Path) -> CountFile:
    """Counts of some genes of a table, in the order of its regions, read in one pass if they are not there yet.

    Parameters
    ----------
    measured
        Regions and their counts.
    genes
        Genes, all of them in the table.
    folder
        Folder of all caches.

    Raises
    ------
    DataError
        If a count is NaN, infinite or negative.
    StoreError
        If the folder cannot be written, or the disk is full.
    """
    columns = measured.var_names.get_indexer(genes)
    look = Look()
    seen = {"kind": lambda: look.kind, "largest": lambda: look.largest}

    def blocks() -> Iterator[Rows]:
        for _, block, total in checked_blocks(measured.counts, measured.var_names, measured.what, look):
            yield block[:, columns], total

    def build(into: Path) -> None:
        if measured.place is None:
            write_counts(into, blocks(), len(genes), key=key, **seen)
            return
        with tempfile.TemporaryDirectory(dir=into) as scratch:  # in the table's order first
            write_counts(Path(scratch), blocks(), len(genes), key=key, **seen)
            found = open_counts(Path(scratch), key=key)
            if found is None:
                raise OSError("what was written cannot be read back")
            write_counts(into, found.blocks(measured.place), len(genes), key=key, **seen)

    key = content_key(measured, genes)
    return cached(folder, key, build, measured.what)


def content_key(measured: Measured, genes: pd.Index) -> str:
    """Hash of all that decides what a cache holds: counts as they are stored, which rows in which order, and genes."""
    digest = hashlib.sha256()
    if measured.place is not None:
        digest.update(measured.place.data)
    for names in (measured.var_names, genes):
        digest.update("\n".join(map(str, names)).encode())
    for piece in measured.counts.content():
        digest.update(piece)
    return digest.hexdigest()


def cached(folder: Path, key: str, build: Callable[[Path], None], what: str) -> CountFile:
    """Counts under a key, built if they are not there or damaged.

    A cache appears whole or not at all: it is built aside and renamed. Two runs may build the same one; either will do.

    Parameters
    ----------
    folder
        Folder of all caches.
    key
        Hash of what it holds.
    build
        Writes it, key included, into an empty folder.
    what
        Name of the table, for messages.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    home = folder / key[:16]
    found = open_counts(home, key=key)
    if found is not None:
        logger.info("%s: counts taken from the cache %s", what, home)
        return found
    with no_empty_folders_left(folder):
        _build(folder, key, build, what)
    found = open_counts(home, key=key)
    if found is None:
        raise StoreError(f"{what}: the counts in {str(home)!r} were changed while they were written. Try again.")
    logger.info("%s: counts of %d genes in %d regions cached in %s", what, found.n_genes, found.n, home)
    return found


def _build(folder: Path, key: str, build: Callable[[Path], None], what: str) -> None:
    """Build a cache aside and rename it."""
    home, scratch = folder / key[:16], None
    try:
        scratch = _scratch(folder, key)
        build(scratch)
        shutil.rmtree(home, ignore_errors=True)
        scratch.replace(home)
    except OSError as error:
        raise StoreError(_cannot_write(folder, what, error)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch(folder: Path, key: str) -> Path:
    """A folder to build in; what runs that were killed have left of the same cache goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{key[:16]}{_SCRATCH}-*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    scratch = folder / f"{key[:16]}{_SCRATCH}-{secrets.token_hex(4)}"
    scratch.mkdir()
    return scratch


def _cannot_write(folder: Path, what: str, error: OSError) -> str:
    free = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free there" if folder.exists() else "it is not there"
    return (
        f"{what}: a compact copy of the counts cannot be written to {str(folder)!r} ({error.strerror or error}; "
        f"{free}). Free space, or give checkpoint_dir= on a disk with room: the copy goes beside it. Nothing was left "
        "behind."
    )


_CENTRES = 0.1  # of a fine bin: how far a coarse bin may lie from where its fine bins say
_BANDS = 4  # rows of coarse bins of which all counts are compared, besides the first and the last
_BLOCK_BINS = 2**17


class Pooling:
    """Which coarse bin each fine bin belongs to.

    Parameters
    ----------
    fine, coarse
        Bins in row-major order on lattices of the same origin and axes.
    factor
        Fine bins along a coarse one's side.
    """

    def __init__(self, fine: Lattice, coarse: Lattice, factor: int) -> None:
        self.fine, self.coarse, self.factor = fine, coarse, factor

    def band(self, first_row: int, end_row: int) -> tuple[slice, slice, sparse.csr_matrix]:
        """Coarse bins of some rows, the fine bins in them, and the 0-1 matrix that sums these, (coarse, fine)."""
        coarse = slice(*np.searchsorted(self.coarse.row, (first_row, end_row)).tolist())
        fine = slice(*np.searchsorted(self.fine.row, (first_row * self.factor, end_row * self.factor)).tolist())
        low = min(int(self.coarse.col.min()), int(self.fine.col.min()) // self.factor)
        width = max(int(self.coarse.col.max()), int(self.fine.col.max()) // self.factor) + 1 - low
        there = (self.coarse.row[coarse].astype(np.int64) - first_row) * width + (self.coarse.col[coarse] - low)
        row, col = self.fine.row[fine] // self.factor, self.fine.col[fine] // self.factor
        wanted = (row.astype(np.int64) - first_row) * width + (col - low)
        place = np.minimum(np.searchsorted(there, wanted), max(len(there) - 1, 0))
        has = there[place] == wanted if len(there) else np.zeros(len(wanted), bool)
        ones = (np.ones(int(has.sum()), np.float64), (place[has], np.flatnonzero(has)))
        return coarse, fine, sparse.csr_matrix(ones, shape=(len(there), len(wanted)))

    def bands(self) -> Iterator[tuple[slice, slice, sparse.csr_matrix]]:
        """Bands over all coarse bins, some thousand bins at a time."""
        first, end = int(self.coarse.row[0]), int(self.coarse.row[-1]) + 1
        rows = max(1, int((end - first) * _BLOCK_BINS / max(len(self.fine), 1)))
        for row in range(first, end, rows):
            yield self.band(row, min(row + rows, end))


def find_pooling(fine: Measured, coarse: Measured) -> tuple[Pooling | None, str]:
    """Whether a table is the sum of another one's bins.

    It is when all bins of both are there, their lattices have axes and origin in common, and all counts of some rows of
    coarse bins, the first and the last among them, are the sums of the fine ones, bins at the border included.

    Parameters
    ----------
    fine, coarse
        The tables.

    Returns
    -------
    How to pool, or None; and why not.
    """
    if not isinstance(fine.regions, Lattice) or not isinstance(coarse.regions, Lattice):
        return None, "they are not both bins on a lattice"
    if not fine.is_complete or not coarse.is_complete:
        return None, "some of their bins are left out"
    if not fine.var_names.equals(coarse.var_names):
        return None, "their genes differ"
    factor = _factor(fine.regions, coarse.regions)
    if factor is None:
        return None, "their lattices do not share axes and origin"
    pooling = Pooling(fine.regions, coarse.regions, factor)
    if not _counts_agree(fine, coarse, pooling):
        return None, "their counts are not sums"
    return pooling, ""


def _factor(fine: Lattice, coarse: Lattice) -> int | None:
    factor = round(coarse.pitch / fine.pitch)
    if factor < 2:
        return None
    rows, cols = (coarse.row[0], coarse.row[-1]), (coarse.col.min(), coarse.col.max())
    centres = np.array([[c + 0.5, r + 0.5, 1.0] for c in cols for r in rows])
    off = (coarse.to_grid - fine.to_grid @ np.diag([factor, factor, 1.0])) @ centres.T
    return factor if np.abs(off).max() < _CENTRES * fine.pitch else None


def _counts_agree(fine: Measured, coarse: Measured, pooling: Pooling) -> bool:
    rows = np.unique(pooling.coarse.row)
    picked = np.random.default_rng(0).choice(rows, min(_BANDS, len(rows)), replace=False)
    return all(_band_agrees(fine, coarse, pooling, int(row)) for row in {*picked.tolist(), int(rows[0]), int(rows[-1])})


def _band_agrees(fine: Measured, coarse: Measured, pooling: Pooling, row: int) -> bool:
    parents, children, matrix = pooling.band(row, row + 1)
    if not matrix.shape[1]:
        return False
    sums = matrix @ fine.rows(np.arange(children.start, children.stop))
    off = sums - coarse.rows(np.arange(parents.start, parents.stop)).astype(np.float64)
    return not off.count_nonzero()


def pooled_counts(fine: CountFile, pooling: Pooling, folder: Path, what: str) -> CountFile:
    """Counts of coarse bins, summed from those of fine ones.

    Parameters
    ----------
    fine
        Counts of the fine bins.
    pooling
        Which of them make which coarse bin.
    folder
        Folder of all caches.
    what
        Name of the coarse table, for messages.
    """
    key = _key(fine, pooling)
    seen = {"kind": fine.kind, "largest": fine.largest}  # what can be told of the coarse ones was told of the fine
    return cached(
        folder,
        key,
        lambda into: write_counts(into, _sums(fine, pooling), fine.n_genes, key=key, **seen),
        what,
    )


def _key(fine: CountFile, pooling: Pooling) -> str:
    digest = hashlib.sha256(f"{fine.sha256} {pooling.factor}".encode())
    for positions in (pooling.fine.row, pooling.fine.col, pooling.coarse.row, pooling.coarse.col):
        digest.update(np.ascontiguousarray(positions).data)
    return digest.hexdigest()


def _sums(fine: CountFile, pooling: Pooling) -> Iterator[Rows]:
    for parents, children, matrix in pooling.bands():
        counts, total = fine.rows(_range(children))
        if parents.stop > parents.start:
            yield (matrix @ counts).tocsr(), np.asarray(matrix @ total)


def _range(part: slice) -> NDArray[np.int64]:
    return np.arange(part.start, part.stop)
