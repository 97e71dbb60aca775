"""Correlations: the terms of Eq. 6, and what predictions are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pcc_terms", "pearson_per_gene", "varying"]

_EPS = 1e-8


def pearson_per_gene(predicted: Tensor, measured: Tensor) -> Tensor:
    """Pearson correlation of each gene over regions.

    Parameters
    ----------
    predicted, measured
        Expression, shape (regions, genes).

    Returns
    -------
    r_g, shape (genes,); NaN for a gene that is constant in `measured`, which has no correlation; 0, without a gradient,
    for one that is constant in `predicted` only.
    """
    p, m = predicted - predicted.mean(0), measured - measured.mean(0)
    product = (p * p).sum(0) * (m * m).sum(0)
    varies = (predicted.amax(0) > predicted.amin(0)) & (product > 0)
    r = (p * m).sum(0) / (torch.sqrt(torch.where(varies, product, 1.0)) + _EPS)
    r = torch.where(varies, r, 0.0)  # rather than the infinite slope of the square root at 0
    constant = measured.amax(0) == measured.amin(0)
    return torch.where(constant, torch.nan, r)


def pcc_terms(predicted: Tensor, measured: Tensor) -> Tensor:
    """Terms of the correlation loss of Eq. 6: 1 - r_g of each gene, over the regions of one slide.

    Parameters
    ----------
    predicted, measured
        Expression, shape (regions, genes).

    Returns
    -------
    Shape (genes,); 0 for genes constant in `measured`, which take no part.
    """
    if len(measured) < 2:
        return predicted.sum(0) * 0.0
    return torch.where(varying(measured), 1 - pearson_per_gene(predicted, measured), 0.0)


def varying(measured: Tensor) -> Tensor:
    """Which genes differ between regions, shape (genes,): a mask, as picking would make the host wait for a device."""
    return measured.amax(0) > measured.amin(0)
