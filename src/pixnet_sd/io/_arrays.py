"""The arrays of a table on disk that grow with its rows: emptied, given the full size, and filled from the top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import StoreError
from pixnet_sd.store._disk import read_json, write_json
from pixnet_sd.store._stretch import stretch
from pixnet_sd.store._table import REGION_KEY
from pixnet_sd.store._table_writer import _stretch_column

__all__ = ["TableArrays"]

ROW_CHUNK = 2**17
ENTRY_CHUNK = 2**18
_INT32_MAX = 2**31 - 1


class TableArrays:
    """A table of one row, as anndata wrote it, that takes the rows of a full one.

    Parameters
    ----------
    folder
        Of the table.
    n_rows, n_genes, n_entries
        Of the full table.

    Raises
    ------
    StoreError
        When anndata lays tables out in a way that is not known here.
    """

    def __init__(self, folder: Path, n_rows: int, n_genes: int, n_entries: int) -> None:
        self._chunk = min(n_rows, ROW_CHUNK)
        self._rows = n_rows
        attributes = read_json(folder / "obs" / "zarr.json")["attributes"]
        self._index = attributes["_index"]
        names = [self._index, *attributes["column-order"]]
        self._columns = {name: _Filler(_stretch_column(folder / "obs" / name, n_rows, self._chunk)) for name in names}
        self._spatial = self._stretched_spatial(folder / "obsm" / "spatial")
        self._data, self._indices, self._indptr = self._stretched_matrix(folder / "X", n_genes, n_entries)
        self._entries = 0

    def add_rows(
        self,
        names: NDArray[Any],
        columns: dict[str, NDArray[Any]],
        centres_px: NDArray[np.float64] | None = None,
    ) -> None:
        """Append names, columns of ``obs`` (others are passed over) and places of a few rows."""
        self._columns[self._index].add(names)
        for name, values in columns.items():
            if name in self._columns:
                self._columns[name].add(values)
        if self._spatial is not None and centres_px is not None:
            self._spatial.add(centres_px)

    def add_counts(self, data: NDArray[Any], genes: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Append the counts of a few rows; ``sizes`` says how many entries each has."""
        self._data.add(data)
        self._indices.add(genes)
        self._indptr.add(self._entries + np.cumsum(sizes))
        self._entries += len(data)

    def finish(self) -> None:
        """Write what waits for a chunk to be full.

        Raises
        ------
        StoreError
            When a column has got no values.
        """
        fillers = {**self._columns, "data": self._data, "indices": self._indices, "indptr": self._indptr}
        if self._spatial is not None:
            fillers["spatial"] = self._spatial
        del fillers[REGION_KEY]  # one category: all codes are the 0 of an empty array
        for name, filler in fillers.items():
            if filler.finish() != filler.array.shape[0]:
                raise StoreError(
                    f"The installed spatialdata-io gives tables the column {name!r}, which pixnet_sd does not know "
                    "yet. Install an older one."
                )

    def centres_px(self, start: int, stop: int) -> NDArray[np.float64]:
        """Places of the rows ``start`` … ``stop − 1`` of a filled table."""
        if self._spatial is None:
            raise StoreError("This table has no places.")
        return np.asarray(self._spatial.array[start:stop])

    def _stretched_spatial(self, path: Path) -> _Filler | None:
        return _Filler(stretch(path, (self._rows, 2), (self._chunk, 2))) if path.is_dir() else None

    def _stretched_matrix(self, folder: Path, n_genes: int, n_entries: int) -> tuple[_Filler, _Filler, _Filler]:
        group = read_json(folder / "zarr.json")
        if group["attributes"].get("encoding-type") != "csr_matrix":
            raise StoreError(
                "The installed anndata stores counts in a way that pixnet_sd does not know yet. Install an older one."
            )
        group["attributes"]["shape"] = [self._rows, n_genes]
        write_json(folder / "zarr.json", group, scratch=folder)
        if n_entries > _INT32_MAX:  # SciPy takes 64 bits for both as soon as one of them needs it
            _widen(folder / "indices")
            _widen(folder / "indptr")
        chunk = min(max(n_entries, 1), ENTRY_CHUNK)
        data, indices = (_Filler(stretch(folder / name, (n_entries,), (chunk,))) for name in ("data", "indices"))
        indptr = _Filler(stretch(folder / "indptr", (self._rows + 1,), (min(self._rows + 1, ROW_CHUNK),)))
        indptr.add(np.zeros(1, np.int64))
        return data, indices, indptr


class _Filler:
    """Appends to an array, in whole chunks, so that none is written twice."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self._at = 0
        self._left: list[NDArray[Any]] = []

    def add(self, values: NDArray[Any]) -> None:
        self._left.append(_text(values) if values.dtype.kind in "OUT" else values)
        waiting, chunk = sum(map(len, self._left)), self.array.chunks[0]
        if waiting >= chunk:
            joined = np.concatenate(self._left)
            whole = waiting // chunk * chunk
            self._write(joined[:whole])
            self._left = [joined[whole:].copy()]

    def finish(self) -> int:
        """Write what waits; how many values there are."""
        if self._left:
            self._write(np.concatenate(self._left))
            self._left = []
        return self._at

    def _write(self, values: NDArray[Any]) -> None:
        if len(values):
            self.array[self._at : self._at + len(values)] = values.astype(self.array.dtype, copy=False)
        self._at += len(values)


def _text(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.dtypes.StringDType())


def _widen(path: Path) -> None:
    metadata = read_json(path / "zarr.json")
    metadata["data_type"] = "int64"
    write_json(path / "zarr.json", metadata, scratch=path)
