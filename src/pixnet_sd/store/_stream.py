"""Arrays of a full size from arrays of a tiny element.

spatialdata and anndata decide how an element lies on disk: they write a tiny one of the same kind, and its arrays are
then given the full shape. Codecs, names and attributes stay theirs.

A table of any number of regions, written chunk by chunk into a scratch store.

spatialdata writes the table of one region; its arrays are given the full shape and filled in the order of the regions.

Shapes of any number of regions, written chunk by chunk into a scratch store.

spatialdata writes the shape of one region; its parquet file is then replaced by one of the same schema with all.

The arrays of a table on disk that grow with its rows: emptied, given the full size, and filled from the top.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from pixnet_sd.errors import StoreError

from ._disk import explain_disk_errors, read_json, write_json
from ._sums import Describe, Express, Expressed, RowInfo, Rows
from ._tables import REGION_KEY
from ._transaction import Staged, consolidate, write_scratch_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    import geopandas as gpd
    import pyarrow as pa
    from anndata import AnnData
    from zarr.codecs import BloscCodec

__all__ = [
    "MakeShapes",
    "MakeTable",
    "TableArrays",
    "batches",
    "memory_shapes",
    "memory_table",
    "stretch",
    "write_shapes",
    "write_table",
]


def stretch(path: Path, shape: Sequence[int], chunks: Sequence[int], compressor: BloscCodec | None = None) -> Any:
    """Change shape and chunks of an array, and empty it.

    Parameters
    ----------
    path
        Folder of the array.
    shape, chunks
        Of the full array.
    compressor
        In place of the library's.

    Returns
    -------
    The array, for writing.

    Raises
    ------
    StoreError
        When its chunks or its fill value are of a kind that is not known here.
    """
    shutil.rmtree(path / "c", ignore_errors=True)
    metadata = read_json(path / "zarr.json")
    if metadata["chunk_grid"]["name"] != "regular" or metadata["fill_value"] not in (0, ""):
        raise StoreError(
            f"The installed version of zarr lays {path.name!r} out in a way that pixnet_sd does not know yet. Install "
            "an older one, or predict into an object in memory and write that."
        )
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":  # one file a chunk suits us
            metadata["codecs"] = codec["configuration"]["codecs"]
    if compressor is not None:
        plain = [codec for codec in metadata["codecs"] if codec["name"] == "bytes"]
        metadata["codecs"] = [*plain, compressor.to_dict()]
    metadata["shape"] = list(shape)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(chunks)
    write_json(path / "zarr.json", metadata, scratch=path)
    return zarr.open_array(str(path), mode="r+")


MakeTable = Callable[..., "AnnData"]
"""`region_table` with all given but ``values``, ``layers``, ``instance_ids``, ``centres_px`` and ``obs``."""

T = TypeVar("T")

CHUNK_BYTES = 4 * 2**20
MAX_CHUNK_ROWS = 2**16
BATCH_CHUNKS = 7  # in one call, so that zarr compresses several at once; small enough to be taken from memory in use

_PLAIN = ("array", "string-array")
_NULLABLE = ("nullable-boolean", "nullable-integer", "nullable-string-array")


def memory_table(rows: Rows, describe: Describe, keep: NDArray[np.bool_], make: MakeTable, express: Express) -> AnnData:
    """The whole table at once; arguments as in `write_table`."""
    values, info = _kept_parts(rows, describe, keep, express, [(0, len(keep))])
    return _made(make, values, info)


def write_table(
    path: Path,
    name: str,
    rows: Rows,
    describe: Describe,
    keep: NDArray[np.bool_],
    make: MakeTable,
    express: Express,
) -> Staged:
    """Write the table of the regions that ``keep`` says, in their order.

    Parameters
    ----------
    path
        Scratch store to make; must not be there.
    name
        Of the table.
    rows
        Sums and weights.
    describe
        Ids, centres and columns by range of regions. Ids have to be different from one another; that is not checked.
    keep
        (n,) which regions the table gets, at least one; each has to have a weight.
    make
        Makes the table of a few regions (`MakeTable`).
    express
        Makes values of sums and weights.

    Returns
    -------
    The table, complete with metadata, ready for `commit`.

    Raises
    ------
    StoreError
        When the disk is full, or anndata lays tables out in a way that is not known here.
    """
    first = int(np.argmax(keep))
    read = partial(_kept_parts, rows, describe, keep, express)
    with explain_disk_errors("Writing the table", path.parent):
        values, info = read([(first, first + 1)])
        (staged,) = write_scratch_store(path, {name: _made(make, values, info)})
        n, n_genes = int(keep.sum()), values.x.shape[1]
        chunk = min(n, MAX_CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * n_genes)))
        table = _OpenTable(path / "tables" / name, n, n_genes, chunk)
        at = 0
        for values, info in _one_ahead(partial(read, pieces) for pieces in batches(keep, chunk * BATCH_CHUNKS)):
            table.write(at, values, info)
            at += len(values.x)
        consolidate(path)
    return staged


def batches(keep: NDArray[np.bool_], size: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges of regions that together hold ``size`` kept ones, at last fewer; no range is longer than that."""
    start, n = 0, len(keep)
    while start < n:
        pieces, missing = [], size
        while missing and start < n:
            stop = min(start + missing, n)
            kept = int(np.count_nonzero(keep[start:stop]))
            if kept:
                pieces.append((start, stop))
            start, missing = stop, missing - kept
        if pieces:
            yield pieces


