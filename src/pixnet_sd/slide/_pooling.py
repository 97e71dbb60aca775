"""Coarse bins that are the exact sums of fine ones: seen, and summed from the fine ones' compact counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd.nn.lattice import Lattice

from ._count_cache import cached
from ._count_file import CountFile, Rows, write_counts
from ._measured import Measured

__all__ = ["Pooling", "find_pooling", "pooled_counts"]

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
