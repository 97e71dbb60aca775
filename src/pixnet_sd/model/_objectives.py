"""Objectives of training, and what their noise model says of measured expression.

A loss is the sum of `Objective.part` over groups of outputs, so a whole transcriptome is never in memory.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.params import PCC_WEIGHTS, ObjectiveName

_EPS = 1e-8
_TINY = 1e-12


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


_STEP, _FIRST, _LAST = 1.0, -4.0, 2.0  # of the quadrature, in the logarithm; the first is added to -log(largest)


class _ExpectedLog(torch.autograd.Function):
    """See `expected_log_normalised`; derivatives are summed up on the way, so that no node is kept."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, dispersion: Tensor, scale: Tensor, nodes: tuple[float, ...]) -> Tensor:
        z, spread = scale * mean, dispersion * mean
        value = torch.log1p(z)
        by_mean = scale / (1 + z) if ctx.needs_input_grad[0] else None
        by_dispersion = torch.zeros_like(value) if ctx.needs_input_grad[1] else None
        for s in nodes:
            weight = _STEP * math.exp(-s)
            caught = -torch.expm1(-s * scale)
            grown = torch.log1p(spread * caught)
            transform, of_mean = torch.exp(-grown / dispersion), torch.exp(-s * z)
            value.sub_(transform - of_mean, alpha=weight)
            slope = transform / (1 + spread * caught) * caught
            if by_mean is not None:
                by_mean.add_(slope - s * scale * of_mean, alpha=weight)
            if by_dispersion is not None:
                by_dispersion.add_((slope * mean - transform * grown / dispersion) / dispersion, alpha=weight)
        ctx.save_for_backward(by_mean, by_dispersion)
        ctx.shape = dispersion.shape
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        by_mean, by_dispersion = (None if by is None else grads[0] * by for by in ctx.saved_tensors)
        return by_mean, None if by_dispersion is None else by_dispersion.sum_to_size(ctx.shape), None, None


def expected_log_normalised(mean: Tensor, dispersion: Tensor, total: Tensor, target_sum: float) -> Tensor:
    """Compute E[log1p(target_sum y / total)] of negative binomial counts y: means (n, M), total (n, 1) -> (n, M).

    The variance of y is ``mean + dispersion * mean ** 2``; `dispersion`, above 0, broadcasts to the means, which are no
    more than the total. Exact to 1e-3, differentiable in mean and dispersion. Where the total is 0, so is the result.

    log(1 + z) is the integral of (1 - exp(-s z)) exp(-s) / s over s > 0, so its expectation takes no more than the
    Laplace transform of y, ``(1 + dispersion mean (1 - exp(-s))) ** (-1 / dispersion)``. Over log s the trapezoidal
    rule converges exponentially; log1p of the mean is taken out, of which the same integral is known.
    """
    first = _FIRST - math.log(max(target_sum, 1.0))
    nodes = tuple(np.exp(np.arange(first, _LAST + _STEP / 2, _STEP)).tolist())
    some = total > 0
    value = _ExpectedLog.apply(mean, dispersion, target_sum / torch.where(some, total, 1.0), nodes)
    return torch.where(some, value, 0.0)


@dataclass(frozen=True)
class Densities:
    """Totals of n regions of one size whose counts are predicted."""

    usual: Tensor  # counts that each region would have at the mean density, (n, outputs)
    usual_total: Tensor  # (n, 1), as the two below: the sum over all genes of the usual counts,
    predicted_total: Tensor  # of the predicted ones
    measured_total: Tensor  # and of the measured ones
    log_dispersion: Tensor  # of the counts of regions of this size, (outputs,)


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

    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:  # noqa: ARG002 - where they are log-normalised
        """Log-normalise predictions, or targets, of a group of outputs, given those of the sum (n, 1)."""
        return values


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
    """Likelihood of raw counts whose means are sums of a density + correlation loss + squared error of what they imply.

    **Likelihood.** Counts are negative binomial (variance μ + α μ²; Hilbe, Negative Binomial Regression, 2011, section
    8). A gene's mean is its density summed over the region times the region's depth, measured over predicted counts of
    all genes there. So genes are learnt as shares of the counts that a region happens to have, and the last output, the
    sum over all genes, from how many these are and nothing else. The loss of each output is divided by the counts that
    the regions would have at its mean density, so that genes with many counts do not outweigh the others, nor large
    regions small ones; the mean over genes and the sum have the same weight. The dispersion α is learnt for every size
    and gene, as sums over larger regions vary less, and from the likelihood alone. The sum over all genes is Poisson:
    then the expected totals of the training regions are those measured, while dispersion would leave them to the
    smallest.

    **Correlation and squared error**, as in Eq. 6, compare measured log-normalised expression with what the likelihood
    expects of it, E[log1p(target_sum y / total)] at the region's depth: the logarithm of the expected counts would be
    another thing, by the more the fewer counts there are, and would pull the level of small regions away. Regions
    without counts take no part.
    """

    pcc_weight: float
    mse_weight: float
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
        mean = predicted * (known.measured_total / known.predicted_total.detach().clamp_min(_TINY)) + _TINY * usual
        lost = _minus_log_likelihood(mean, measured, dispersion) / usual.sum(0).clamp_min(_TINY)
        loss = loss + lost.sum() / (about.n_outputs - 1)
        if not (self.pcc_weight or self.mse_weight):
            return loss
        # Of errors that the image cannot explain a dispersion that grew would make as little as a mean that fits.
        expected = expected_log_normalised(mean, dispersion.detach(), known.measured_total, self.target_sum)
        observed = log_normalised(measured, known.measured_total, self.target_sum)
        some = (known.measured_total > 0).to(expected.dtype)
        squared = (some * (expected - observed) ** 2).sum() / some.sum().clamp_min(1) / (about.n_outputs - 1)
        correlation = _uncorrelated(expected, observed, some) / about.n_varying.clamp_min(1)
        return loss + self.pcc_weight * correlation + self.mse_weight * squared

    def comparable(self, values: Tensor, total: Tensor | None) -> Tensor:
        assert total is not None  # it is the last output
        return log_normalised(values, total, self.target_sum)