def _one_ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results in order; while one is looked at, the next is made."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[T] | None = None
        for job in jobs:
            following = pool.submit(job)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _kept_parts(
    rows: Rows,
    describe: Describe,
    keep: NDArray[np.bool_],
    express: Express,
    pieces: Sequence[tuple[int, int]],
) -> tuple[Expressed, RowInfo]:
    """Values and description of the kept regions of some ranges."""
    parts = [_kept_part(rows, describe, keep[start:stop], start) for start, stop in pieces]
    sums, weights, infos = zip(*parts, strict=True)
    values = Expressed.joined([express(part, weight) for part, weight in zip(sums, weights, strict=True)])
    info = RowInfo.joined(infos)
    return values, replace(info, obs={**info.obs, **values.obs})


def _kept_part(
    rows: Rows, describe: Describe, kept: NDArray[np.bool_], start: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], RowInfo]:
    """Sums, weights and description of the kept ones of the regions from ``start`` on."""
    stop = start + len(kept)
    sums, weight = rows.rows(start, stop)
    info = describe(start, stop, weight)
    return (sums, weight, info) if kept.all() else (sums[kept], weight[kept], info.subset(kept))


def _made(make: MakeTable, values: Expressed, info: RowInfo) -> AnnData:
    return make(values=values.x, layers=values.layers, instance_ids=info.ids, centres_px=info.centres_px, obs=info.obs)


class _OpenTable:
    """The arrays of a table on disk that have a row per region."""

    def __init__(self, folder: Path, n: int, n_genes: int, chunk: int) -> None:
        batch = min(n, chunk * BATCH_CHUNKS)
        self._x = stretch(folder / "X", (n, n_genes), (chunk, n_genes))
        kept = sorted(path.parent.name for path in folder.glob("layers/*/zarr.json"))
        self._layers = {name: stretch(folder / "layers" / name, (n, n_genes), (chunk, n_genes)) for name in kept}
        self._spatial = stretch(folder / "obsm" / "spatial", (n, 2), (batch, 2))
        attributes = read_json(folder / "obs" / "zarr.json")["attributes"]
        self._index = _stretch_column(folder / "obs" / attributes["_index"], n, batch)
        self._columns = {key: _stretch_column(folder / "obs" / key, n, batch) for key in attributes["column-order"]}
        del self._columns[REGION_KEY]  # one category: all codes are the 0 of an empty array

    def write(self, at: int, values: Expressed, info: RowInfo) -> None:
        """Write regions from row ``at`` on."""
        rows = slice(at, at + len(values.x))
        self._x[rows] = values.x
        for name, layer in self._layers.items():
            layer[rows] = values.layers[name]
        self._spatial[rows] = np.asarray(info.centres_px, np.float64)
        self._index[rows] = _text(np.asarray(info.ids))
        for name, array in self._columns.items():
            column = np.asarray(info.obs.get(name, info.ids))
            array[rows] = _text(column) if column.dtype.kind in "OUT" else column


def _text(ids: NDArray[Any]) -> NDArray[Any]:
    return ids.astype(np.dtypes.StringDType())


