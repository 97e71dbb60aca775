"""Objectives of training.

A loss is the sum of `Objective.part` over groups of outputs, so a whole transcriptome is never in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pixnet_sd.params import ObjectiveName

from ._operators import Operator
from .noise import expected_log_normalised, minus_log_likelihood

_EPS = 1e-8
_TINY = 1e-12
_LEAST_DISPERSION = 1e-4

ENOUGH_COUNTS = 100.0
"""Counts from which on the logarithm of a region's expression is worth comparing."""


def pearson_per_gene(predicted: Tensor, measured: Tensor, weight: Tensor | None = None) -> Tensor:
    """Correlate each gene over regions: (regions, genes) twice -> (genes,); of weight (regions, 1), 0 or 1.

    NaN for a gene that is constant in `measured`, which has no correlation; 0, without a gradient, for one that is
    constant in `predicted` only.
    """
    p, m = _deviations(predicted, weight), _deviations(measured, weight)
    product = (p * p).sum(0) * (m * m).sum(0)
    varies = _varying(predicted, weight) & (product > 0)
    r = (p * m).sum(0) / (torch.sqrt(torch.where(varies, product, 1.0)) + _EPS)
    r = torch.where(varies, r, 0.0)  # rather than the infinite slope of the square root at 0
    return torch.where(_varying(measured, weight), r, torch.nan)


