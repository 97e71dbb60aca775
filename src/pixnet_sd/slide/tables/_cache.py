"""Compact copies of tables' counts of the chosen genes, kept on disk beside the checkpoint as long as they fit.

A folder holds plain little-endian arrays of a CSR matrix: ``total`` (sum over all genes of each row, float64),
``indptr`` (int64), and of each stored value its ``gene`` (position among the chosen ones) and its ``count``, in the
smallest types that hold them; ``meta.json`` says what they are and hashes them and itself. Coarse bins that are exact
sums of fine ones are summed from the fine ones' copy, and not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._files import no_empty_folders_left, replace_file
from pixnet_sd._fingerprint import content_sha256, fingerprint
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError
from pixnet_sd.geometry import Lattice

from ._checks import Kind, Look, checked_blocks
from ._measured import Measured

# counts of the chosen genes in some rows, shape (n, M), and the sum over all genes of each row, shape (n,)
CountRows: TypeAlias = tuple[sparse.csr_matrix, NDArray[np.float64]]

_FORMAT, _META = "pixnet_sd counts/3", "meta.json"
_ARRAYS = ("total.bin", "indptr.bin", "gene.bin", "count.bin")
_COUNT_TYPES = tuple(np.dtype(f"<{code}") for code in ("u1", "u2", "u4", "f4"))
_BLOCK_ROWS, _BLOCK_BINS, _COPY_BYTES = 2**16, 2**17, 2**24
_ABANDONED_S = 24 * 3600
_CENTRES = 0.1  # of a fine bin: how far a coarse bin may lie from where its fine bins say
_BANDS = 4  # rows of coarse bins of which all counts are compared, besides the first and the last


@dataclass(frozen=True)
class CountFile:
    """Counts in a folder, to be read from any number of threads at once."""

    folder: Path
    n: int  # rows
    n_genes: int
    gene: np.dtype[Any]  # type of a stored value's gene
    count: np.dtype[Any]
    kind: Kind  # of all values of the table, as `Look` told
    largest: float
    sha256: str  # of the content: equal for equal counts, wherever they came from

    def rows(self, index: NDArray[np.integer]) -> CountRows:
        """Read rows; quick when many of them follow on one another."""
        index = np.asarray(index, np.int64)
        first = np.append(True, np.diff(index) != 1)[: len(index)]  # of the rows that follow on one another
        starts, stops = index[first], index[np.append(first[1:], True)[: len(index)]] + 1
        total = self._read("total.bin", "<f8", starts, stops)
        pointers = self._read("indptr.bin", "<i8", starts, stops + 1)
        last = np.cumsum(stops - starts + 1) - 1  # of each run's pointers
        stored = np.delete(np.diff(pointers), last[:-1])
        spans = pointers[np.append(0, last[:-1] + 1)] if len(last) else pointers, pointers[last]
        gene = self._read("gene.bin", self.gene, *spans).astype(np.int32)
        count = self._read("count.bin", self.count, *spans).astype(np.float32)
        indptr = np.concatenate([[0], np.cumsum(stored)]).astype(np.int32)
        return sparse.csr_matrix((count, gene, indptr), shape=(len(total), self.n_genes)), total

    def blocks(self, index: NDArray[np.integer] | None = None, n_rows: int = _BLOCK_ROWS) -> Iterator[CountRows]:
        """Read all rows, or those of an index, some at a time."""
        every: Any = range(self.n) if index is None else index
        for start in range(0, len(every), n_rows):
            yield self.rows(np.asarray(every[start : start + n_rows]))

    def totals(self) -> NDArray[np.float64]:
        """Read the sum over all genes of every row."""
        return np.fromfile(self.folder / "total.bin", "<f8")

    def _read(self, name: str, dtype: Any, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[Any]:
        """Read stretches of an array one after the other. What a memory mapping touches would count as memory."""
        out = np.empty(int((stops - starts).sum()), dtype)
        rest, size = out.view(np.uint8).data, out.itemsize
        with (self.folder / name).open("rb", buffering=0) as file:
            for start, stop in zip((starts * size).tolist(), (stops * size).tolist(), strict=True):
                file.seek(start)
                left = stop - start
                while left:
                    n = file.readinto(rest[:left])
                    if not n:
                        raise StoreError(f"Counts in {str(self.folder)!r} were cut short. Make the same call again.")
                    rest, left = rest[n:], left - n
        return out


def write_counts(
    folder: Path, blocks: Iterable[CountRows], n_genes: int, key: str, seen: Look | CountFile
) -> CountFile:
    """Write consecutive rows into an empty folder, under a key; ``seen`` says at the end what all values are."""
    gene_type, count_type = np.min_scalar_type(max(n_genes - 1, 0)).newbyteorder("<"), _COUNT_TYPES[0]
    n = stored = 0
    with contextlib.ExitStack() as files:
        total, indptr, gene, count = (files.enter_context((folder / name).open("wb")) for name in _ARRAYS)
        indptr.write(np.zeros(1, "<i8").data)
        for block, sums in blocks:
            total.write(sums.astype("<f8").data)
            indptr.write((block.indptr[1:].astype("<i8") + stored).data)
            gene.write(block.indices.astype(gene_type).data)
            narrow, count_type = count_type, max(count_type, _count_type(block.data), key=_COUNT_TYPES.index)
            if count_type != narrow:
                count.close()
                _widen(folder / _ARRAYS[3], narrow, count_type)
                count = files.enter_context((folder / _ARRAYS[3]).open("ab"))
            count.write(block.data.astype(count_type).data)
            n, stored = n + block.shape[0], stored + block.nnz
    meta = {"format": _FORMAT, "key": key, "n": n, "n_genes": n_genes, "gene": gene_type.str, "count": count_type.str}
    meta |= {"kind": seen.kind, "largest": seen.largest, "sha256": _hash(folder), "dates": _dates(folder)}
    (folder / _META).write_text(_with_hash(meta))
    return _opened(folder, meta)


def _count_type(values: NDArray[Any]) -> np.dtype[Any]:
    """Find the smallest type that holds values exactly, or 32-bit floats."""
    largest = values.max(initial=0) if (values == np.rint(values)).all() else np.inf
    return next((dtype for dtype in _COUNT_TYPES[:-1] if largest <= np.iinfo(dtype).max), _COUNT_TYPES[-1])


def _widen(path: Path, narrow: np.dtype[Any], wide: np.dtype[Any]) -> None:
    """Rewrite an array on disk in a wider type."""
    aside = path.replace(path.with_suffix(".narrow"))
    with aside.open("rb") as old, path.open("wb") as new:
        while piece := old.read(_COPY_BYTES):
            new.write(np.frombuffer(piece, narrow).astype(wide).data)
    aside.unlink()


def open_counts(folder: Path, key: str) -> CountFile | None:
    """Open counts that were written under a key; None if there are none, or they are of something else or damaged.

    Arrays of the sizes and dates noted when they were hashed are not hashed again, as those of a copied folder are.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        noted = meta.pop("meta_sha256")
        if noted != fingerprint(meta) or (meta["format"], meta["key"]) != (_FORMAT, key):
            return None
        if meta["dates"] != (dates := _dates(folder)):
            if _hash(folder) != meta["sha256"]:
                return None
            with contextlib.suppress(OSError), replace_file(folder / _META, durable=False) as aside:
                aside.write_text(_with_hash(meta | {"dates": dates}))
        return _opened(folder, meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _opened(folder: Path, meta: dict[str, Any]) -> CountFile:
    gene, count = np.dtype(meta["gene"]), np.dtype(meta["count"])
    return CountFile(folder, meta["n"], meta["n_genes"], gene, count, meta["kind"], meta["largest"], meta["sha256"])


def _with_hash(meta: dict[str, Any]) -> str:
    return json.dumps(meta | {"meta_sha256": fingerprint(meta)}, indent=1)


def _dates(folder: Path) -> list[list[int]]:
    """Sizes and dates of the arrays, from opened files, of which network file systems ask the server anew."""
    dates = []
    for name in _ARRAYS:
        with (folder / name).open("rb", buffering=0) as file:
            about = os.fstat(file.fileno())
        dates.append([about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino])
    return dates


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _ARRAYS:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def own_counts(measured: Measured, genes: pd.Index, folder: Path) -> CountFile:
    """Copy the counts of genes of a table, in the order of its regions, in one pass, unless the folder has the copy."""
    columns, look = measured.var_names.get_indexer(genes), Look()

    def build(into: Path) -> CountFile:
        checked = checked_blocks(measured.counts, measured.var_names, measured.what, look)
        blocks = ((block[:, columns], total) for _, block, total in checked)
        order = measured.counts.order()
        if order is None:
            return write_counts(into, blocks, len(genes), key, look)
        with tempfile.TemporaryDirectory(dir=into) as scratch:  # in the table's order first
            unordered = write_counts(Path(scratch), blocks, len(genes), key, look)
            return write_counts(into, unordered.blocks(np.argsort(order)), len(genes), key, look)

    key = measured.content_key(genes)
    return _cached(folder, key, build, measured.what)


def _cached(folder: Path, key: str, build: Callable[[Path], CountFile], what: str) -> CountFile:
    """Open counts under a key in the folder of all copies, or build them aside and rename them."""
    home = folder / key[:16]
    if counts := open_counts(home, key):
        logger.info("%s: counts taken from the cache %s", what, home)
        return counts
    scratch = folder / f"{home.name}.partial-{secrets.token_hex(4)}"
    with no_empty_folders_left(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{home.name}.partial-*"):  # by runs that were killed
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)
            scratch.mkdir()
            build(scratch)
            if open_counts(home, key) is None:  # another run may have been faster
                shutil.rmtree(home, ignore_errors=True)
                scratch.replace(home)
        except OSError as error:
            free = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free" if folder.exists() else "it is not there"
            raise StoreError(
                f"{what}: a compact copy of the counts cannot be written to {str(folder)!r} ({error.strerror or error};"
                f" {free}), and nothing was left behind. Free space, or give checkpoint_dir= on another disk."
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    counts = open_counts(home, key)
    if counts is None:
        raise StoreError(f"{what}: the counts in {str(home)!r} were changed while they were written. Try again.")
    logger.info("%s: counts of %d genes in %d regions cached in %s", what, counts.n_genes, counts.n, home)
    return counts


@dataclass(frozen=True)
class Pooling:
    """Which coarse bin each fine bin belongs to, both in row-major order on lattices of the same origin and axes."""

    fine: Lattice
    coarse: Lattice
    factor: int  # fine bins along a coarse one's side

    def band(self, first_row: int, end_row: int) -> tuple[slice, slice, sparse.csr_matrix]:
        """Tell the coarse bins of some rows, the fine bins in them, and the 0-1 matrix that sums these."""
        coarse = slice(*np.searchsorted(self.coarse.row, (first_row, end_row)).tolist())
        fine = slice(*np.searchsorted(self.fine.row, (first_row * self.factor, end_row * self.factor)).tolist())
        cells = self.coarse.row[coarse].astype(np.int64) * 2**32 + self.coarse.col[coarse]
        parents = self.fine.row[fine].astype(np.int64) // self.factor * 2**32 + self.fine.col[fine] // self.factor
        place = pd.Index(cells).get_indexer(parents)
        has_parent = place >= 0
        ones = (np.ones(int(has_parent.sum())), (place[has_parent], np.flatnonzero(has_parent)))
        return coarse, fine, sparse.csr_matrix(ones, shape=(len(cells), len(parents)))

    def sums(self, counts: CountFile, n_bins: int = _BLOCK_BINS) -> Iterator[CountRows]:
        """Sum the counts of fine bins, about so many at a time."""
        first, end = int(self.coarse.row[0]), int(self.coarse.row[-1]) + 1
        n_rows = max(1, int((end - first) * n_bins / max(len(self.fine), 1)))
        for row in range(first, end, n_rows):
            coarse, fine, matrix = self.band(row, min(row + n_rows, end))
            if coarse.stop > coarse.start:
                rows, total = counts.rows(np.arange(fine.start, fine.stop))
                yield (matrix @ rows).tocsr(), np.asarray(matrix @ total)


def find_pooling(fine: Measured, coarse: Measured) -> Pooling | None:
    """Tell whether a table is the sum of another one's bins, and how: all counts of some rows of bins are compared."""
    pooling, why_not = None, ""
    if not (isinstance(fine.regions, Lattice) and isinstance(coarse.regions, Lattice)):
        why_not = "they are not both bins on a lattice"
    elif not (fine.is_complete and coarse.is_complete):
        why_not = "some of their bins are left out"
    elif not fine.var_names.equals(coarse.var_names):
        why_not = "their genes differ"
    elif not (factor := _factor(fine.regions, coarse.regions)):
        why_not = "their lattices do not share axes and origin"
    elif not _are_sums(fine, coarse, pooling := Pooling(fine.regions, coarse.regions, factor)):
        pooling, why_not = None, "their counts are not sums"
    how = f"not pooled from {fine.table_key!r}: {why_not}" if why_not else f"the sum of the bins of {fine.table_key!r}"
    logger.info("%s is %s.", coarse.what, how)
    return pooling


def _factor(fine: Lattice, coarse: Lattice) -> int:
    """Tell how many fine bins lie along a coarse one's side; 0 where lattices do not fit."""
    factor = round(coarse.pitch / fine.pitch)
    rows, cols = (coarse.row[0], coarse.row[-1]), (coarse.col.min(), coarse.col.max())
    centres = np.array([[c + 0.5, r + 0.5, 1.0] for c in cols for r in rows])
    off = (coarse.to_grid - fine.to_grid @ np.diag([factor, factor, 1.0])) @ centres.T
    return factor if factor > 1 and np.abs(off).max() < _CENTRES * fine.pitch else 0


def _are_sums(fine: Measured, coarse: Measured, pooling: Pooling) -> bool:
    rows = np.unique(pooling.coarse.row)
    chosen = np.random.default_rng(0).choice(rows, min(_BANDS, len(rows)), replace=False)
    for row in {*chosen.tolist(), int(rows[0]), int(rows[-1])}:
        parents, children, matrix = pooling.band(row, row + 1)
        if not matrix.shape[1]:
            return False
        sums = matrix @ fine.rows(np.arange(children.start, children.stop))
        counts = coarse.rows(np.arange(parents.start, parents.stop))
        if (sums - counts.astype(np.float64)).count_nonzero():
            return False
    return True


def pooled_counts(fine: CountFile, pooling: Pooling, folder: Path, what: str) -> CountFile:
    """Sum the counts of coarse bins from the copy of the fine ones', unless the folder has the sums."""
    positions = (pooling.fine.row, pooling.fine.col, pooling.coarse.row, pooling.coarse.col)
    key = content_sha256(f"{fine.sha256} {pooling.factor}", *positions)
    # what can be told of the values of the coarse bins was told of the fine ones'
    return _cached(folder, key, lambda into: write_counts(into, pooling.sums(fine), fine.n_genes, key, fine), what)
