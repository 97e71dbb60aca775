"""A table of any number of regions, written chunk by chunk into a scratch store.

spatialdata writes the table of one region; its arrays are given the full shape and filled in the order of the regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pixnet_sd._errors import StoreError

from ._commit import Staged, consolidate, write_scratch_store
from ._disk import explain_disk_errors, read_json
from ._rows import Describe, Express, Expressed, RowInfo, Rows
from ._stretch import stretch
from ._table import REGION_KEY

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

__all__ = ["MakeTable", "batches", "memory_table", "write_table"]

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
