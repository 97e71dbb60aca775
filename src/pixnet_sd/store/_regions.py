"""Predicted regions, gathered window by window, then made into a table and shapes: in memory, or streamed to disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError

from ._disk import explain_disk_errors
from ._stream import Staged, TableArrays, consolidate, write_scratch_store, write_shapes
from ._sums import FileSums, MemorySums
from ._tables import INSTANCE_KEY, Describe, Express, Expressed, MakeShapes, MakeTable, RowInfo
from ._transaction import Transaction

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray

    from pixnet_sd.geometry import RegionShare, Window

__all__ = ["RegionWriter", "estimate_table_bytes"]

_DESCRIBED_BYTES = 300  # of a region: id, name, centre, areas, outline
_SHARED = 0.5  # shares of regions that lie in several windows, per region
_BATCH_CHUNKS = 7  # in one call, so that zarr compresses several at once; small enough to be taken from memory in use

T = TypeVar("T")


class RegionWriter:
    """Takes the regions' shares from the windows of a slide; open it with `RegionWriter.open`.

    For a backed object the sums lie beside the store. What a killed run has put is taken up by the next one with the
    same fingerprint. Use it as a context manager, and `commit` the results inside: leaving it without keeps the sums
    for the next run.

    Attributes
    ----------
    rows
        Sums and weights of the regions.
    """

    def __init__(
        self, rows: FileSums | MemorySums, n_genes: int, n_layers: int, *, table_key: str, lock: ExitStack
    ) -> None:
        self.rows, self._n_genes, self._n_values = rows, n_genes, n_genes * (1 + n_layers)
        self._key, self._lock = table_key, lock

    @classmethod
    def open(
        cls,
        out: Transaction,
        *,
        table_key: str,
        n_regions: int,
        genes: Sequence[str],
        n_columns: int | None = None,
        n_layers: int = 0,
        fingerprint: str,
    ) -> RegionWriter:
        """Start a table, or take up a partial one.

        Parameters
        ----------
        out
            Of the object that the table is for. One in memory keeps it there.
        table_key
            Name of the table to be.
        n_regions
            Regions that are asked for.
        genes
            Columns of the table.
        n_columns
            Columns of the sums; None: one for each gene.
        n_layers
            Layers of the table, beside its ``X``.
        fingerprint
            Text that is equal for two runs exactly when their values would be (model, slide, regions, settings, sizes
            of the windows).

        Raises
        ------
        StoreError
            Too little memory, another run writing the same table.
        """
        n_genes = len(genes)
        n_values = n_genes * (1 + n_layers)
        n_columns = n_genes if n_columns is None else n_columns
        with ExitStack() as stack:
            rows: FileSums | MemorySums
            if out.store is None:
                rows = MemorySums(n_regions, n_columns, n_values)
            else:
                folder = out.folder(f"table-{table_key}")
                rows = FileSums(folder, n_regions, n_columns, {"fingerprint": fingerprint, "genes": list(genes)})
                stack.callback(rows.close)
            return cls(rows, n_genes, n_layers, table_key=table_key, lock=stack.pop_all())

    @property
    def n_columns(self) -> int:
        """Columns of the sums."""
        return self.rows.n_columns

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be written at most, those included that are deleted at the end."""
        return _missing_bytes(self.rows, self._n_values)

    def summary(self) -> str:
        """What will be written, in words."""
        begun = isinstance(self.rows, FileSums) and self.rows.n_done
        text = f"table {self._key!r}: {self.rows.n_rows} regions x {self._n_genes} genes"
        return f"{text}; some are there already" if begun else text

    def put(self, share: RegionShare) -> None:
        """Take a window's share of the regions that it touches; see `RegionSums.put`."""
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

        Regions that hold no pixel of the slide are left out.

        Parameters
        ----------
        describe
            Ids, centres and columns by range of regions; ids are different from one another, which is not checked.
        make_table
            `region_table`, all given but ``values``, ``layers``, ``instance_ids``, ``centres_px`` and ``obs``.
        express
            Makes the table's values of sums and weights: `expression`, where genes were summed.
        shapes_key, make_shapes
            Name, and `circles_element` or `squares_element` with everything given but the centres and ``index``.

        Raises
        ------
        DataError
            When no region holds a pixel of the slide.
        StoreError
            When the disk is full; the same call goes on from the sums.
        """
        keep = self.rows.keep()
        if not keep.any():
            raise DataError(
                f"None of the {len(keep)} regions holds a pixel of the slide: are they those of this image?"
            )
        if not keep.all():
            logger.warning("%d regions hold no pixel of the slide and are left out of the table", (~keep).sum())
        rows = _KeptRows(self.rows, keep, describe, express)
        if isinstance(self.rows, MemorySums):
            elements: dict[str, Any] = {}
            if shapes_key is not None and make_shapes is not None:
                info = describe(0, len(keep), None).subset(keep)
                elements[shapes_key] = make_shapes(info.centres_px, index=info.ids)
            elements[self._key] = _made(make_table, *rows.read(0, len(keep)))
            return elements
        staged = []
        for store in ("shapes.zarr", "table.zarr"):
            shutil.rmtree(self.rows.folder / store, ignore_errors=True)  # of a run that was killed while it wrote them
        if shapes_key is not None and make_shapes is not None:
            staged.append(write_shapes(self.rows.folder / "shapes.zarr", shapes_key, describe, keep, make_shapes))
        staged.append(_write_table(self.rows.folder / "table.zarr", self._key, rows, make_table))
        return {item.name: item for item in staged}

    def close(self) -> None:
        """Let go of the rows; another run may then take them up."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and isinstance(self.rows, FileSums):
            if self.rows.n_done:
                logger.info("Regions that are done are kept in %s; the same call goes on from there.", self.rows.folder)
            else:
                self.rows.discard()
        self.close()


