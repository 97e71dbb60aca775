"""Elements in scratch stores, of any size: written whole, or chunk by chunk.

spatialdata and anndata decide how an element lies on disk: they write a tiny one of the same kind, whose arrays or
parquet file then take the rows of the full one. Codecs, names and attributes stay theirs. (Lazy anndata would do, and
costs over 1 GB of memory at 10 M bins.)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import spatialdata as sd
import zarr
from spatialdata.models import get_model

from pixnet_sd.errors import StoreError

from ._disk import explain_disk_errors, read_json, write_json
from ._tables import REGION_KEY, Describe, MakeShapes

if TYPE_CHECKING:
    import geopandas as gpd
    from numpy.typing import NDArray
    from zarr.codecs import BloscCodec

    from ._tables import RowInfo


@dataclass(frozen=True)
class Staged:
    """An element that lies complete, with consolidated metadata, at ``{kind}/{name}`` in a scratch store."""

    name: str
    kind: str
    scratch_store: Path


def element_type(element: Any) -> str:
    """Tell the type of an element, or of a staged one: ``"images"``, ``"labels"``, ``"shapes"`` and so on."""
    if isinstance(element, Staged):
        return element.kind
    return get_model(element).__name__[:5].lower() + "s"  # of a model such as Image2DModel or ShapesModel


def write_scratch_store(path: Path, elements: Mapping[str, Any]) -> tuple[Staged, ...]:
    """Write elements completely into a new store at ``path`` with spatialdata's own writer."""
    with warnings.catch_warnings(), chunks_as_given():
        # a table of ours may annotate an element that is already in the user's store
        warnings.filterwarnings("ignore", message="The table is annotating")
        holder = sd.SpatialData.init_from_elements(dict(elements))
        path.parent.mkdir(exist_ok=True)
        holder.write(path, update_sdata_path=False, consolidate_metadata=False)
    consolidate(path)
    return tuple(Staged(name, element_type(element), path) for name, element in elements.items())


def chunks_as_given() -> contextlib.AbstractContextManager[Any]:
    """Keep anndata from leaving the shards to zarr, which it otherwise does, or warns that it will."""
    known = hasattr(ad.settings, "auto_shard_zarr_v3")  # since anndata 0.12.3
    return ad.settings.override(auto_shard_zarr_v3=False) if known else contextlib.nullcontext()


