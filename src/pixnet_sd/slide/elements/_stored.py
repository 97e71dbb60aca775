"""Shapes and tables of an object, those in memory and those that only the store behind it has.

`open_store` leaves on disk what is big, ``spatialdata.read_zarr(..., selection=...)`` what was not asked for. So
everybody asks `shapes_of` and `tables_of`, never the object itself. `_left_on_disk` alone decides what counts as left
on disk, and looks in the store at every call, because results and other processes add to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from spatialdata import SpatialData, read_zarr

from pixnet_sd._arguments import checked
from pixnet_sd._notes import TABLE_NOTE, table_note
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

_LEFT = "_pixnet_sd_left"  # attribute of an object: names by group of what `open_store` left on disk; copies keep it
_SMALL_BYTES = 2**25  # of an element that `open_store` loads
_BYTES_A_SHAPE, _BYTES_A_ROW = 500, 200  # in memory: a quadrangle; a name and some columns
_STRETCH = 2**14  # shapes in the order of the file that are looked at for neighbours
_SAMPLED_GROUPS = 16  # groups of rows of a file that a sample is taken from; each is read whole
_MANY_SHAPES = 2**17
_BATCH_ROWS = 2**16
_FILE = "shapes.parquet"


def _left_on_disk(sdata: SpatialData, group: str, file: str) -> dict[str, Path]:
    """Folders of the shapes or tables, told by a file in them, that the store has and the object was opened without.

    These are what `open_store` left, or results of this package.
    """
    if not isinstance(sdata.path, Path):
        return {}
    in_memory = getattr(sdata, group)
    folders = [path.parent for path in sorted((sdata.path / group).glob(f"*/{file}"))]
    stored = {path.name: path for path in folders if path.name not in in_memory}
    left: Mapping[str, Iterable[str]] | None = getattr(sdata, _LEFT, None)
    # what an object lacks that was opened otherwise, with elements of the type besides results, was taken out of it
    if left is None and all(_is_result(sdata, key) for key in in_memory):
        return stored
    wanted = () if left is None else left[group]
    return {key: path for key, path in stored.items() if key in wanted or _is_result(sdata, key)}


def _is_result(sdata: SpatialData, key: str) -> bool:
    """Whether a table, or the shapes made with one, was written by this package."""
    return any(
        (name in sdata.tables and table_note(sdata.tables[name]) is not None)
        or (sdata.path / "tables" / name / TABLE_NOTE).is_dir()
        for name in (key, key.removesuffix("_shapes"))
    )


def shapes_of(sdata: SpatialData) -> dict[str, Shapes]:
    """Every shapes element of an object: those in memory, and those that only the store behind it has."""
    stored = {key: StoredShapes(path) for key, path in _left_on_disk(sdata, "shapes", _FILE).items()}
    return {**sdata.shapes, **stored}


def tables_of(sdata: SpatialData) -> dict[str, Table]:
    """Every table of an object: those in memory, and those that only the store behind it has."""
    stored = {key: StoredTable(path) for key, path in _left_on_disk(sdata, "tables", "X").items()}
    return {**sdata.tables, **stored}


@checked(StoreError)
def open_store(path: str | Path) -> SpatialData:
    """Open a written store without loading what is big in it.

    `spatialdata.read_zarr` loads every table and every polygon, which for Visium HD is gigabytes. Here tables and
    shapes that would take more than about 32 MiB stay on disk. :func:`pixnet_sd.tl.fit`,
    :func:`~pixnet_sd.tl.predict` and :func:`~pixnet_sd.tl.evaluate` find them in the store and read what they need
    when they need it; name them in ``table_key=`` and ``shapes_key=`` as if they were in the object.

    Parameters
    ----------
    path
        The store, as ``SpatialData.write`` makes it.

    Returns
    -------
    The object, backed by the store: images, labels and points (which are lazy), and small tables and shapes.

    Raises
    ------
    StoreError
        If there is no store.
    """
    store = Path(path).expanduser()
    if not ((store / "zarr.json").is_file() or (store / ".zgroup").is_file()):
        raise StoreError(
            f"There is no store at {str(path)!r}. Give the folder that sdata.write(...) made; of a Space Ranger "
            "folder, make one with pixnet_sd.io.convert_visium_hd(folder, store)."
        )
    sdata = read_zarr(store, selection=("images", "labels", "points"))
    stored: dict[str, Mapping[str, Any]] = {"shapes": shapes_of(sdata), "tables": tables_of(sdata)}
    left = {group: [key for key in stored[group] if stored[group][key].n_bytes > _SMALL_BYTES] for group in stored}
    small = {group: [key for key in stored[group] if key not in left[group]] for group in stored}
    loaded = read_elements(store, small)
    with _no_region_warnings():
        for group, keys in small.items():
            getattr(sdata, group).update((key, loaded[key]) for key in keys)  # in their order
    setattr(sdata, _LEFT, left)
    if any(left.values()):
        logger.info("left on disk, to be read when needed: %s", ", ".join([*left["shapes"], *left["tables"]]))
    return sdata


def read_elements(store: Path, keys: Mapping[str, Iterable[str]]) -> SpatialData:
    """Read elements of a store, named by group of it, with spatialdata's own reader, and nothing else."""
    with TemporaryDirectory() as folder:
        scratch = Path(folder) / "part.zarr"
        root = _skeleton(store, scratch)
        for group in keys:
            root.create_group(group)
            for key in keys[group]:
                (scratch / group / key).symlink_to((store / group / key).resolve(), target_is_directory=True)
        with _no_region_warnings():
            return read_zarr(scratch)


