"""Predicted and measured expression of the same regions and genes, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd._errors import DataError, ElementError
from pixnet_sd.slide import (
    Counts,
    Table,
    TableLink,
    check_genes,
    check_instances,
    checked_totals,
    counts_of,
    genes_of,
    log_normalise,
    obs_column,
    table_link,
    tables_of,
)

from ._current import check_current

__all__ = ["Matched", "matched_values"]


_BLOCK_VALUES = 2**25  # of predicted expression in memory: 128 MiB


@dataclass(frozen=True, eq=False)
class Matched:
    """Log-normalised expression of regions and genes that two tables share, read in blocks of regions.

    Attributes
    ----------
    genes
        Names, shape (M,).
    predicted, rows, columns
        Predicted expression, in memory or on disk, and where these regions and genes are in it.
    counts, positions, total
        Counts of these regions, where these genes are in them, and their sums over all genes.
    target_sum
        Of the predicted expression.
    """

    genes: pd.Index
    predicted: Any
    rows: NDArray[np.intp]
    columns: NDArray[np.integer]
    counts: Counts
    positions: NDArray[np.integer]
    total: NDArray[np.float64]
    target_sum: float

    def blocks(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Predicted and measured expression of some regions after others, (n, M) each."""
        step = max(1, _BLOCK_VALUES // max(1, self.predicted.shape[1]))
        for place, block in self.counts.blocks():
            for start in range(place.start, place.stop, step):
                stop = min(start + step, place.stop)
                some = block[start - place.start : stop - place.start][:, self.positions]
                predicted = _rows(self.predicted, self.rows[start:stop])[:, self.columns]
                yield predicted, log_normalise(some, self.total[start:stop], self.target_sum)


def matched_values(
    sdata: SpatialData,
    *,
    table_key: str,
    predicted_key: str,
    genes: Sequence[str] | None = None,
    predicted: Table | None = None,
) -> Matched:
    """Match a prediction with measured expression; arguments and errors are those of :func:`pixnet_sd.tl.evaluate`.

    Parameters
    ----------
    sdata
        Object with both tables.
    table_key, predicted_key
        Table with raw counts, and with predictions.
    genes
        Genes that are wanted; default: all that both tables have.
    predicted
        The table with predictions, where it is not in the object.
    """
    is_stored = predicted is None
    predicted = _predicted(sdata, predicted_key) if predicted is None else predicted
    measured, link = _measured(sdata, table_key, predicted_key, predicted)
    ids = pd.Index(obs_column(predicted, predicted.uns["spatialdata_attrs"]["instance_key"]))
    check_instances(ids, predicted_key)
    rows = ids.get_indexer(link.instances)
    n_common = int((rows >= 0).sum())
    what = f"Table {table_key!r}"
    measured_genes = genes_of(measured, what)
    shared = predicted.var_names[predicted.var_names.isin(measured_genes.names)]
    if not n_common or not len(shared):
        raise DataError(
            f"Tables {table_key!r} and {predicted_key!r} have {n_common} regions and {len(shared)} genes in common. "
            f"Regions are called {_first(link.instances)} and {_first(ids)}, genes {_first(measured_genes.names)} and "
            f"{_first(predicted.var_names)}."
        )
    if genes is not None:
        check_genes(genes, shared, f"what tables {table_key!r} and {predicted_key!r} have in common")
        shared = pd.Index(genes)
    if is_stored:
        check_current(sdata, predicted_key, predicted)
    counts = counts_of(measured, link.rows, measured_genes, what)
    total = checked_totals(counts, measured_genes.names, what)
    keep = (rows >= 0) & (total > 0)
    if not keep.any():
        raise DataError(f"Table {table_key!r}: none of the regions that {predicted_key!r} predicts has a count.")
    return Matched(
        genes=shared,
        predicted=predicted.X,
        rows=rows[keep],
        columns=predicted.var_names.get_indexer(shared),
        counts=counts.take(keep),
        positions=measured_genes.names.get_indexer(shared),
        total=total[keep],
        target_sum=float(predicted.uns["pixnet_sd"]["target_sum"]),
    )


def _first(names: pd.Index) -> list[Any]:
    found: list[Any] = names[:3].tolist()
    return found


def _predicted(sdata: SpatialData, key: str) -> Table:
    table = _table(sdata, key, "predicted_key")
    if "pixnet_sd" not in table.uns:
        raise ElementError(f"Table {key!r} was not written by pixnet_sd's predict. Did you swap the two keys?")
    return table


def _table(sdata: SpatialData, key: str, argument: str) -> Table:
    tables = tables_of(sdata)
    if key not in tables:
        there = ", ".join(map(repr, tables)) or "none"
        raise ElementError(f"There is no table {key!r}. Tables: {there}. Check {argument}=.")
    return tables[key]


def _measured(sdata: SpatialData, table_key: str, predicted_key: str, predicted: Table) -> tuple[Table, TableLink]:
    """The measured table, and its rows that annotate the predicted table's element."""
    measured = _table(sdata, table_key, "table_key")
    if "pixnet_sd" in measured.uns:
        raise ElementError(f"Table {table_key!r} holds predictions: give table_key= of a table with raw counts.")
    element = predicted.uns["spatialdata_attrs"]["region"]
    system = predicted.uns["pixnet_sd"].get("coordinate_system")
    system = system if system in sdata.coordinate_systems else None  # it may have been renamed since
    wanted = element if isinstance(element, str) else None
    link = table_link(sdata, table_key=table_key, coordinate_system=system, element_key=wanted)
    if [link.element_key] != ([element] if isinstance(element, str) else list(element)):
        raise ElementError(
            f"Table {table_key!r} measures the regions of {link.element_key!r}, and {predicted_key!r} predicts those "
            f"of {element!r}. Predict with shapes_key={link.element_key!r}."
        )
    return measured, link


def _rows(matrix: Any, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Some rows of a matrix in memory or on disk, dense, all columns."""
    order = np.argsort(rows, kind="stable")  # storage is read in order
    picked = rows[order]
    first, last = int(picked[0]), int(picked[-1])
    if last - first < 2 * len(rows):
        part = _dense(matrix[first : last + 1])[picked - first]
    else:
        part = _dense(matrix.oindex[picked] if isinstance(matrix, zarr.Array) else matrix[picked])
    return part[np.argsort(order, kind="stable")]


def _dense(x: Any) -> NDArray[np.float32]:
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float32)