def _stretch_column(path: Path, n: int, batch: int) -> Any:
    """Stretch a column of ``obs``, however anndata encodes it; the array that takes its values."""
    encoding = read_json(path / "zarr.json")["attributes"]["encoding-type"]
    if encoding in _PLAIN:
        return stretch(path, (n,), (batch,))
    if encoding in _NULLABLE:
        stretch(path / "mask", (n,), (batch,))  # nothing is masked
        return stretch(path / "values", (n,), (batch,))
    if encoding == "categorical" and path.name == REGION_KEY:
        return stretch(path / "codes", (n,), (batch,))
    raise StoreError(
        f"The column {path.name!r} of the table is stored as {encoding!r}, which cannot be written in parts. Give it "
        "as numbers."
    )


MakeShapes = Callable[..., "gpd.GeoDataFrame"]
"""`circles_element` or `squares_element` with everything given but the centres and ``index``."""

GROUP_ROWS = 2**16

_GEO = b"geo"


def memory_shapes(describe: Describe, keep: NDArray[np.bool_], make: MakeShapes) -> gpd.GeoDataFrame:
    """The whole element at once; arguments as in `write_shapes`."""
    return _made_of_shapes_writer(make, _described(describe, keep, 0, len(keep)))


def write_shapes(path: Path, name: str, describe: Describe, keep: NDArray[np.bool_], make: MakeShapes) -> Staged:
    """Write the shapes of the regions that ``keep`` says, in their order.

    Parameters
    ----------
    path
        Scratch store to make; must not be there.
    name
        Of the element.
    describe
        Ids and centres by range of regions.
    keep
        (n,) which regions, at least one.
    make
        Makes the element of a few regions (`MakeShapes`).

    Returns
    -------
    The element, complete with metadata, ready for `commit`.

    Raises
    ------
    StoreError
        When the disk is full.
    """
    import pyarrow.parquet as pq

    first = int(np.argmax(keep))
    with explain_disk_errors("Writing the shapes", path.parent):
        (staged,) = write_scratch_store(
            path, {name: _made_of_shapes_writer(make, _described(describe, keep, first, first + 1))}
        )
        file = path / "shapes" / name / "shapes.parquet"
        schema = pq.read_schema(file)
        geo = json.loads(schema.metadata[_GEO])
        geo["columns"][geo["primary_column"]]["bbox"] = _bounds(describe, keep, make)
        schema = schema.with_metadata({**schema.metadata, _GEO: json.dumps(geo).encode()})
        with pq.ParquetWriter(file, schema) as writer:
            for pieces in batches(keep, GROUP_ROWS):
                info = RowInfo.joined([_described(describe, keep, *piece) for piece in pieces])
                writer.write_table(_arrow(_made_of_shapes_writer(make, info), schema, geo))
    return staged


def _described(describe: Describe, keep: NDArray[np.bool_], start: int, stop: int) -> RowInfo:
    return describe(start, stop, None).subset(keep[start:stop])


def _made_of_shapes_writer(make: MakeShapes, info: RowInfo) -> gpd.GeoDataFrame:
    return make(info.centres_px, index=info.ids)


def _arrow(frame: gpd.GeoDataFrame, schema: pa.Schema, geo: dict[str, Any]) -> pa.Table:
    """A chunk in the encoding that spatialdata chose for the element."""
    import pyarrow as pa

    encoding = geo["columns"][geo["primary_column"]]["encoding"]
    kind = "WKB" if encoding == "WKB" else "geoarrow"
    table = pa.table(frame.to_arrow(index=True, geometry_encoding=kind, interleaved=False))
    return table.rename_columns(schema.names).cast(schema)


def _bounds(describe: Describe, keep: NDArray[np.bool_], make: MakeShapes) -> list[float]:
    """Box around all shapes: they are of one size, so those furthest out by their centres tell."""
    outermost = [
        info.subset(np.isin(np.arange(len(xy)), [*xy.argmin(axis=0), *xy.argmax(axis=0)]))
        for pieces in batches(keep, GROUP_ROWS)
        for info in (RowInfo.joined([_described(describe, keep, *piece) for piece in pieces]),)
        for xy in (info.centres_px,)
    ]
    return [float(side) for side in _made_of_shapes_writer(make, RowInfo.joined(outermost)).total_bounds]


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
        self._left.append(_text_of_arrays(values) if values.dtype.kind in "OUT" else values)
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


def _text_of_arrays(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.dtypes.StringDType())


def _widen(path: Path) -> None:
    metadata = read_json(path / "zarr.json")
    metadata["data_type"] = "int64"
    write_json(path / "zarr.json", metadata, scratch=path)
