"""Scores of predicted against measured expression: gene by gene, in sum, and of several slides together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pixnet_sd.nn.losses import pearson_per_gene

__all__ = ["METRICS", "moments", "pooled", "score", "summary"]

METRICS = ("MSE", "MAE", "PCC@F", "PCC@S", "PCC@M")

_EPS = 1e-8  # as of `pearson_per_gene`
_BLOCK = 64  # genes that are in memory in 64 bits


def score(predicted: NDArray[np.float32], target: NDArray[np.float32], genes: pd.Index) -> pd.DataFrame:
    """Scores of each gene over regions, with those of all genes in ``attrs``.

    Parameters
    ----------
    predicted, target
        Expression, (regions, genes).
    genes
        Names.

    Returns
    -------
    What :func:`pixnet_sd.tl.evaluate` returns.
    """
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
    frame.attrs.update(summary(frame), n_regions=len(target), n_genes=len(frame))
    return frame


def summary(frame: pd.DataFrame) -> dict[str, float]:
    """The five metrics over the genes of a frame with ``pcc``, ``mse`` and ``mae``."""
    pcc = frame["pcc"].dropna()
    return {
        "MSE": float(frame["mse"].mean()),
        "MAE": float(frame["mae"].mean()),
        "PCC@F": float(pcc.quantile(0.25)),
        "PCC@S": float(pcc.median()),
        "PCC@M": float(pcc.mean()),
    }


def moments(predicted: NDArray[np.float32], target: NDArray[np.float32], genes: pd.Index) -> pd.DataFrame:
    """What `pooled` needs of one slide: its expression need not be kept.

    Parameters
    ----------
    predicted, target, genes
        As of `score`.

    Returns
    -------
    One row a gene: ``n`` regions, means, sums of squares and of products about the means, ``mse``, ``mae``. Of a
    constant gene the mean is its value and the sum of squares 0, exactly, by which it is recognised.
    """
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(genes), _BLOCK)]
    parts = [_moments(predicted[:, b].astype(np.float64), target[:, b].astype(np.float64)) for b in blocks]
    return pd.concat(parts).set_axis(pd.Index(genes, name="gene"))


def _moments(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> pd.DataFrame:
    found: dict[str, NDArray[np.float64] | int] = {"n": len(measured)}
    centred = {}
    for name, x in (("predicted", predicted), ("measured", measured)):
        mean = np.where(np.ptp(x, axis=0) == 0, x[0], x.mean(axis=0))
        centred[name] = x - mean
        found |= {f"{name}_mean": mean, f"{name}_ss": (centred[name] ** 2).sum(axis=0)}
    error = predicted - measured
    found |= {
        "product": (centred["predicted"] * centred["measured"]).sum(axis=0),
        "mse": (error**2).mean(axis=0),
        "mae": np.abs(error).mean(axis=0),
    }
    return pd.DataFrame(found)


def pooled(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Scores over the regions of several slides together, as if they were one.

    Parameters
    ----------
    parts
        `moments` of each slide.

    Returns
    -------
    ``pcc``, ``mse`` and ``mae`` of the genes that all of them have.
    """
    shared = [gene for gene in parts[0].index if all(gene in part.index for part in parts)]
    stacked = {str(name): np.stack([part[name].loc[shared] for part in parts]).astype(np.float64) for name in parts[0]}
    n = stacked["n"]
    total = n.sum(axis=0)
    mean = {name: (n * stacked[f"{name}_mean"]).sum(axis=0) / total for name in ("predicted", "measured")}
    apart = {name: stacked[f"{name}_mean"] - mean[name] for name in mean}
    ss = {name: (stacked[f"{name}_ss"] + n * apart[name] ** 2).sum(axis=0) for name in mean}
    product = (stacked["product"] + n * apart["predicted"] * apart["measured"]).sum(axis=0)
    r = product / (np.sqrt(ss["predicted"] * ss["measured"]) + _EPS)
    r = np.where(_constant(stacked, "predicted"), 0.0, r)
    return pd.DataFrame(
        {
            "pcc": np.where(_constant(stacked, "measured"), np.nan, r),
            "mse": (n * stacked["mse"]).sum(axis=0) / total,
            "mae": (n * stacked["mae"]).sum(axis=0) / total,
        },
        index=pd.Index(shared, name="gene"),
    )


def _constant(stacked: dict[str, NDArray[np.float64]], name: str) -> NDArray[np.bool_]:
    """Genes with one value in all regions of all slides."""
    same = np.ptp(stacked[f"{name}_mean"], axis=0) == 0
    return np.asarray(same & (stacked[f"{name}_ss"] == 0).all(axis=0))
