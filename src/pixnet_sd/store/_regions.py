"""Predicted regions, gathered window by window, then made into a table and shapes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError

from ._stream import MakeShapes, MakeTable, memory_shapes, memory_table, write_shapes, write_table
from ._sums import Describe, Express, MemoryRows, RowFile
from ._transaction import Staged, Transaction

if TYPE_CHECKING:
    from pixnet_sd.geometry import RegionShare, Window

__all__ = ["RegionResults", "RegionWriter", "estimate_table_bytes"]

_DESCRIBED_BYTES = 300  # of a region: id, name, centre, areas, outline
_SHARED = 0.5  # shares of regions that lie in several windows, per region


@dataclass(frozen=True)
class RegionResults:
    """What to give to `commit`.

    Attributes
    ----------
    elements
        For objects in memory.
    staged
        For backed objects.
    """

    elements: dict[str, Any] = field(default_factory=dict)
    staged: tuple[Staged, ...] = ()


class RegionWriter:
    """Takes the regions' shares from the windows of a slide; open it with `RegionWriter.open`.

    For a backed object the sums lie beside the store. What a killed run has put is taken up by the next one with the
    same fingerprint. Use it as a context manager, and `commit` the results inside: leaving it without keeps the sums
    for the next run.

    Attributes
    ----------
    rows
        Sums and weights of the regions.
    resumed
        Whether those of a killed run were taken up.
    """

    def __init__(
        self, rows: RowFile | MemoryRows, n_genes: int, n_layers: int, *, table_key: str, lock: ExitStack
    ) -> None:
        self.rows, self._n_genes, self._n_values = rows, n_genes, n_genes * (1 + n_layers)
        self.resumed = isinstance(rows, RowFile) and rows.resumed
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
            rows: RowFile | MemoryRows
            if out.store is None:
                rows = MemoryRows(n_regions, n_columns, n_values)
            else:
                folder = out.folder(f"table-{table_key}")
                rows = RowFile(folder, n_regions, n_columns, {"fingerprint": fingerprint, "genes": list(genes)})
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
        there = (
            "; some are there already" if isinstance(self.rows, RowFile) and self.resumed and self.rows.n_done else ""
        )
        return f"table {self._key!r}: {self.rows.n_rows} regions x {self._n_genes} genes{there}"

    def put(self, share: RegionShare) -> None:
        """Take a window's share of the regions that it touches; see `Rows.put`."""
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
    ) -> RegionResults:
        """Make the elements, for a backed object on disk, once all windows are put.

        Regions that hold no pixel of the slide are left out.

        Parameters
        ----------
        describe
            Ids, centres and columns by range of regions.
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
        shapes = {} if shapes_key is None or make_shapes is None else {shapes_key: make_shapes}
        if isinstance(self.rows, MemoryRows):
            elements: dict[str, Any] = {key: memory_shapes(describe, keep, make) for key, make in shapes.items()}
            elements[self._key] = memory_table(self.rows, describe, keep, make_table, express)
            return RegionResults(elements)
        folder = self.rows.folder
        for store in ("shapes.zarr", "table.zarr"):
            shutil.rmtree(folder / store, ignore_errors=True)  # of a run that was killed while it wrote them
        staged = [write_shapes(folder / "shapes.zarr", key, describe, keep, make) for key, make in shapes.items()]
        staged.append(write_table(folder / "table.zarr", self._key, self.rows, describe, keep, make_table, express))
        return RegionResults(staged=tuple(staged))

    def abort(self) -> None:
        """Delete what was put."""
        if isinstance(self.rows, RowFile):
            self.rows.discard()
        self.close()

    def close(self) -> None:
        """Let go of the rows; another run may then take them up."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and isinstance(self.rows, RowFile):
            if self.rows.n_done:
                logger.info("Regions that are done are kept in %s; the same call goes on from there.", self.rows.folder)
            else:
                self.rows.discard()
        self.close()


def estimate_table_bytes(n_regions: int, n_values: int, n_columns: int) -> int:
    """Bytes of disk that a table, its shapes and the sums that they are made from take at most."""
    return int(n_regions * (4 * n_values + (1 + _SHARED) * 4 * n_columns + _DESCRIBED_BYTES))


def _missing_bytes(rows: RowFile | MemoryRows, n_values: int) -> int:
    there = rows.stored_bytes if isinstance(rows, RowFile) else 0
    return max(0, estimate_table_bytes(rows.n_rows, n_values, rows.n_columns) - there)
