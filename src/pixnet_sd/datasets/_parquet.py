"""Parquet tables written a few rows at a time, and columns of names that no Python text is made for."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ParquetFile", "text_column"]


def text_column(names: NDArray[np.bytes_], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Bytes of equal length as a text column, with nulls where ``missing`` holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    offsets = np.arange(len(names) + 1, dtype=np.int32) * names.dtype.itemsize
    buffers = (pa.py_buffer(part) for part in (offsets, np.ascontiguousarray(names)))
    text = pa.StringArray.from_buffers(len(names), *buffers)
    return text if missing is None else pc.if_else(pa.array(missing), pa.scalar(None, pa.string()), text)


class ParquetFile:
    """A context in which row groups are appended to a parquet file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._writer: Any = None

    def append(self, columns: dict[str, Any]) -> None:
        """Write rows; the first ones decide the types."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        table = pa.table(columns)
        if self._writer is None:
            self._writer = ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
