"""Correlations: the terms of Eq. 6, and what predictions are judged by.

What training minimises: Eq. 6 on log-normalised expression, or the likelihood of raw counts.

The outputs are taken some at a time, so that a whole transcriptome never lies in memory: a loss is the sum of `part`
over groups of outputs, however they are grouped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ._network import Link

__all__ = [
    "CountLoss",
    "Densities",
    "MsePcc",
    "Objective",
    "ObjectiveName",
    "Part",
    "log_normalised",
    "make_objective",
    "pcc_terms",
    "pearson_per_gene",
    "varying",
]

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


ObjectiveName = Literal["mse_pcc", "poisson", "nb"]

_TINY = 1e-12


@dataclass(frozen=True)
class Densities:
    """What is known of the regions of one size whose counts are predicted.

    Attributes
    ----------
    usual
        Counts that each region would have at the mean density, shape (n, outputs).
    usual_total, predicted_total, measured_total
        The same, what is predicted, and what was measured, of the sum over all genes, shape (n, 1).
    """

    usual: Tensor
    usual_total: Tensor
    predicted_total: Tensor
    measured_total: Tensor


@dataclass(frozen=True)
class Part:
    """What a loss has to know besides the values of some outputs.

    Attributes
    ----------
    outputs
        Which of them.
    n_outputs
        Of how many.
    n_varying
        `Objective.n_varying` of all outputs, on the device.
    size
        Which size the regions have.
    densities
        What a likelihood of counts needs besides; None otherwise.
    """

    outputs: slice
    n_outputs: int
    n_varying: Tensor | None
    size: int
    densities: Densities | None = None


class Objective(nn.Module, ABC):
    """A loss with the link and the kind of target that belong to it.

    Attributes
    ----------
    link
        Of the head.
    has_total
        Whether the last output is the sum over all genes.
    """

    link: Link
    has_total: bool

    @abstractmethod
    def n_varying(self, measured: Iterable[Tensor]) -> Tensor | None:
        """What the loss divides by, from all outputs, given some at a time: how many differ between regions, a scalar.

        None, and nothing is looked at, where that does not matter.
        """

    @abstractmethod
    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """Share of the loss that some outputs have, over the regions of one size, each (n, outputs); a scalar."""

    @abstractmethod
    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:
        """Log-normalised expression from predictions, or targets, of some outputs and of the sum (n, 1)."""


class MsePcc(Objective):
    """Eq. 6: mean squared error plus λ times the correlation loss, on log-normalised expression.

    Parameters
    ----------
    pcc_weight
        λ.

    References
    ----------
    Zhang et al., arXiv 2503.01347, Eq. 6.
    """

    link: Link = "identity"
    has_total = False

    def __init__(self, pcc_weight: float) -> None:
        super().__init__()
        self.pcc_weight = pcc_weight

    def n_varying(self, measured: Iterable[Tensor]) -> Tensor:
        """See `Objective.n_varying`."""
        return torch.stack([varying(part).sum() for part in measured]).sum()

    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """See `Objective.part`."""
        assert about.n_varying is not None  # it was counted
        squared = ((predicted - measured) ** 2).mean(0).sum() / about.n_outputs
        return squared + self.pcc_weight * pcc_terms(predicted, measured).sum() / about.n_varying.clamp_min(1)

    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:  # noqa: ARG002 - they are what is compared
        """See `Objective.comparable`."""
        return values


class CountLoss(Objective):
    """Negative log-likelihood of raw counts whose means are sums of a density: Poisson, or negative binomial.

    A gene's mean is its density summed over the region times a size factor, the region's depth: what was measured of
    all genes there over what is predicted of them. So genes are learnt as shares of the counts that a region happens
    to have, and only the last output, the sum over all genes, from how many these are.

    Each output's is divided by the counts that the regions would have at its mean density, so that it is in nats per
    count: genes with many counts do not outweigh the others, nor large regions small ones. The dispersion α of the
    negative binomial (variance μ + α μ²) is learnt for every size and gene, as sums over larger regions vary less. The
    sum over all genes is always Poisson: then the expected totals of the training regions are those measured, while
    dispersion would leave them to the smallest.

    Parameters
    ----------
    kind
        ``"poisson"`` or ``"nb"``.
    target_sum
        Of the log-normalised values by which models are compared.
    n_sizes, n_outputs
        Sizes of regions, and outputs.

    References
    ----------
    Negative binomial in mean and dispersion: Hilbe, Negative Binomial Regression (2011), section 8.
    """

    link: Link = "softplus"
    has_total = True

    def __init__(self, kind: Literal["poisson", "nb"], target_sum: float, n_sizes: int, n_outputs: int) -> None:
        super().__init__()
        self.kind, self.target_sum = kind, target_sum
        if kind == "nb":
            self.log_dispersion = nn.Parameter(torch.full((n_sizes, n_outputs), -2.0))

    def n_varying(self, measured: Iterable[Tensor]) -> None:  # noqa: ARG002 - a likelihood needs no such number
        """See `Objective.n_varying`."""
        return

    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """See `Objective.part`."""
        assert about.densities is not None  # counts are sums of densities
        n_genes = about.n_outputs - 1 - (about.outputs.start or 0)
        usual, depth, usual_depth = about.densities.usual, *_depths(about.densities)
        is_total = torch.arange(predicted.shape[1], device=predicted.device) >= n_genes
        mean = predicted * torch.where(is_total, 1.0, depth)
        usual = usual * torch.where(is_total, 1.0, usual_depth)
        mean = mean + _TINY * usual
        loss = mean - measured * torch.log(mean / (usual + _TINY) + _TINY)
        if self.kind == "nb":
            dispersion = self.log_dispersion[about.size, about.outputs].exp()
            loss = torch.where(is_total, loss, _negative_binomial(mean, measured, dispersion))
        return (loss.sum(0) / usual.sum(0).clamp_min(_TINY)).sum() / about.n_outputs

    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:
        """See `Objective.comparable`."""
        assert total is not None  # there is one
        return log_normalised(values, total, self.target_sum)


def _depths(known: Densities) -> tuple[Tensor, Tensor]:
    """Measured over predicted, and over usual, counts of all genes in each region, (n, 1).

    What is predicted of a gene and of all rise together, so their ratio has to be what is learnt from: with the divisor
    held fixed every gene that is predicted too high would pull the total down, step after step.
    """
    predicted, usual = (v.clamp_min(_TINY) for v in (known.predicted_total, known.usual_total))
    return known.measured_total / predicted, known.measured_total / usual


def log_normalised(values: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """``log1p(target_sum * values / total)``; 0 where the total is."""
    return torch.log1p(target_sum * values / torch.where(total > 0, total, torch.inf))


def _negative_binomial(mean: Tensor, count: Tensor, dispersion: Tensor) -> Tensor:
    """Negative log-likelihood, without the term that depends on the count alone."""
    size = 1 / dispersion
    spread = dispersion * mean
    known = torch.lgamma(count + size) - torch.lgamma(size)
    return (count + size) * torch.log1p(spread) - count * torch.log(spread + _TINY) - known


def make_objective(
    name: ObjectiveName, *, pcc_weight: float, target_sum: float, n_sizes: int, n_outputs: int
) -> Objective:
    """The objective of a name; arguments as of `MsePcc` and `CountLoss`."""
    if name == "mse_pcc":
        return MsePcc(pcc_weight)
    return CountLoss(name, target_sum, n_sizes, n_outputs)
