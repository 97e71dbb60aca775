"""Compare predicted with measured expression."""

from __future__ import annotations

import pandas as pd
from spatialdata import SpatialData

from pixnet_sd._arguments import checked

from ._matched import matched_values
from ._scores import merged, moments, scores_of, summary

__all__ = ["evaluate"]


@checked()
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
    known = merged(moments(*block, found.genes) for block in found.blocks())
    scores = scores_of(known)
    scores.attrs.update(summary(scores), n_regions=int(known["n"].iloc[0]), n_genes=len(scores))
    return scores
