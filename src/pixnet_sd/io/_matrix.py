"""Count matrices of Space Ranger, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import DataError

if TYPE_CHECKING:
    import h5py
    import pyarrow as pa

__all__ = ["CountMatrix", "open_h5", "open_matrix"]

PIECE_ENTRIES = 2**21
PIECE_ROWS = 2**17


@dataclass(frozen=True)
class CountMatrix:
    """An open 10x HDF5 file: features by barcodes by columns, which is barcodes by features by rows.

    Attributes
    ----------
    path
        Of the file.
    group
        Its ``matrix``.
    indptr
        (rows + 1,) where rows begin.
    """

    path: Path
    group: h5py.Group
    indptr: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        """Bins or cells."""
        return len(self.indptr) - 1

    @property
    def n_entries(self) -> int:
        """Counts that are not zero."""
        return int(self.indptr[-1])

    @property
    def n_genes(self) -> int:
        """Features."""
        return int(self.group["shape"][0])

    def barcodes(self, start: int, stop: int) -> pa.Array:
        """Names of rows, as text."""
        import pyarrow as pa

        found = self.group["barcodes"][start:stop]
        return pa.array(found, pa.binary()).cast(pa.string())

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about 2²¹ entries and at most 2¹⁷ rows."""
        start = 0
        while start < self.n_rows:
            stop = int(np.searchsorted(self.indptr, self.indptr[start] + PIECE_ENTRIES, side="right")) - 1
            stop = min(max(stop, start + 1), start + PIECE_ROWS, self.n_rows)
            yield start, stop
            start = stop

    def entries(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Counts and genes of the rows ``start`` … ``stop − 1``."""
        span = slice(int(self.indptr[start]), int(self.indptr[stop]))
        return self.group["data"][span], self.group["indices"][span]


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of the folder for reading.

    Raises
    ------
    DataError
        When it cannot be opened.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be opened as HDF5 ({error}). Restore the file.") from error
    with file:
        yield file


@contextmanager
def open_matrix(path: Path) -> Iterator[CountMatrix]:
    """Open a count matrix.

    Raises
    ------
    DataError
        When the file is no count matrix, is truncated or holds no row.
    """
    with open_h5(path) as file:
        group = file.get("matrix")
        needed = {"barcodes", "data", "features", "indices", "indptr", "shape"}
        if group is None or not needed <= set(group):
            raise DataError(f"{path} is no count matrix of Space Ranger. Restore the file.")
        matrix = CountMatrix(path, group, group["indptr"][:].astype(np.int64))
        sizes = {len(group["data"]), len(group["indices"]), matrix.n_entries}
        if len(sizes) > 1 or not len(group["barcodes"]) == matrix.n_rows == group["shape"][1]:
            raise DataError(f"The parts of {path} do not fit one another: the file is damaged. Restore it.")
        if matrix.n_rows == 0:
            raise DataError(f"{path} holds no row: nothing lies on tissue. Leave out its bin size (`bin_um=`).")
        yield matrix
