"""Scores of predicted against measured expression: gene by gene, in sum, and of several slides together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["METRICS", "merged", "moments", "pooled", "scores_of", "summary"]

METRICS = ("MSE", "MAE", "PCC@F", "PCC@S", "PCC@M")

_EPS = 1e-8  # as of `pearson_per_gene`
_BLOCK = 64  # genes that are in memory in 64 bits


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
    """What scores are made of, for some regions: their expression need not be kept.

    Parameters
    ----------
    predicted, target
        Expression, (regions, genes).
    genes
        Names.

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


def merged(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """`moments` of all regions of several parts, which have the same genes.

    Parameters
    ----------
    parts
        `moments` of each, at least one.
    """
    frames = list(parts)
    index = frames[0].index
    stacked = {str(name): np.stack([part[name] for part in frames]).astype(np.float64) for name in frames[0]}
    n = stacked["n"]
    total = n.sum(axis=0)
    found: dict[str, NDArray[np.generic]] = {"n": total.astype(np.int64)}
    apart = {}
    for name in ("predicted", "measured"):
        each, ss = stacked[f"{name}_mean"], stacked[f"{name}_ss"]
        mean = np.where(_is_constant(each, ss), each[0], (n * each).sum(axis=0) / total)
        apart[name] = each - mean
        found |= {f"{name}_mean": mean, f"{name}_ss": (ss + n * apart[name] ** 2).sum(axis=0)}
    found["product"] = (stacked["product"] + n * apart["predicted"] * apart["measured"]).sum(axis=0)
    found |= {name: (n * stacked[name]).sum(axis=0) / total for name in ("mse", "mae")}
    return pd.DataFrame(found, index=index)


def scores_of(part: pd.DataFrame) -> pd.DataFrame:
    """Scores of each gene, of its `moments`: ``pcc`` (NaN where the measured gene is constant), ``mse``, ``mae``."""
    r = part["product"] / (np.sqrt(part["predicted_ss"] * part["measured_ss"]) + _EPS)
    r = r.mask(part["predicted_ss"] == 0, 0.0).mask(part["measured_ss"] == 0)
    return pd.DataFrame({"pcc": r, "mse": part["mse"], "mae": part["mae"]})


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
    return scores_of(merged(part.loc[shared] for part in parts))


def _is_constant(mean: NDArray[np.float64], ss: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Genes with one value in all regions of all parts, (parts, genes) each."""
    return np.asarray((np.ptp(mean, axis=0) == 0) & (ss == 0).all(axis=0))
