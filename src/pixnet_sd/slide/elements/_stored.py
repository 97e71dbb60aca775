"""Elements of a written store that are not in memory: which there are, and how to read some of them alone.

Shapes that are on disk and not in memory: millions of bins of which some thousand tell all there is to know.

Tables that are on disk and not in memory, and what is asked of tables of either kind.

The short way into a written store: everything that costs little memory, and the rest left where it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from spatialdata import SpatialData, read_zarr

from pixnet_sd._arguments import checked
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = [
    "SAMPLE",
    "StoredShapes",
    "StoredTable",
    "Table",
    "elements_on_disk",
    "leave_on_disk",
    "neighbouring_shapes",
    "obs_column",
    "obs_names",
    "open_store",
    "read_part",
    "sample_positions",
    "sample_shapes",
    "shapes_of",
    "skeleton",
    "tables_of",
    "var_column",
    "var_columns_of",
    "without_region_warnings",
]

_left: WeakKeyDictionary[SpatialData, dict[str, set[str]]] = WeakKeyDictionary()


def leave_on_disk(sdata: SpatialData, kind: str, keys: Iterable[str]) -> None:
    """Note that these elements were left out of an object on purpose, although it holds others of the kind."""
    _left.setdefault(sdata, {})[kind] = set(keys)


def elements_on_disk(sdata: SpatialData, kind: str, file: str) -> dict[str, Path]:
    """Elements that the store behind an object has and the object was opened without.

    An object that holds elements of the kind was opened with them, and what it lacks was taken out of it, unless
    `open_store` noted otherwise. Results of this package do not matter for that, and are always found.

    Parameters
    ----------
    sdata
        The object; without a store, or with one that is not a local folder, there are none.
    kind
        ``"shapes"`` or ``"tables"``.
    file
        What the folder of such an element holds: folders without it are none.

    Returns
    -------
    Their folders by name.
    """
    if not isinstance(sdata.path, Path):
        return {}
    folder, in_memory = sdata.path / kind, getattr(sdata, kind)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    there = {path.name: path for path in found if path.name not in in_memory and (path / file).exists()}
    if sdata in _left:
        wanted = _left[sdata].get(kind, set())
        return {key: path for key, path in there.items() if key in wanted or _is_result(sdata, sdata.path, key)}
    if any(not _is_result(sdata, sdata.path, key) for key in in_memory):
        return {key: path for key, path in there.items() if _is_result(sdata, sdata.path, key)}
    return there


def _is_result(sdata: SpatialData, store: Path, key: str) -> bool:
    """Whether a table, or the shapes made with one, was written by this package."""
    for name in (key, key.removesuffix("_shapes")):
        if name in sdata.tables and "pixnet_sd" in sdata.tables[name].uns:
            return True
        if (store / "tables" / name / "uns" / "pixnet_sd").is_dir():
            return True
    return False


def read_part(store: Path, parts: Mapping[str, Iterable[str]]) -> SpatialData:
    """Some elements of a store, read into memory by spatialdata's own reader, and nothing else of it.

    Parameters
    ----------
    store
        The store.
    parts
        Names of shapes and tables by kind.
    """
    with TemporaryDirectory() as folder:
        scratch = Path(folder) / "part.zarr"
        skeleton(store, scratch, parts)
        for kind, keys in parts.items():
            for key in keys:
                (scratch / kind / key).symlink_to((store / kind / key).resolve(), target_is_directory=True)
        with without_region_warnings():
            return read_zarr(scratch)


@contextmanager
def without_region_warnings() -> Iterator[None]:
    """Keep spatialdata from warning of tables whose regions are not in the object: they are in the store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The table is annotating")
        yield


def skeleton(store: Path, scratch: Path, kinds: Iterable[str]) -> zarr.Group:
    """Start a store of the same format and attributes without elements."""
    like = zarr.open_group(store, mode="r")
    root = zarr.open_group(scratch, mode="w", zarr_format=like.metadata.zarr_format)
    root.attrs.update(like.attrs.asdict())
    for kind in kinds:
        root.create_group(kind)
    return root


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


_BYTES_A_ROW = 200  # a name and some columns


