"""The objective of Eq. 6 and the correlations it is judged by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mse_pcc_loss", "multi_size_loss", "pcc_loss", "pearson_per_gene"]

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


def pcc_loss(predicted: Tensor, measured: Tensor) -> Tensor:
    """Correlation loss of Eq. 6: mean over genes of 1 - r_g, over the regions of one slide.

    Genes constant in `measured` take no part; with none left, or fewer than two regions, the loss is 0.

    Parameters
    ----------
    predicted, measured
        Expression, shape (regions, genes).

    Returns
    -------
    Scalar.
    """
    if len(measured) < 2:
        return predicted.sum() * 0.0
    varies = measured.amax(0) > measured.amin(0)  # a mask: picking genes would make the host wait for the device
    loss = torch.where(varies, 1 - pearson_per_gene(predicted, measured), 0.0)
    return loss.sum() / varies.sum().clamp_min(1)


def mse_pcc_loss(predicted: Tensor, measured: Tensor, pcc_weight: float = 0.5) -> Tensor:
    """Eq. 6: mean squared error plus `pcc_weight` (λ) times the correlation loss.

    Parameters
    ----------
    predicted, measured
        Expression of the regions of one slide and one size, shape (regions, genes).
    pcc_weight
        λ.

    Returns
    -------
    Scalar.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 6.
    """
    return ((predicted - measured) ** 2).mean() + pcc_weight * pcc_loss(predicted, measured)


def multi_size_loss(pairs: Sequence[tuple[Tensor, Tensor]], pcc_weight: float = 0.5) -> Tensor:
    """Mean over region sizes of Eq. 6, every size with the same weight, however many regions it has.

    A tile holds 64 times as many 2 µm bins as 16 µm ones; weighted by their number, the noisiest size would decide.

    Parameters
    ----------
    pairs
        (predicted, measured) of each size, shapes (regions, genes), at least one pair.
    pcc_weight
        λ.

    Returns
    -------
    Scalar.
    """
    return torch.stack([mse_pcc_loss(p, m, pcc_weight) for p, m in pairs]).mean()