def _deviations(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values - values.mean(0)
    return weight * (values - (weight * values).sum(0) / weight.sum().clamp_min(1))


def _varying(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mask the genes that differ between regions; picking regions or genes would make the host wait for a device."""
    if weight is None:
        return values.amax(0) > values.amin(0)
    kept = weight > 0
    return torch.where(kept, values, -torch.inf).amax(0) > torch.where(kept, values, torch.inf).amin(0)


def _uncorrelated(predicted: Tensor, measured: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the correlation loss, 1 - r, over genes: 0 of genes that are constant in `measured`."""
    r = pearson_per_gene(predicted, measured, weight)
    return torch.where(r.isnan(), 0.0, 1 - r).sum()


def log_normalised(values: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """Return ``log1p(target_sum * values / total)``; 0 where the total is 0."""
    return torch.log1p(target_sum * values / torch.where(total > 0, total, torch.inf))


@dataclass(frozen=True)
class Totals:
    """Counts of all genes of n regions of one size, (n, 1), and how much the counts of some outputs vary there."""

    predicted_total: Tensor
    measured_total: Tensor
    log_dispersion: Tensor  # (outputs,)

    def at_measured_depth(self, predicted: Tensor) -> Tensor:
        """Return the means of counts, given the number that was measured of all genes: (n, outputs) twice."""
        return predicted * (self.measured_total / self.predicted_total.detach().clamp_min(_TINY))


@dataclass(frozen=True)
class Densities(Totals):
    """What a likelihood of counts has to know besides these."""

    usual: Tensor  # counts that each region would have at the mean density, (n, outputs)
    usual_total: Tensor  # of all genes, (n, 1)
    sums: Operator | None = None  # adds up neighbours, (n, outputs) -> (groups, outputs), where most regions have few


@dataclass(frozen=True)
class Part:
    """What a loss has to know besides the values of a group of outputs."""

    outputs: slice
    n_outputs: int  # of all groups
    n_varying: Tensor  # `Objective.n_varying` of all outputs, on the device
    densities: Densities | None = None  # for a likelihood of counts


class Objective(ABC):
    """A loss."""

    has_total = False  # whether the last output is the sum over all genes

    @abstractmethod
    def n_varying(self, measured: Iterable[Tensor]) -> Tensor:
        """Count the genes that differ between regions, a scalar to divide by, from groups of outputs."""

    @abstractmethod
    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """Return the share of the loss of a group of outputs, over the regions of one size, each (n, outputs)."""

    def comparable(self, predicted: Tensor, measured: Tensor, about: Totals | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - where they are so
        """Log-normalise predictions, as what is expected to be measured, and targets of a group of genes."""
        return predicted, measured


@dataclass(frozen=True)
class MsePcc(Objective):
    """Squared error + `pcc_weight` times the correlation loss, of log-normalised values (Eq. 6, arXiv 2503.01347)."""

    pcc_weight: float

    def n_varying(self, measured: Iterable[Tensor]) -> Tensor:
        return torch.stack([_varying(group).sum() for group in measured]).sum()

    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        """See `Objective.part`; the correlation loss is 0 of genes that are constant in `measured`."""
        squared = ((predicted - measured) ** 2).mean(0).sum() / about.n_outputs
        return squared + self.pcc_weight * _uncorrelated(predicted, measured) / about.n_varying.clamp_min(1)


@dataclass(frozen=True)
class NbPcc(Objective):
    """Likelihood of raw counts, sums of a density + `pcc_weight` times the correlation loss of what these imply.

    **Likelihood.** Counts are negative binomial (variance μ + α μ²; Hilbe, Negative Binomial Regression, 2011, section
    8). A gene's mean is its density summed over the region times the region's depth, measured over predicted counts of
    all genes there. So genes are learnt as shares of the counts that a region happens to have, and the last output, the
    sum over all genes, from how many these are and nothing else. The loss of each gene is divided by the information
    that its counts have about the logarithm of its mean, Σ μ / (1 + α μ) at its mean density: a mean that is off by a
    share costs the same of any gene, in regions of any size and depth, and a dispersion that grows does not buy out of
    it. The mean over genes and the sum have the same weight. The dispersion α is learnt for every size and gene, as
    sums over larger regions vary less, and from the likelihood alone. The sum over all genes is Poisson: then the
    expected totals of the training regions are those measured, while dispersion would leave them to the smallest.

    **Correlation**, as in Eq. 6, of measured log-normalised expression with what the likelihood expects of it,
    E[log1p(target_sum y / total)] at the region's depth: the logarithm of the expected counts would be another thing,
    by the more the fewer counts there are. Regions without counts take no part.
    """

    pcc_weight: float
    target_sum: float
    has_total = True

    def n_varying(self, measured: Iterable[Tensor]) -> Tensor:
        """See `Objective.n_varying`; a gene with a single count has a logarithm that varies, and all genes are last."""
        return torch.stack([(group.amax(0) > 0).sum() for group in measured]).sum() - 1

    def part(self, predicted: Tensor, measured: Tensor, about: Part) -> Tensor:
        known, n_genes = about.densities, about.n_outputs - 1 - (about.outputs.start or 0)
        assert known is not None  # counts are sums of densities
        loss = predicted.new_zeros(())
        if n_genes < predicted.shape[1]:
            usual = known.usual_total + _TINY
            ratio = predicted[:, n_genes:] / usual
            lost = predicted[:, n_genes:] - measured[:, n_genes:] * torch.log(ratio + _TINY)
            loss = loss + (lost.sum(0) / usual.sum()).sum()
        genes = slice(0, max(n_genes, 0))
        predicted, measured, dispersion = predicted[:, genes], measured[:, genes], known.log_dispersion[genes].exp()
        usual = known.usual[:, genes] * (known.measured_total / known.usual_total.clamp_min(_TINY))
        mean = known.at_measured_depth(predicted) + _TINY * usual
        information = (usual / (1 + dispersion.detach() * usual)).sum(0)
        lost = minus_log_likelihood(mean, measured, dispersion) / information.clamp_min(_TINY)
        loss = loss + lost.sum() / (about.n_outputs - 1)
        if not self.pcc_weight:
            return loss
        total = known.measured_total
        if known.sums is not None:
            mean, measured, total, dispersion = _summed(known.sums, mean, measured, total, dispersion)
        expected = expected_log_normalised(mean, dispersion.detach(), total, self.target_sum)
        observed, some = log_normalised(measured, total, self.target_sum), (total > 0).to(expected.dtype)
        correlation = _uncorrelated(expected, observed, some) / about.n_varying.clamp_min(1)
        return loss + self.pcc_weight * correlation

    def comparable(self, predicted: Tensor, measured: Tensor, about: Totals | None) -> tuple[Tensor, Tensor]:
        assert about is not None  # counts are sums of densities
        mean, total = about.at_measured_depth(predicted), about.measured_total
        expected = expected_log_normalised(mean, about.log_dispersion.exp(), total, self.target_sum)
        return expected, log_normalised(measured, total, self.target_sum)


def _summed(
    sums: Operator, mean: Tensor, measured: Tensor, total: Tensor, dispersion: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add up regions: means, counts, totals, and the dispersion that a sum of negative binomial counts then has.

    The variance of counts of means m with one dispersion α adds up to Σ m + α Σ m².
    """
    summed = sums.apply(mean)
    squares = sums.apply(mean.detach() ** 2) / (summed.detach() ** 2).clamp_min(_TINY)
    return summed, sums.apply(measured), sums.apply(total), (dispersion * squares).clamp_min(_LEAST_DISPERSION)


def make_objective(name: ObjectiveName, *, pcc_weight: float, target_sum: float) -> Objective:
    """Make the objective of a name, with the weight of its correlation loss, and the target sum of a likelihood."""
    return MsePcc(pcc_weight) if name == "mse_pcc" else NbPcc(pcc_weight, target_sum)