@dataclass(frozen=True)
class _KeptRows:
    """Expression and description of the regions that a table gets."""

    sums: FileSums | MemorySums
    keep: NDArray[np.bool_]
    describe: Describe
    express: Express

    def read(self, start: int, stop: int) -> tuple[Expressed, RowInfo]:
        """Read those of the regions ``start`` … ``stop − 1``."""
        kept = self.keep[start:stop]
        sums, weight = self.sums.rows(start, stop)
        info = self.describe(start, stop, weight)
        if not kept.all():
            sums, weight, info = sums[kept], weight[kept], info.subset(kept)
        values = self.express(sums, weight)
        return values, replace(info, obs={**info.obs, **values.obs})

    def batches(self, size: int) -> Iterator[tuple[Expressed, RowInfo]]:
        """Read all, ``size`` regions at a time; while a batch is looked at, the next is read."""
        starts = [start for start in range(0, len(self.keep), size) if self.keep[start : start + size].any()]
        return _one_ahead(partial(self.read, start, min(start + size, len(self.keep))) for start in starts)


def _write_table(path: Path, name: str, rows: _KeptRows, make: MakeTable) -> Staged:
    """Write the table into a new scratch store, chunk by chunk."""
    first = int(rows.keep.argmax())
    with explain_disk_errors("Writing the table", path.parent):
        values, info = rows.read(first, first + 1)
        (staged,) = write_scratch_store(path, {name: _made(make, values, info)})
        table = TableArrays(path / "tables" / name, int(rows.keep.sum()), values.x.shape[1])
        for values, info in rows.batches(table.chunk_rows * _BATCH_CHUNKS):
            table.add_rows(info.ids, {**info.obs, INSTANCE_KEY: info.ids}, info.centres_px)
            table.add_values(values.x, values.layers)
        table.finish()
        consolidate(path)
    return staged


def _made(make: MakeTable, values: Expressed, info: RowInfo) -> AnnData:
    return make(values=values.x, layers=values.layers, instance_ids=info.ids, centres_px=info.centres_px, obs=info.obs)


def _one_ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield results in order; while one is looked at, the next is made."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for job in jobs:
            following = pool.submit(job)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def estimate_table_bytes(n_regions: int, n_values: int, n_columns: int) -> int:
    """Bytes of disk that a table, its shapes and the sums that they are made from take at most."""
    return int(n_regions * (4 * n_values + (1 + _SHARED) * (4 * n_columns + 16) + _DESCRIBED_BYTES))


def _missing_bytes(rows: FileSums | MemorySums, n_values: int) -> int:
    stored = rows.stored_bytes if isinstance(rows, FileSums) else 0
    return max(0, estimate_table_bytes(rows.n_rows, n_values, rows.n_columns) - stored)