@contextmanager
def _no_region_warnings() -> Iterator[None]:
    """Keep spatialdata from warning of tables whose regions are not in the object: they are in the store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The table is annotating")
        yield


def _skeleton(store: Path, scratch: Path) -> zarr.Group:
    """Start a store of the same format and attributes without elements."""
    like = zarr.open_group(store, mode="r")
    return zarr.open_group(scratch, mode="w", zarr_format=like.metadata.zarr_format, attributes=like.attrs.asdict())


def sample_positions(n: int, at_most: int = 5000) -> NDArray[np.int64]:
    """Positions, spread evenly over n, ascending."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).astype(np.int64))


@dataclass(frozen=True)
class StoredShapes:
    """A shapes element of a store, ``{store}/shapes/{key}``, of which only what is asked for is read."""

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

    def sample(self, *, in_sequence: bool = False) -> GeoDataFrame:
        """At most 5,000 of the shapes spread over all, or many that follow one another; of a changed file read anew."""
        about = (self.path / _FILE).stat()
        version = about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino
        return _read_some(self, version, in_sequence=in_sequence)

    @property
    def index(self) -> pd.Index:
        """Names of all shapes."""
        return pq.read_pandas(self.path / _FILE, columns=[]).to_pandas().index

    def load(self) -> GeoDataFrame:
        """All shapes, in memory."""
        return read_elements(self.path.parents[1], {"shapes": [self.path.name]}).shapes[self.path.name]


Shapes: TypeAlias = "GeoDataFrame | StoredShapes"