def consolidate(path: Path) -> None:
    """Write consolidated metadata into a scratch store; `SpatialData.write` does so only when it sets ``path``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(str(path))


def stretch(path: Path, shape: Sequence[int], chunks: Sequence[int], compressor: BloscCodec | None = None) -> Any:
    """Change shape and chunks of the array in a folder, and empty it; ``compressor`` replaces the library's.

    Returns the array, for writing. A StoreError tells of chunks or a fill value of a kind that is not known here.
    """
    shutil.rmtree(path / "c", ignore_errors=True)
    metadata = read_json(path / "zarr.json")
    if metadata["chunk_grid"]["name"] != "regular" or metadata["fill_value"] not in (0, ""):
        raise StoreError(
            f"The installed version of zarr lays {path.name!r} out in a way that pixnet_sd does not know yet. Install "
            "an older one, or predict into an object in memory and write that."
        )
    if metadata["codecs"][0]["name"] == "sharding_indexed":  # one file a chunk suits us
        metadata["codecs"] = metadata["codecs"][0]["configuration"]["codecs"]
    if compressor is not None:
        plain = [codec for codec in metadata["codecs"] if codec["name"] == "bytes"]
        metadata["codecs"] = [*plain, compressor.to_dict()]
    metadata["shape"] = list(shape)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(chunks)
    write_json(path / "zarr.json", metadata, scratch=path)
    return zarr.open_array(str(path), mode="r+")


ROW_CHUNK, ENTRY_CHUNK = 2**17, 2**18
MAX_VALUE_ROWS = 2**16
VALUE_BYTES = 4 * 2**20  # of a chunk of a dense ``X``
_INT32_MAX = 2**31 - 1


class TableArrays:
    """A table of one row, as anndata wrote it, emptied, to which the rows of the full one are appended.

    ``n_entries`` is of a sparse ``X``. A StoreError tells of a layout that is not known here.
    """

    def __init__(self, folder: Path, n_rows: int, n_genes: int, n_entries: int | None = None) -> None:
        self._n_rows, self._n_entries = n_rows, 0
        attributes = read_json(folder / "obs" / "zarr.json")["attributes"]
        self._names = attributes["_index"]
        self._arrays: dict[str, _Filler] = {}
        for name in (self._names, *attributes["column-order"]):
            array = _stretch_column(folder / "obs" / name, n_rows)
            if name != REGION_KEY:  # one category: all codes are the 0 of an empty array
                self._arrays[f"obs/{name}"] = _Filler(array)
        if (folder / "obsm" / "spatial").is_dir():
            self._stretch(folder, "obsm/spatial", (n_rows, 2), ROW_CHUNK)
        if n_entries is not None:
            self._stretch_sparse(folder, n_genes, n_entries)
            return
        self.chunk_rows = min(n_rows, MAX_VALUE_ROWS, max(1, VALUE_BYTES // (4 * n_genes)))
        layers = [path.parent.relative_to(folder).as_posix() for path in folder.glob("layers/*/zarr.json")]
        for name in ("X", *layers):
            self._stretch(folder, name, (n_rows, n_genes), self.chunk_rows)

    def add_rows(
        self, names: NDArray[Any], columns: Mapping[str, NDArray[Any]], centres_px: NDArray[np.float64] | None = None
    ) -> None:
        """Append names, columns of ``obs`` (unknown ones are passed over) and centres (m, 2) of m rows."""
        for name, values in {**columns, self._names: names}.items():
            if f"obs/{name}" in self._arrays:
                self._arrays[f"obs/{name}"].add(values)
        if "obsm/spatial" in self._arrays and centres_px is not None:
            self._arrays["obsm/spatial"].add(centres_px)

    def add_values(self, x: NDArray[np.float32], layers: Mapping[str, NDArray[np.float32]]) -> None:
        """Append dense values (m, genes) of m rows."""
        for name, values in {"X": x, **{f"layers/{name}": layer for name, layer in layers.items()}}.items():
            self._arrays[name].add(values)

    def add_counts(self, data: NDArray[Any], genes: NDArray[Any], sizes: NDArray[np.int64]) -> None:
        """Append sparse counts of m rows, of which each has ``sizes`` (m,) entries."""
        self._arrays["X/data"].add(data)
        self._arrays["X/indices"].add(genes)
        self._arrays["X/indptr"].add(self._n_entries + np.cumsum(sizes))
        self._n_entries += len(data)

    def finish(self) -> None:
        """Write what waits for a chunk to be full; a StoreError tells of an array that was not filled."""
        for name, filler in self._arrays.items():
            if filler.finish() != filler.array.shape[0]:
                raise StoreError(
                    f"The installed anndata or spatialdata-io gives tables the column {name.removeprefix('obs/')!r}, "
                    "which pixnet_sd does not know yet. Install an older one."
                )

    def centres_px(self, start: int, stop: int) -> NDArray[np.float64]:
        """Read centres (m, 2) of the rows ``start`` … ``stop − 1`` of a filled table."""
        return np.asarray(self._arrays["obsm/spatial"].array[start:stop])

    def _stretch(self, folder: Path, name: str, shape: tuple[int, ...], chunk: int) -> None:
        chunks = (min(max(shape[0], 1), chunk), *shape[1:])
        self._arrays[name] = _Filler(stretch(folder / name, shape, chunks))

    def _stretch_sparse(self, folder: Path, n_genes: int, n_entries: int) -> None:
        group = read_json(folder / "X" / "zarr.json")
        if group["attributes"].get("encoding-type") != "csr_matrix":
            raise StoreError(
                "The installed anndata stores counts in a way that pixnet_sd does not know yet. Install an older one."
            )
        group["attributes"]["shape"] = [self._n_rows, n_genes]
        write_json(folder / "X" / "zarr.json", group, scratch=folder)
        if n_entries > _INT32_MAX:  # SciPy takes 64 bits for both as soon as one of them needs it
            for name in ("indices", "indptr"):
                metadata = read_json(folder / "X" / name / "zarr.json")
                write_json(folder / "X" / name / "zarr.json", metadata | {"data_type": "int64"}, scratch=folder)
        self._stretch(folder, "X/data", (n_entries,), ENTRY_CHUNK)
        self._stretch(folder, "X/indices", (n_entries,), ENTRY_CHUNK)
        self._stretch(folder, "X/indptr", (self._n_rows + 1,), ROW_CHUNK)
        self._arrays["X/indptr"].add(np.zeros(1, np.int64))


def _stretch_column(path: Path, n: int) -> Any:
    """Stretch a column of ``obs``, however anndata encodes it; the array that takes its values."""
    encoding, chunks = read_json(path / "zarr.json")["attributes"]["encoding-type"], (min(n, ROW_CHUNK),)
    if encoding in ("array", "string-array"):
        return stretch(path, (n,), chunks)
    if encoding in ("nullable-boolean", "nullable-integer", "nullable-string-array"):
        stretch(path / "mask", (n,), chunks)  # nothing is masked
        return stretch(path / "values", (n,), chunks)
    if encoding == "categorical" and path.name == REGION_KEY:
        return stretch(path / "codes", (n,), chunks)
    raise StoreError(
        f"The column {path.name!r} of the table is stored as {encoding!r}, which cannot be written in parts. Give it "
        "as numbers."
    )


class _Filler:
    """Appends to an array, in whole chunks, so that none is written twice."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self._at = 0
        self._waiting: list[NDArray[Any]] = []

    def add(self, values: NDArray[Any]) -> None:
        values = np.asarray(values)  # ids may come as an index of pandas, which zarr does not take
        if {values.dtype.kind, self.array.dtype.kind} & set("OUT"):
            values = values.astype(np.dtypes.StringDType())
        self._waiting.append(values)
        n, chunk = sum(map(len, self._waiting)), self.array.chunks[0]
        if n >= chunk:
            self._write(n // chunk * chunk)

    def finish(self) -> int:
        """Write what waits; how many values there are."""
        self._write(sum(map(len, self._waiting)))
        return self._at

    def _write(self, n: int) -> None:
        """Write the first ``n`` values that wait."""
        if n:
            values = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
            self.array[self._at : self._at + n] = values[:n].astype(self.array.dtype, copy=False)
            self._at, self._waiting = self._at + n, [values[n:].copy()] if n < len(values) else []


GROUP_ROWS = 2**16


def write_shapes(path: Path, name: str, describe: Describe, n: int, make: MakeShapes) -> Staged:
    """Write the shapes, all of one size, of n regions, at least one, into a new scratch store."""

    def made(info: RowInfo) -> gpd.GeoDataFrame:
        return make(info.centres_px, index=info.ids)

    with explain_disk_errors("Writing the shapes", path.parent):
        (staged,) = write_scratch_store(path, {name: made(describe(0, 1, None))})
        file = path / "shapes" / name / "shapes.parquet"
        schema = pq.read_schema(file)
        geo = json.loads(schema.metadata[b"geo"])
        column = geo["columns"][geo["primary_column"]]
        # of shapes of one size, those whose centres are furthest out make the box around all
        boxes = []
        for info in _described(describe, n):
            xy = info.centres_px
            boxes.append(made(info.subset(np.unique([*xy.argmin(axis=0), *xy.argmax(axis=0)]))).total_bounds)
        bounds = np.array(boxes)
        column["bbox"] = [*bounds[:, :2].min(axis=0).tolist(), *bounds[:, 2:].max(axis=0).tolist()]
        schema = schema.with_metadata({**schema.metadata, b"geo": json.dumps(geo).encode()})
        with pq.ParquetWriter(file, schema) as writer:
            for info in _described(describe, n):
                encoding = "WKB" if column["encoding"] == "WKB" else "geoarrow"  # as spatialdata chose
                arrow = made(info).to_arrow(index=True, geometry_encoding=encoding, interleaved=False)
                writer.write_table(pa.table(arrow).rename_columns(schema.names).cast(schema))
    return staged


def _described(describe: Describe, n: int) -> Iterator[RowInfo]:
    for start in range(0, n, GROUP_ROWS):
        yield describe(start, min(start + GROUP_ROWS, n), None)
