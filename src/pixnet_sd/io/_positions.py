"""Places of the bins of a count matrix: two files joined by barcode, a few rows at a time.

Space Ranger writes both in the order of the lattice. Then one pass over both is enough; where the order differs, the
rest is joined through hashes of the barcodes, which takes more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger

from ._matrix import PIECE_ROWS, CountMatrix

__all__ = ["COLUMNS", "PlacedBins", "check_places", "open_positions", "placed_bins"]

COLUMNS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
"""Columns of the file after ``barcode``."""


@dataclass(frozen=True)
class PlacedBins:
    """Consecutive rows of a matrix.

    Attributes
    ----------
    barcodes
        (m,) text.
    columns
        Column of the positions → (m,) numbers.
    """

    barcodes: pa.Array
    columns: dict[str, NDArray[Any]]

    @property
    def centres_px(self) -> NDArray[np.float64]:
        """(m, 2) x, y in pixels of the full image."""
        x, y = self.columns["pxl_col_in_fullres"], self.columns["pxl_row_in_fullres"]
        return np.stack([x, y], axis=1).astype(np.float64)


def open_positions(path: Path) -> pq.ParquetFile:
    """Open the places of all bins.

    Raises
    ------
    DataError
        When the file is of another kind.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be opened as parquet ({error}). Restore the file.") from error
    if file.schema_arrow.names[: len(COLUMNS) + 1] != ["barcode", *COLUMNS]:
        raise DataError(
            f"{path} has the columns {', '.join(file.schema_arrow.names)} instead of barcode, {', '.join(COLUMNS)}. "
            "Restore the file."
        )
    return file


def check_places(matrix: CountMatrix, positions: Path) -> None:
    """Look for the first row of a matrix, so that swapped files are found before any work.

    Raises
    ------
    DataError
        When it has no place.
    """
    first = matrix.barcodes(0, 1)
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=PIECE_ROWS, columns=["barcode"]):
            if pc.is_in(first, value_set=batch["barcode"])[0].as_py():
                return
    raise _mismatch(f"The first barcode of {matrix.path}, {first[0]}, is", positions)


def placed_bins(matrix: CountMatrix, positions: Path) -> Iterator[PlacedBins]:
    """The rows of a matrix with their places, piece by piece, in the order of the matrix.

    Raises
    ------
    DataError
        When a barcode of the matrix has no place, or two.
    """
    at = 0
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=PIECE_ROWS):
            expected = matrix.barcodes(at, at + len(batch))
            found = pc.index_in(batch["barcode"], value_set=expected)
            rows = pc.drop_null(found).to_numpy(zero_copy_only=False)
            if not np.array_equal(rows, np.arange(len(rows))):
                break
            if len(rows):
                yield PlacedBins(expected.slice(0, len(rows)), _numbers(batch.filter(found.is_valid())))
                at += len(rows)
    if at < matrix.n_rows:
        logger.info(
            "The rows of %s are not in the order of %s: joining the last %d by hash, which takes 60 bytes each.",
            matrix.path.name,
            positions.name,
            matrix.n_rows - at,
        )
        yield from _placed_by_hash(matrix, positions, at)


def _numbers(batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
    return {name: batch[name].to_numpy(zero_copy_only=False) for name in COLUMNS}


def _placed_by_hash(matrix: CountMatrix, positions: Path, first: int) -> Iterator[PlacedBins]:
    """As `placed_bins`, for the rows from ``first`` on, whatever their order."""
    pieces = [(start, min(start + PIECE_ROWS, matrix.n_rows)) for start in range(first, matrix.n_rows, PIECE_ROWS)]
    hashes = np.concatenate([_hashes(matrix.barcodes(*piece)) for piece in pieces])
    order = np.argsort(hashes)
    hashes = hashes[order]
    times = np.zeros(len(hashes), np.uint8)
    columns: dict[str, NDArray[Any]] = {}
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=PIECE_ROWS):
            wanted = _hashes(batch["barcode"])
            slot = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            hit = hashes[slot] == wanted
            rows = order[slot[hit]]
            np.add.at(times, rows, 1)
            for name, values in _numbers(batch).items():
                columns.setdefault(name, np.zeros(len(hashes), values.dtype))[rows] = values[hit]
    _check_times(times, bool((hashes[1:] == hashes[:-1]).any()), matrix.path, positions)
    for start, stop in pieces:
        part = {name: values[start - first : stop - first] for name, values in columns.items()}
        yield PlacedBins(matrix.barcodes(start, stop), part)


def _hashes(barcodes: pa.Array) -> NDArray[np.uint64]:
    return np.asarray(pd.util.hash_array(barcodes.to_numpy(zero_copy_only=False), categorize=False))


def _check_times(times: NDArray[np.uint8], repeated: bool, matrix: Path, positions: Path) -> None:
    """Every row has one place."""
    if repeated or (times > 1).any():
        raise DataError(f"Barcodes come more than once in {matrix} or {positions}: a file is damaged. Restore both.")
    missing = int((times == 0).sum())
    if missing:
        raise _mismatch(f"{missing} barcodes of {matrix} are", positions)


def _mismatch(what: str, positions: Path) -> DataError:
    return DataError(
        f"{what} not in {positions}: the two files are of different bin sizes or of different runs. Restore both from "
        "one run."
    )