def _minus_log_likelihood(mean: Tensor, measured: Tensor, dispersion: Tensor) -> Tensor:
    """Sum over regions, per gene, without the term that depends on the count alone: means and counts (n, M) -> (M,)."""
    shape, grown = 1 / dispersion, torch.log1p(dispersion * mean)
    known = torch.lgamma(measured + shape) - torch.lgamma(shape) + measured * torch.log(dispersion * mean + _TINY)
    return ((measured + shape) * grown - known).sum(0)


def make_objective(name: ObjectiveName, *, pcc_weight: float | None, mse_weight: float, target_sum: float) -> Objective:
    """Make the objective of a name, with the weights of its terms, and the target sum of a likelihood of counts."""
    pcc_weight = PCC_WEIGHTS[name] if pcc_weight is None else pcc_weight
    return MsePcc(pcc_weight) if name == "mse_pcc" else NbPcc(pcc_weight, mse_weight, target_sum)


_COLUMN, _COLUMNS = "dispersion_{:g}um2", re.compile(r"dispersion_(\d[\d.e+]*)um2")


@dataclass(frozen=True, eq=False)
class Dispersion:
    """How much the counts of M genes vary beyond Poisson, α, in regions of k sizes, ascending."""

    areas_um2: NDArray[np.float64]  # (k,)
    values: NDArray[np.float64]  # (k, M)

    @classmethod
    def learnt(cls, log_dispersion: Tensor, areas_um2: Sequence[float]) -> Dispersion:
        """Take what a network has learnt, (sizes, M); sizes that agree in three digits of their area are averaged."""
        areas, place = np.unique([float(f"{area:.3g}") for area in areas_um2], return_inverse=True)
        logs = log_dispersion.detach().cpu().double().numpy()
        return cls(areas, np.exp([logs[place == k].mean(axis=0) for k in range(len(areas))]))

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Give them as the columns of a table's ``var``."""
        return {_COLUMN.format(area): row for area, row in zip(self.areas_um2, self.values, strict=True)}

    @classmethod
    def read(cls, var: Any) -> Dispersion | None:
        """Find them among the columns of a table's ``var``; None where there are none."""
        named = filter(None, map(_COLUMNS.fullmatch, map(str, var)))
        sizes = sorted((float(match[1]), match[0]) for match in named)
        if not sizes:
            return None
        return cls(np.array([area for area, _ in sizes]), np.array([np.asarray(var[n], np.float64) for _, n in sizes]))

    def of(self, genes: NDArray[np.integer]) -> Dispersion:
        """Select genes by position."""
        return Dispersion(self.areas_um2, self.values[:, genes])

    def at(self, areas_um2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolate between sizes, in logarithms, for regions of some areas: (n,) -> (n, M); the ends hold beyond."""
        logs, areas = np.log(self.values), np.log(self.areas_um2)
        inside = np.clip(areas_um2, self.areas_um2[0], self.areas_um2[-1])  # a point has no area
        place = np.interp(np.log(inside), areas, np.arange(len(areas)))
        low = np.minimum(place.astype(np.intp), max(len(areas) - 2, 0))
        share = (place - low)[:, None]
        return np.exp((1 - share) * logs[low] + share * logs[np.minimum(low + 1, len(areas) - 1)])
