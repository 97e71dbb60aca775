"""Compare a prediction with measured expression."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd.nn.losses import pearson_per_gene

from ._matched import matched_values

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
    found = matched_values(sdata, table_key=table_key, predicted_key=predicted_key)
    return _scores(found.predicted, found.measured, found.genes)


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
