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
from pixnet_sd.slide import Counts, TableLink, checked_totals, log_normalise, table_link

__all__ = ["evaluate"]


def evaluate(sdata: SpatialData, *, table_key: str, predicted_key: str) -> pd.DataFrame:
    """Score a prediction against measured expression of the same regions.

    Measured counts are normalised as the model's targets were. Regions are matched by the element that both tables
    annotate and by instance id, genes by name; what only one of the tables has takes no part.

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
        Counts cannot be used, or the tables have no region or gene in common.
    """
    predicted = _predicted(sdata, predicted_key)
    measured, link = _measured(sdata, table_key, predicted_key)
    ids = pd.Index(predicted.obs[predicted.uns["spatialdata_attrs"]["instance_key"]])
    common = link.instances.intersection(ids, sort=False)
    genes = predicted.var_names[predicted.var_names.isin(measured.var_names)]
    if not len(common) or not len(genes):
        raise DataError(
            f"Tables {table_key!r} and {predicted_key!r} have {len(common)} regions and {len(genes)} genes in common; "
            f"ids look like {list(link.instances[:3])} and {list(ids[:3])}."
        )
    target = _targets(measured, link, genes, float(predicted.uns["pixnet_sd"]["target_sum"]))
    values = _dense(predicted[ids.get_indexer(common), genes].X)
    return _scores(values, target[link.instances.get_indexer(common)], genes)


def _predicted(sdata: SpatialData, key: str) -> AnnData:
    if key not in sdata.tables:
        raise ElementError(f"There is no table {key!r}. Tables: {list(sdata.tables)}.")
    table = sdata.tables[key]
    if "pixnet_sd" not in table.uns:
        raise ElementError(f"Table {key!r} was not written by pixnet_sd's predict. Did you swap the two keys?")
    return table


def _measured(sdata: SpatialData, table_key: str, predicted_key: str) -> tuple[AnnData, TableLink]:
    """The measured table, and its rows that annotate the predicted table's element."""
    if table_key not in sdata.tables:
        raise ElementError(f"There is no table {table_key!r}. Tables: {list(sdata.tables)}.")
    element = sdata.tables[predicted_key].uns["spatialdata_attrs"]["region"]
    link = table_link(sdata, table_key=table_key)
    if [link.element_key] != ([element] if isinstance(element, str) else list(element)):
        raise ElementError(
            f"Table {table_key!r} measures the regions of {link.element_key!r}, and {predicted_key!r} predicts those "
            f"of {element!r}. Predict with shapes_key={link.element_key!r}."
        )
    return sdata.tables[table_key], link


def _targets(measured: AnnData, link: TableLink, genes: pd.Index, target_sum: float) -> NDArray[np.float32]:
    """Normalised expression of the link's rows; NaN for a region without a single count."""
    what = f"Table {link.table_key!r}"
    counts = Counts.of(measured.X, link.rows, what)
    total = checked_totals(counts, measured.var_names, what)
    columns = counts.columns(measured.var_names.get_indexer(genes))
    return log_normalise(columns, np.where(total > 0, total, np.nan), target_sum)


def _dense(x: Any) -> NDArray[np.float32]:
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float32)


def _scores(predicted: NDArray[np.float32], target: NDArray[np.float32], genes: pd.Index) -> pd.DataFrame:
    measured = np.isfinite(target).all(axis=1)
    predicted, target = predicted[measured].astype(np.float64), target[measured].astype(np.float64)
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
        "n_regions": int(measured.sum()),
        "n_genes": len(frame),
    }
    return frame
