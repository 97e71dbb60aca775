"""Predicted regions, gathered window by window, then made into a table and shapes: in memory, or streamed to disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pixnet_sd._util import logger

from ._disk import explain_disk_errors
from ._stream import Staged, TableArrays, consolidate, write_scratch_store, write_shapes
from ._sums import FileSums, MemorySums
from ._tables import INSTANCE_KEY, Describe, Express, Expressed, MakeShapes, MakeTable, RowInfo
from ._transaction import Transaction

if TYPE_CHECKING:
    from pixnet_sd.geometry import RegionShare, Window


_Read = Callable[[int, int], tuple[Expressed, RowInfo]]
_DESCRIBED_BYTES = 300  # of a region: id, name, centre, areas, outline
_SHARED = 0.5  # shares of regions that lie in several windows, per region
_BATCH_CHUNKS = 7  # in one call, so that zarr compresses several at once; small enough to be taken from memory in use


class RegionWriter:
    """Takes the regions' shares from the windows of a slide, and makes their table and shapes of them.

    For a backed object the sums lie beside the store. What a killed run has put is taken up by the next one with the
    same fingerprint, which is equal for two runs exactly when their values would be. Use it as a context manager, and
    commit the results inside: leaving it without keeps the sums for the next run. ``n_columns`` of the sums are one for
    each gene where not given, ``n_layers`` those of the table beside its ``X``.
    """

    def __init__(
        self,
        out: Transaction,
        *,
        table_key: str,
        n_regions: int,
        genes: Sequence[str],
        n_columns: int | None = None,
        n_layers: int = 0,
        fingerprint: str,
    ) -> None:
        self._key, self._n_genes = table_key, len(genes)
        self._n_values = len(genes) * (1 + n_layers)
        self.n_columns = n_columns = len(genes) if n_columns is None else n_columns  # of the sums
        self.rows: FileSums | MemorySums
        if out.store is None:
            self.rows = MemorySums(n_regions, n_columns, self._n_values)
        else:
            made_for = {"fingerprint": fingerprint, "genes": list(genes)}
            self.rows = FileSums(out.folder(f"table-{table_key}"), n_regions, n_columns, made_for)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be written at most, those included that are deleted at the end."""
        most = estimate_table_bytes(self.rows.n_rows, self._n_values, self.n_columns)
        return max(0, most - self.rows.stored_bytes)

    def summary(self) -> str:
        """What will be written, in words."""
        begun = isinstance(self.rows, FileSums) and self.rows.n_done
        text = f"table {self._key!r}: {self.rows.n_rows} regions x {self._n_genes} genes"
        return f"{text}; some are there already" if begun else text

    def put(self, share: RegionShare) -> None:
        """Take a window's share of the regions that it touches."""
        self.rows.put(share)

    def is_done(self, window: Window) -> bool:
        """Whether the window was put, by this run or by the one that it takes up."""
        return self.rows.is_done(window)

    def results(
        self,
        describe: Describe,
        *,
        make_table: MakeTable,
        express: Express,
        shapes_key: str | None = None,
        make_shapes: MakeShapes | None = None,
    ) -> dict[str, Any]:
        """Make the elements for `Transaction.commit`, of a backed object on disk, once all windows are put.

        Ids have to differ.
        """
        n = self.rows.n_rows

        def read(start: int, stop: int) -> tuple[Expressed, RowInfo]:
            sums, weight = self.rows.rows(start, stop)
            info = describe(start, stop, weight)
            return express(sums, weight), info

        if isinstance(self.rows, MemorySums):
            elements: dict[str, Any] = {}
            if shapes_key is not None and make_shapes is not None:
                info = describe(0, n, None)
                elements[shapes_key] = make_shapes(info.centres_px, index=info.ids)
            elements[self._key] = make_table(*read(0, n))
            return elements
        staged = []
        for store in ("shapes.zarr", "table.zarr"):
            shutil.rmtree(self.rows.folder / store, ignore_errors=True)  # of a run that was killed while it wrote them
        if shapes_key is not None and make_shapes is not None:
            staged.append(write_shapes(self.rows.folder / "shapes.zarr", shapes_key, describe, n, make_shapes))
        staged.append(_write_table(self.rows.folder / "table.zarr", self._key, read, n, make_table))
        return {item.name: item for item in staged}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if isinstance(self.rows, MemorySums):
            return
        if error_type is not None and self.rows.n_done:
            logger.info("Regions that are done are kept in %s; the same call goes on from there.", self.rows.folder)
        elif error_type is not None:
            self.rows.discard()
        self.rows.close()


def _write_table(path: Path, name: str, read: _Read, n: int, make: MakeTable) -> Staged:
    """Write the table into a new scratch store, chunk by chunk."""
    with explain_disk_errors("Writing the table", path.parent):
        values, info = read(0, 1)
        (staged,) = write_scratch_store(path, {name: make(values, info)})
        table = TableArrays(path / "tables" / name, n, values.x.shape[1])
        for values, info in _batches(read, n, table.chunk_rows * _BATCH_CHUNKS):
            table.add_rows(info.ids, {**info.obs, **values.obs, INSTANCE_KEY: info.ids}, info.centres_px)
            table.add_values(values.x, values.layers)
        table.finish()
        consolidate(path)
    return staged


def _batches(read: _Read, n: int, size: int) -> Iterator[tuple[Expressed, RowInfo]]:
    """Read all regions, ``size`` at a time; while a batch is looked at, the next is read."""
    with ThreadPoolExecutor(1) as pool:
        following: Future[tuple[Expressed, RowInfo]] | None = None
        for start in range(0, n, size):
            current, following = following, pool.submit(read, start, min(start + size, n))
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def estimate_table_bytes(n_regions: int, n_values: int, n_columns: int) -> int:
    """Bytes of disk that a table, its shapes and the sums that they are made from take at most."""
    return int(n_regions * (4 * n_values + (1 + _SHARED) * (4 * n_columns + 16) + _DESCRIBED_BYTES))