@lru_cache(maxsize=16)
def _read_some(shapes: StoredShapes, version: tuple[int, ...], *, in_sequence: bool) -> GeoDataFrame:  # noqa: ARG001
    """Shapes spread over groups of rows of the file, or a sequence from the middle group, with transformations."""
    metadata = shapes._file.metadata
    n_rows = np.array([metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)])
    filled = np.flatnonzero(n_rows)
    groups = filled[sample_positions(len(filled), _SAMPLED_GROUPS)]
    if in_sequence:
        groups = groups[[len(groups) // 2]]
        first = max(0, (n_rows[groups[0]] - _STRETCH) // 2)
        positions = np.arange(first, min(first + _STRETCH, n_rows[groups[0]]))
    else:
        positions = sample_positions(n_rows[groups].sum())
    store, key = shapes.path.parents[1], shapes.path.name
    with TemporaryDirectory() as folder, pq.ParquetFile(shapes.path / _FILE) as file:
        scratch = Path(folder) / "sample.zarr"
        group = _skeleton(store, scratch).create_group(f"shapes/{key}")
        group.attrs.update(zarr.open_group(shapes.path, mode="r").attrs.asdict())
        batches, start = [], 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups.tolist()):
            low, high = np.searchsorted(positions, (start, start + len(batch)))
            batches.append(batch.take(pa.array(positions[low:high] - start)))
            start += len(batch)
        pq.write_table(pa.Table.from_batches(batches, file.schema_arrow), scratch / "shapes" / key / _FILE)
        rows: Any = read_zarr(scratch).shapes[key]
    if isinstance(rows.index, pd.RangeIndex):  # of names that are counted and not written
        before = np.cumsum(n_rows[groups]) - n_rows[groups]
        which = np.searchsorted(before, positions, side="right") - 1
        rows.index = shapes.index[positions - before[which] + (np.cumsum(n_rows) - n_rows)[groups][which]]
    return rows


def sample_shapes(shapes: Shapes) -> GeoDataFrame:
    """At most 5,000 shapes of an element, spread evenly over all."""
    return shapes.sample() if isinstance(shapes, StoredShapes) else shapes.iloc[sample_positions(len(shapes))]


def neighbouring_shapes(shapes: Shapes) -> GeoDataFrame:
    """All shapes of an element, or, of very many, some that follow one another, which of bins are neighbours."""
    if isinstance(shapes, StoredShapes):
        return shapes.sample(in_sequence=True)
    first = (len(shapes) - _STRETCH) // 2
    return shapes if len(shapes) <= _MANY_SHAPES else shapes.iloc[first : first + _STRETCH]


class _Elements(Mapping[str, Any]):
    """Elements of a group of a table, columns of a data frame say, each read when asked for."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getitem__(self, key: str) -> Any:
        return read_elem(self._group[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(list(self._group))

    @property
    def columns(self) -> list[str]:
        """Names of the columns of a data frame."""
        return list(self._group.attrs["column-order"])


@dataclass(frozen=True)
class StoredTable:
    """A table of a store, ``{store}/tables/{key}``, of which only what is asked for is read; row names never are.

    Attributes are those of `anndata.AnnData`, with mappings of columns for data frames.
    """

    path: Path

    @cached_property
    def _group(self) -> Any:
        return zarr.open_group(self.path, mode="r")

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and genes."""
        n_obs, n_vars = self.X.shape
        return int(n_obs), int(n_vars)

    n_obs = property(lambda self: self.shape[0])
    n_vars = property(lambda self: self.shape[1])

    @property
    def X(self) -> Any:
        """Matrix on disk: AnnData's handle of a sparse one, the Zarr array of a dense one."""
        x = self._group["X"]
        return x if isinstance(x, zarr.Array) else sparse_dataset(x)

    @cached_property
    def var_names(self) -> pd.Index:
        """Genes."""
        return pd.Index(self.var[self._group["var"].attrs["_index"]])

    var = property(lambda self: _Elements(self._group["var"]))
    obs = property(lambda self: _Elements(self._group["obs"]))
    uns = property(lambda self: _Elements(self._group["uns"]) if "uns" in self._group else {})

    @property
    def n_bytes(self) -> int:
        """Roughly what it takes in memory."""
        x = self._group["X"]
        arrays = [x] if isinstance(x, zarr.Array) else [x[name] for name in ("data", "indices", "indptr")]
        return sum(array.nbytes for array in arrays) + self.n_obs * _BYTES_A_ROW


Table: TypeAlias = "AnnData | StoredTable"


def obs_column(table: Table, name: str) -> Any:
    """A column that describes rows: a NumPy or pandas array."""
    column = table.obs[name]
    return column.array if isinstance(column, pd.Series) else column
