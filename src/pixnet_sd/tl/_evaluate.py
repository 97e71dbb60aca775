"""Compare a prediction with measured expression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd._errors import DataError, ElementError
from pixnet_sd.nn.losses import pearson_per_gene
from pixnet_sd.slide import Counts, StoredTable, TableLink, checked_totals, log_normalise, table_link, tables_of

__all__ = ["evaluate"]


def evaluate(sdata: SpatialData, *, table_key: str, predicted_key: str) -> pd.DataFrame:
    """Score a prediction against measured expression of the same regions.

    Measured counts are normalised as the model's targets were. Regions are matched by the element that both tables
    annotate and by instance id, genes by name; what only one of the tables has takes no part, nor do regions without a
    single count.

    Parameters
    ----------
    sdata
        Object with both tables.
    table_key
        Table with raw counts.
    predicted_key
        Table that :func:`predict` wrote with ``shapes_key=`` the element which `table_key` annotates.

    Returns
    -------
    One row a gene: ``pcc`` (Pearson over regions; NaN when the measured gene is constant), ``mse``, ``mae``.
    ``attrs`` has ``MSE``, ``MAE``, ``PCC@F``, ``PCC@S``, ``PCC@M`` (first quartile, median and mean over genes),
    ``n_regions`` and ``n_genes``. For several slides, average these per slide or pool the regions, and say which.

    Raises
    ------
    ElementError
        A table is missing, or the tables annotate different elements.
    DataError
        Counts cannot be used, or the tables have no region with counts, or no gene, in common.
    """
    predicted = _predicted(sdata, predicted_key)
    measured, link = _measured(sdata, table_key, predicted_key, predicted)
    ids = pd.Index(predicted.obs[predicted.uns["spatialdata_attrs"]["instance_key"]])
    common = link.instances.intersection(ids, sort=False)
    genes = predicted.var_names[predicted.var_names.isin(measured.var_names)]
    if not len(common) or not len(genes):
        raise DataError(
            f"Tables {table_key!r} and {predicted_key!r} have {len(common)} regions and {len(genes)} genes in common. "
            f"Regions are called {_first(link.instances)} and {_first(ids)}, genes {_first(measured.var_names)} and "
            f"{_first(predicted.var_names)}."
        )
    total, target = _targets(measured, link, genes, float(predicted.uns["pixnet_sd"]["target_sum"]))
    common = common[total[link.instances.get_indexer(common)] > 0]
    if not len(common):
        raise DataError(f"Table {table_key!r}: none of the regions that {predicted_key!r} predicts has a count.")
    values = _dense(predicted[ids.get_indexer(common), genes].X)
    return _scores(values, target[link.instances.get_indexer(common)], genes)


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


def _scores(predicted: NDArray[np.float32], target: NDArray[np.float32], genes: pd.Index) -> pd.DataFrame:
    predicted, target = predicted.astype(np.float64), target.astype(np.float64)
    error = predicted - target
    frame = pd.DataFrame(
        {
            "pcc": pearson_per_gene(torch.from_numpy(predicted), torch.from_numpy(target)).numpy(),
            "mse": (error**2).mean(axis=0),
            "mae": np.abs(error).mean(axis=0),
        },
        index=pd.Index(genes, name="gene"),
    )
    pcc = frame["pcc"].dropna()
    frame.attrs = {
        "MSE": float(frame["mse"].mean()),
        "MAE": float(frame["mae"].mean()),
        "PCC@F": float(pcc.quantile(0.25)),
        "PCC@S": float(pcc.median()),
        "PCC@M": float(pcc.mean()),
        "n_regions": len(target),
        "n_genes": len(frame),
    }
    return frame
