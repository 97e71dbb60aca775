"""Predicted and measured expression of the same regions and genes, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd._errors import DataError, ElementError
from pixnet_sd.slide import (
    Counts,
    StoredTable,
    TableLink,
    check_genes,
    checked_totals,
    log_normalise,
    table_link,
    tables_of,
)

__all__ = ["Matched", "matched_values"]


@dataclass(frozen=True, eq=False)
class Matched:
    """Log-normalised expression of n regions and M genes.

    Attributes
    ----------
    genes
        Names, shape (M,).
    predicted, measured
        Shape (n, M), float32.
    """

    genes: pd.Index
    predicted: NDArray[np.float32]
    measured: NDArray[np.float32]


def matched_values(
    sdata: SpatialData,
    *,
    table_key: str,
    predicted_key: str,
    genes: Sequence[str] | None = None,
    predicted: AnnData | None = None,
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
    predicted = _predicted(sdata, predicted_key) if predicted is None else predicted
    measured, link = _measured(sdata, table_key, predicted_key, predicted)
    ids = pd.Index(predicted.obs[predicted.uns["spatialdata_attrs"]["instance_key"]])
    common = link.instances.intersection(ids, sort=False)
    shared = predicted.var_names[predicted.var_names.isin(measured.var_names)]
    if not len(common) or not len(shared):
        raise DataError(
            f"Tables {table_key!r} and {predicted_key!r} have {len(common)} regions and {len(shared)} genes in common. "
            f"Regions are called {_first(link.instances)} and {_first(ids)}, genes {_first(measured.var_names)} and "
            f"{_first(predicted.var_names)}."
        )
    if genes is not None:
        check_genes(genes, shared, f"what tables {table_key!r} and {predicted_key!r} have in common")
        shared = pd.Index(genes)
    total, target = _targets(measured, link, shared, float(predicted.uns["pixnet_sd"]["target_sum"]))
    common = common[total[link.instances.get_indexer(common)] > 0]
    if not len(common):
        raise DataError(f"Table {table_key!r}: none of the regions that {predicted_key!r} predicts has a count.")
    values = _dense(predicted[ids.get_indexer(common), shared].X)
    return Matched(shared, values, target[link.instances.get_indexer(common)])


def _first(names: pd.Index) -> list[Any]:
    found: list[Any] = names[:3].tolist()
    return found


def _predicted(sdata: SpatialData, key: str) -> AnnData:
    table = _table(sdata, key)
    if "pixnet_sd" not in table.uns:
        raise ElementError(f"Table {key!r} was not written by pixnet_sd's predict. Did you swap the two keys?")
    return table.load() if isinstance(table, StoredTable) else table


def _table(sdata: SpatialData, key: str) -> AnnData | StoredTable:
    tables = tables_of(sdata)
    if key not in tables:
        there = ", ".join(map(repr, tables)) or "none"
        raise ElementError(f"There is no table {key!r}. Tables: {there}.")
    return tables[key]


def _measured(
    sdata: SpatialData, table_key: str, predicted_key: str, predicted: AnnData
) -> tuple[AnnData | StoredTable, TableLink]:
    """The measured table, and its rows that annotate the predicted table's element."""
    measured = _table(sdata, table_key)
    if "pixnet_sd" in measured.uns:
        raise ElementError(f"Table {table_key!r} holds predictions: give table_key= of a table with raw counts.")
    if not measured.var_names.is_unique:
        twice = measured.var_names[measured.var_names.duplicated()][0]
        raise DataError(
            f"Table {table_key!r}: gene {twice!r} occurs more than once, and genes are matched by name. Call "
            "table.var_names_make_unique() first."
        )
    element = predicted.uns["spatialdata_attrs"]["region"]
    system = predicted.uns["pixnet_sd"].get("coordinate_system")
    link = table_link(sdata, table_key=table_key, coordinate_system=system)
    if [link.element_key] != ([element] if isinstance(element, str) else list(element)):
        raise ElementError(
            f"Table {table_key!r} measures the regions of {link.element_key!r}, and {predicted_key!r} predicts those "
            f"of {element!r}. Predict with shapes_key={link.element_key!r}."
        )
    return measured, link


def _targets(
    measured: AnnData | StoredTable, link: TableLink, genes: pd.Index, target_sum: float
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Counts of each of the link's rows over all genes, and normalised expression of some."""
    what = f"Table {link.table_key!r}"
    counts = Counts.of(measured.X, link.rows, what)
    total = checked_totals(counts, measured.var_names, what)
    return total, log_normalise(counts.columns(measured.var_names.get_indexer(genes)), total, target_sum)


def _dense(x: Any) -> NDArray[np.float32]:
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float32)
