"""Objectives of training: Eq. 6 on log-normalised expression, or the likelihood of raw counts; and Pearson correlation.

Outputs are taken in groups, so that a whole transcriptome never lies in memory: a loss is the sum of `Objective.part`
over groups of outputs, however they are grouped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pixnet_sd.params import ObjectiveName

from ._record import Link

_EPS = 1e-8
_TINY = 1e-12


def pearson_per_gene(predicted: Tensor, measured: Tensor) -> Tensor:
    """Correlate each gene over regions: (regions, genes) twice -> (genes,).

    NaN for a gene that is constant in `measured`, which has no correlation; 0, without a gradient, for one that is
    constant in `predicted` only.
    """
    p, m = predicted - predicted.mean(0), measured - measured.mean(0)
    product = (p * p).sum(0) * (m * m).sum(0)
    varies = (predicted.amax(0) > predicted.amin(0)) & (product > 0)
    r = (p * m).sum(0) / (torch.sqrt(torch.where(varies, product, 1.0)) + _EPS)
    r = torch.where(varies, r, 0.0)  # rather than the infinite slope of the square root at 0
    return torch.where(measured.amax(0) == measured.amin(0), torch.nan, r)


def _pcc_terms(predicted: Tensor, measured: Tensor) -> Tensor:
    """Correlation loss of Eq. 6 by gene, 1 - r_g over the regions of one slide; 0 for genes constant in `measured`."""
    if len(measured) < 2:
        return predicted.sum(0) * 0.0
    return torch.where(_varying(measured), 1 - pearson_per_gene(predicted, measured), 0.0)


def _varying(measured: Tensor) -> Tensor:
    """Mask the genes that differ between regions; picking them would make the host wait for a device."""
    return measured.amax(0) > measured.amin(0)


@dataclass(frozen=True)
class Densities:
    """Totals of n regions of one size whose counts are predicted.

    `usual` has the counts that each region would have at the mean density, shape (n, outputs); the others are sums over
    all genes, shape (n, 1): of the usual counts, of the predicted ones, and of the measured ones.
    """

    usual: Tensor
    usual_total: Tensor
    predicted_total: Tensor
    measured_total: Tensor


@dataclass(frozen=True)
class Part:
    """What a loss has to know besides the values of a group of outputs.

    Attributes
    ----------
    outputs, n_outputs
        Which outputs, and of how many.
    n_varying
        `Objective.n_varying` of all outputs, on the device.
    size
        Which size the regions have.
    densities
        Needed by a likelihood of counts; None otherwise.
    """

    outputs: slice
    n_outputs: int
    n_varying: Tensor | None
    size: int
    densities: Densities | None = None


class Objective(nn.Module, ABC):
    """A loss with the link of the head and the kind of target that belong to it.

    `has_total` tells whether the last output is the sum over all genes.
    """

    link: Link
    has_total: bool

    @abstractmethod
    def n_varying(self, measured: Iterable[Tensor]) -> Tensor | None:
        """Count the outputs that differ between regions, a scalar to divide by, from groups of them; None: unneeded."""

    @abstractmethod
    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """Return the share of the loss of a group of outputs, over the regions of one size, each (n, outputs)."""

    @abstractmethod
    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:
        """Log-normalise predictions, or targets, of a group of outputs, given those of the sum (n, 1)."""


class MsePcc(Objective):
    """Eq. 6 of Zhang et al., arXiv 2503.01347: mean squared error plus λ (`pcc_weight`) times the correlation loss.

    It is taken of log-normalised expression.
    """

    link: Link = "identity"
    has_total = False

    def __init__(self, pcc_weight: float) -> None:
        super().__init__()
        self.pcc_weight = pcc_weight

    def n_varying(self, measured: Iterable[Tensor]) -> Tensor:
        """See `Objective.n_varying`."""
        return torch.stack([_varying(group).sum() for group in measured]).sum()

    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """See `Objective.part`."""
        assert about.n_varying is not None  # it was counted
        squared = ((predicted - measured) ** 2).mean(0).sum() / about.n_outputs
        return squared + self.pcc_weight * _pcc_terms(predicted, measured).sum() / about.n_varying.clamp_min(1)

    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:  # noqa: ARG002 - values are log-normalised
        """See `Objective.comparable`."""
        return values


class CountLoss(Objective):
    """Negative log-likelihood of raw counts whose means are sums of a density: Poisson, or negative binomial.

    A gene's mean is its density summed over the region times a size factor, the region's depth: measured over predicted
    counts of all genes there. So genes are learnt as shares of the counts that a region happens to have, and only the
    last output, the sum over all genes, from how many these are.

    The loss of each output is divided by the counts that the regions would have at its mean density, so that it is in
    nats per count: genes with many counts do not outweigh the others, nor large regions small ones. The dispersion α of
    the negative binomial (variance μ + α μ²; Hilbe, Negative Binomial Regression, 2011, section 8) is learnt for every
    size and gene, as sums over larger regions vary less. The sum over all genes is always Poisson: then the expected
    totals of the training regions are those measured, while dispersion would leave them to the smallest.
    """

    link: Link = "softplus"
    has_total = True

    def __init__(self, likelihood: Literal["poisson", "nb"], target_sum: float, n_sizes: int, n_outputs: int) -> None:
        super().__init__()
        self.likelihood, self.target_sum = likelihood, target_sum
        if likelihood == "nb":
            self.log_dispersion = nn.Parameter(torch.full((n_sizes, n_outputs), -2.0))

    def n_varying(self, measured: Iterable[Tensor]) -> None:  # noqa: ARG002 - a likelihood needs no such number
        """See `Objective.n_varying`."""
        return

    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """See `Objective.part`."""
        assert about.densities is not None  # counts are sums of densities
        known = about.densities
        # What is predicted of a gene and of all rise together, so their ratio has to be what is learnt from: with the
        # divisor held fixed every gene that is predicted too high would pull the total down, step after step.
        depth = known.measured_total / known.predicted_total.clamp_min(_TINY)
        usual_depth = known.measured_total / known.usual_total.clamp_min(_TINY)
        n_genes = about.n_outputs - 1 - (about.outputs.start or 0)
        is_total = torch.arange(predicted.shape[1], device=predicted.device) >= n_genes
        usual = known.usual * torch.where(is_total, 1.0, usual_depth)
        mean = predicted * torch.where(is_total, 1.0, depth) + _TINY * usual
        loss = mean - measured * torch.log(mean / (usual + _TINY) + _TINY)
        if self.likelihood == "nb":
            dispersion = self.log_dispersion[about.size, about.outputs].exp()
            loss = torch.where(is_total, loss, _negative_binomial(mean, measured, dispersion))
        return (loss.sum(0) / usual.sum(0).clamp_min(_TINY)).sum() / about.n_outputs

    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:
        """See `Objective.comparable`."""
        assert total is not None  # it is the last output
        return log_normalised(values, total, self.target_sum)


def log_normalised(values: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """Return ``log1p(target_sum * values / total)``; 0 where the total is 0."""
    return torch.log1p(target_sum * values / torch.where(total > 0, total, torch.inf))


def _negative_binomial(mean: Tensor, count: Tensor, dispersion: Tensor) -> Tensor:
    """Return the negative log-likelihood, without the term that depends on the count alone."""
    size = 1 / dispersion
    spread = dispersion * mean
    known = torch.lgamma(count + size) - torch.lgamma(size)
    return (count + size) * torch.log1p(spread) - count * torch.log(spread + _TINY) - known


def make_objective(
    name: ObjectiveName, *, pcc_weight: float, target_sum: float, n_sizes: int, n_outputs: int
) -> Objective:
    """Make the objective of a name, with λ of Eq. 6 or the target sum, sizes of regions and outputs of a likelihood."""
    if name == "mse_pcc":
        return MsePcc(pcc_weight)
    return CountLoss(name, target_sum, n_sizes, n_outputs)
