"""Shapes that are on disk and not in memory: millions of bins of which some thousand tell all there is to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from ._store_parts import elements_on_disk, read_part, skeleton

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["SAMPLE", "StoredShapes", "neighbouring_shapes", "sample_positions", "sample_shapes", "shapes_of"]

SAMPLE = 5000
STRETCH = 2**14  # shapes in the order of the file that are looked at for neighbours
_SAMPLED_GROUPS = 16  # parts of a file that a sample is taken from; each is read whole
_FILE = "shapes.parquet"
_MANY = 2**17
_BATCH_ROWS = 2**16
_BYTES_A_SHAPE = 500  # a quadrangle


def sample_positions(n: int) -> NDArray[np.int64]:
    """Positions, at most `SAMPLE` of them, spread evenly over n, ascending."""
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))


@dataclass(frozen=True)
class StoredShapes:
    """A shapes element of a store, of which only what is asked for is read.

    Attributes
    ----------
    path
        Its folder, ``{store}/shapes/{key}``.
    """

    path: Path

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path / _FILE)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def n_bytes(self) -> int:
        """Roughly what it takes in memory."""
        return len(self) * _BYTES_A_SHAPE

    @property
    def sample(self) -> GeoDataFrame:
        """At most 5,000 of the shapes, spread over all, with the element's transformations."""
        return _sampled(self, self._version())

    @property
    def stretch(self) -> GeoDataFrame:
        """Shapes that follow one another in the file, from its middle: of bins, some rows of their lattice."""
        return _stretched(self, self._version())

    def _version(self) -> tuple[int, ...]:
        """Dates and size of the file: one that changed is read again."""
        about = (self.path / _FILE).stat()
        return about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino

    @property
    def index(self) -> pd.Index:
        """Names of all shapes."""
        name, index = self._index
        if name is None:
            return index
        return pd.Index(self._file.read([name])[name].to_numpy())

    @property
    def _index(self) -> tuple[str | None, pd.Index]:
        """Column with the names of shapes; None and the names themselves where they are counted and not written."""
        columns = (self._file.schema_arrow.pandas_metadata or {}).get("index_columns", [])
        if columns and isinstance(columns[0], str):
            return columns[0], pd.RangeIndex(0)
        span = columns[0] if columns else {"start": 0, "stop": len(self), "step": 1}
        return None, pd.RangeIndex(span["start"], span["stop"], span["step"])

    def load(self) -> GeoDataFrame:
        """All shapes, in memory."""
        return read_part(self.path.parents[1], {"shapes": [self.path.name]}).shapes[self.path.name]


@lru_cache(maxsize=16)
def _sampled(shapes: StoredShapes, version: tuple[int, ...]) -> GeoDataFrame:  # noqa: ARG001
    groups, start, n_rows = _groups(shapes._file)
    wanted = sample_positions(n_rows.sum())
    sample = _read(shapes, groups, wanted)
    name, index = shapes._index
    if name is None:
        before = np.cumsum(n_rows) - n_rows
        of = np.searchsorted(before, wanted, side="right") - 1
        sample.index = index[wanted + (start - before)[of]]
    return sample


@lru_cache(maxsize=4)
def _stretched(shapes: StoredShapes, version: tuple[int, ...]) -> GeoDataFrame:  # noqa: ARG001
    groups, _, n_rows = _groups(shapes._file)
    middle = len(groups) // 2
    first = max(0, (int(n_rows[middle]) - STRETCH) // 2)
    return _read(shapes, groups[middle : middle + 1], np.arange(first, min(first + STRETCH, int(n_rows[middle]))))


def _read(shapes: StoredShapes, groups: list[int], wanted: NDArray[np.int64]) -> GeoDataFrame:
    """Some shapes, counted over some groups of rows, with the element's transformations."""
    from spatialdata import read_zarr

    store, key = shapes.path.parents[1], shapes.path.name
    with TemporaryDirectory() as folder:
        scratch = Path(folder) / "sample.zarr"
        group = skeleton(store, scratch, []).create_group(f"shapes/{key}")
        group.attrs.update(zarr.open_group(shapes.path, mode="r").attrs.asdict())
        with pq.ParquetFile(shapes.path / _FILE) as file:
            taken = pa.Table.from_batches(_take(file, groups, wanted), file.schema_arrow)
            pq.write_table(taken, scratch / "shapes" / key / _FILE)
        found: Any = read_zarr(scratch).shapes[key]
    return found


def _groups(file: pq.ParquetFile) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    """Groups of rows of a file, spread evenly over it, with their first rows and sizes."""
    n_rows = np.array([file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)])
    chosen = np.flatnonzero(n_rows)
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), _SAMPLED_GROUPS)).astype(np.int64))]
    return chosen.tolist(), (np.cumsum(n_rows) - n_rows)[chosen], n_rows[chosen]


def _take(file: pq.ParquetFile, groups: list[int], wanted: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """The wanted rows of some groups, counted over these groups only."""
    start = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
        low, high = np.searchsorted(wanted, (start, start + len(batch)))
        yield batch.take(pa.array(wanted[low:high] - start))
        start += len(batch)


def shapes_of(sdata: SpatialData) -> dict[str, GeoDataFrame | StoredShapes]:
    """Every shapes element of an object: those in memory, and those that only the store behind it has."""
    stored = {key: StoredShapes(path) for key, path in elements_on_disk(sdata, "shapes", _FILE).items()}
    return {**sdata.shapes, **stored}


def sample_shapes(shapes: GeoDataFrame | StoredShapes) -> GeoDataFrame:
    """At most 5,000 shapes of an element, spread evenly over all."""
    return shapes.sample if isinstance(shapes, StoredShapes) else shapes.iloc[sample_positions(len(shapes))]


def neighbouring_shapes(shapes: GeoDataFrame | StoredShapes) -> GeoDataFrame:
    """All shapes of an element, or, of very many, some that follow one another, which of bins are neighbours."""
    if isinstance(shapes, StoredShapes):
        return shapes.stretch
    first = (len(shapes) - STRETCH) // 2
    return shapes if len(shapes) <= _MANY else shapes.iloc[first : first + STRETCH]