class _Elements(Mapping[str, Any]):
    """Elements of a group, each read when asked for."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group

    def __getitem__(self, key: str) -> Any:
        from anndata.io import read_elem

        return read_elem(self._group[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(list(self._group))


@dataclass(frozen=True)
class StoredTable:
    """A table of a store, of which only what is asked for is read; names of its rows never are.

    Attributes
    ----------
    path
        Its folder, ``{store}/tables/{key}``.
    """

    path: Path

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and genes."""
        x: Any = self._group["X"]
        n_obs, n_vars = x.shape if isinstance(x, zarr.Array) else x.attrs["shape"]
        return int(n_obs), int(n_vars)

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return self.shape[1]

    @cached_property
    def var_names(self) -> pd.Index:
        """Genes."""
        var: Any = self._group["var"]
        return pd.Index(_Elements(var)[var.attrs["_index"]])

    @property
    def var(self) -> Mapping[str, Any]:
        """Columns that describe genes, each read when asked for."""
        group: Any = self._group["var"]
        return _Elements(group)

    @property
    def var_columns(self) -> list[str]:
        """Names of these columns."""
        columns: Any = self._group["var"].attrs["column-order"]
        return list(columns)

    @property
    def uns(self) -> Mapping[str, Any]:
        """Unstructured annotation, each entry read when asked for."""
        uns: Any = self._group.get("uns")
        return {} if uns is None else _Elements(uns)

    @property
    def obs(self) -> Mapping[str, Any]:
        """Columns that describe rows, each read when asked for."""
        group: Any = self._group["obs"]
        return _Elements(group)

    @property
    def obs_columns(self) -> set[str]:
        """Names of these columns."""
        columns: Any = self._group["obs"].attrs["column-order"]
        return set(columns)

    @property
    def X(self) -> Any:
        """Matrix on disk: AnnData's handle of a sparse one, the Zarr array of a dense one."""
        from anndata.io import sparse_dataset

        x: Any = self._group["X"]
        return x if isinstance(x, zarr.Array) else sparse_dataset(x)

    @property
    def n_bytes(self) -> int:
        """Roughly what it takes in memory."""
        x: Any = self._group["X"]
        parts = [x] if isinstance(x, zarr.Array) else [x[name] for name in ("data", "indices", "indptr")]
        return sum(part.nbytes for part in parts) + self.n_obs * _BYTES_A_ROW


Table: TypeAlias = "AnnData | StoredTable"
"""A table in memory, or one that is not."""


def tables_of(sdata: SpatialData) -> dict[str, Table]:
    """Every table of an object: those in memory, and those that only the store behind it has."""
    stored = {key: StoredTable(path) for key, path in elements_on_disk(sdata, "tables", "X").items()}
    return {**sdata.tables, **stored}


def obs_names(table: Table) -> set[str]:
    """Names of the columns that describe rows."""
    return table.obs_columns if isinstance(table, StoredTable) else set(table.obs.columns)


def obs_column(table: Table, name: str) -> Any:
    """One of these columns: a NumPy or pandas array."""
    return table.obs[name] if isinstance(table, StoredTable) else table.obs[name].array


def var_columns_of(table: Table) -> list[str]:
    """Names of the columns that describe genes."""
    return table.var_columns if isinstance(table, StoredTable) else list(table.var.columns)


def var_column(table: Table, name: str) -> Any:
    """One of these columns: a NumPy or pandas array."""
    return table.var[name] if isinstance(table, StoredTable) else table.var[name].array


_SMALL_BYTES = 2**25


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
    from spatialdata import read_zarr

    store = Path(path).expanduser()
    if not ((store / "zarr.json").is_file() or (store / ".zgroup").is_file()):
        raise StoreError(
            f"There is no store at {str(path)!r}. Give the folder that sdata.write(...) made; of a Space Ranger "
            "folder, make one with pixnet_sd.io.convert_visium_hd(folder, store)."
        )
    sdata = read_zarr(store, selection=("images", "labels", "points"))
    stored: dict[str, Mapping[str, Any]] = {"shapes": shapes_of(sdata), "tables": tables_of(sdata)}
    small = {kind: [key for key, element in there.items() if _is_small(element)] for kind, there in stored.items()}
    part = read_part(store, small)
    with without_region_warnings():
        for kind, keys in small.items():
            for key in keys:
                getattr(sdata, kind)[key] = part[key]
    left = {kind: [key for key in there if key not in small[kind]] for kind, there in stored.items()}
    for kind, keys in left.items():
        leave_on_disk(sdata, kind, keys)
    if any(left.values()):
        logger.info(
            "left on disk, to be read when needed: %s", ", ".join(key for keys in left.values() for key in keys)
        )
    return sdata


def _is_small(element: StoredTable | StoredShapes) -> bool:
    return element.n_bytes <= _SMALL_BYTES
