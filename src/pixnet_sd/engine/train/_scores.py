"""The loss of a batch and scores on regions: some outputs at a time, and never the predictions of a whole slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.model import Densities, Network, Objective, Operator, Part, Totals

from ._batches import DENSE_OUTPUTS, Target, block_of, output_blocks
from ._features import FeatureMaps

_EPS = 1e-8  # as of `pearson_per_gene`
_ABSURD, _ABSURD_ZERO = 100.0, 10.0  # times the error of the gene means, and of zeros
_ABSURD_COUNTS = 1000.0  # times the counts that were measured


@dataclass(frozen=True)
class BatchLoss:
    """Mean over region sizes of the objective, every size with the same weight, however many regions it has.

    A tile holds 64 times as many 2 µm bins as 16 µm ones; weighted by their number, the noisiest size would decide.
    """

    network: Network
    objective: Objective
    operators: list[Operator]  # of each size
    targets: list[Target]
    sizes: list[int]  # numbers among all sizes of the run
    sums: list[Operator | None] | None = None  # of each size, see `Densities`
    depth: float = 1.0  # counts of this slide relative to the mean of all, where they are what is learnt
    block_size: int | None = None  # outputs that are held together; None: as many as memory allows

    def backward(self, features: Tensor, fabric: Fabric) -> Tensor:
        """Add the gradient to that of all parameters, from D (B, C, h, w); returns the loss, detached."""
        used = [k for k, target in enumerate(self.targets) if target.shape[0]]  # sizes with regions in these tiles
        rows = self.network.rows(features)
        inputs = [self.network.region_inputs(rows, self.operators[k]) for k in used]
        n_rows = max(max(len(own), self.targets[k].shape[0]) for k, own in zip(used, inputs, strict=True))
        blocks = output_blocks(self.network.head.n_outputs, n_rows, self.block_size)
        held = [partial(block_of, self.targets[k], device=features.device) for k in used]
        varying = [self.objective.n_varying(map(targets, blocks)) for targets in held]
        totals = [self._totals(k, own) for k, own in zip(used, inputs, strict=True)]
        # The gradient stops at what all blocks share, and is carried on from there once. Sizes that need all pixels,
        # as bins do, have one input.
        shared = {id(own): own for own in inputs}
        leaves = {key: own.detach().requires_grad_() for key, own in shared.items()}
        total = features.new_zeros(())
        for outputs in blocks:
            pixels = {key: self.network.pixel_values(leaf, outputs) for key, leaf in leaves.items()}
            each = zip(used, [pixels[id(own)] for own in inputs], varying, totals, strict=True)
            loss = torch.stack([self._part(outputs, *of_size) for of_size in each]).mean()
            fabric.backward(loss)
            total += loss.detach()
        grads = [(own * grad).sum() for key, own in shared.items() if (grad := leaves[key].grad) is not None]
        fabric.backward(torch.stack(grads).sum())
        return total

    @torch.no_grad()
    def _totals(self, k: int, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Predict and read the counts of all genes in regions of the k-th size, (n, 1) each."""
        if not self.objective.has_total:
            return None
        last = slice(self.network.head.n_outputs - 1, self.network.head.n_outputs)
        predicted = self.network.region_values(inputs, self.operators[k], last) * self.depth
        return predicted, block_of(self.targets[k], last, inputs.device)

    def _part(
        self, outputs: slice, k: int, pixels: Tensor, n_varying: Tensor, totals: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Compute the share of the k-th size's loss that a group of outputs has, from their `pixel_values`."""
        operator, head, densities = self.operators[k], self.network.head, None
        predicted = self.network.summed(pixels, operator, outputs)
        predicted = predicted if self.depth == 1 else predicted * self.depth
        if totals is not None:  # usual counts, and the sums over all genes
            unit = self.depth * head.unit
            n_px = torch.as_tensor(operator.n_px, dtype=unit.dtype, device=unit.device)[:, None]
            dispersion = self.network.log_dispersion_of(self.sizes[k], outputs)
            usual = n_px * unit[outputs], n_px * unit[-1:]
            densities = Densities(*totals, dispersion, *usual, self.sums[k] if self.sums else None)
        about = Part(outputs, head.n_outputs, n_varying, densities)
        return self.objective.part(predicted, block_of(self.targets[k], outputs, pixels.device), about)


class Scores(NamedTuple):
    """Scores on regions, each averaged over slides and sizes."""

    pcc: float  # Pearson correlation over regions, mean over genes
    mse: float
    pcc_per_gene: list[float]  # NaN for genes constant everywhere
    gene_mean_mse: float = float("nan")  # of predicting each gene's mean over the same regions
    zero_mse: float = float("nan")  # of predicting nothing
    count_ratio: float = 1.0  # predicted over measured counts, of the genes or of all, whichever is further off

    @property
    def is_absurd(self) -> bool:
        """Whether errors, or the sums of counts, are so far off that no training comes back from there."""
        most = max(_ABSURD * self.gene_mean_mse, _ABSURD_ZERO * self.zero_mse)
        few_or_many = not 1 / _ABSURD_COUNTS < self.count_ratio < _ABSURD_COUNTS
        return not np.isfinite(self.mse) or self.mse > most or few_or_many


class Moments(NamedTuple):
    """What scores are made of, a value a gene, so that regions come in parts; the columns of ``scores.json``."""

    n: NDArray[np.float64]
    predicted_mean: NDArray[np.float64]
    predicted_ss: NDArray[np.float64]
    measured_mean: NDArray[np.float64]
    measured_ss: NDArray[np.float64]
    product: NDArray[np.float64]
    mse: NDArray[np.float64]
    mae: NDArray[np.float64]

    @classmethod
    def of(cls, predicted: Tensor, measured: Tensor) -> Moments:
        """Compute them from regions, one or more, (regions, genes) each."""
        # Of a constant gene the mean is its value and the sum of squares 0, exactly, by which it is recognised.
        both = torch.stack([predicted, measured]).double()
        mean = torch.where(both.amin(dim=1) == both.amax(dim=1), both[:, 0], both.mean(dim=1))
        (p, m), error = both - mean[:, None], both[0] - both[1]
        sums = (p**2).sum(dim=0), mean[1], (m**2).sum(dim=0), (p * m).sum(dim=0)
        errors = (error**2).mean(dim=0), error.abs().mean(dim=0)
        columns = [torch.full_like(mean[0], len(error)), mean[0], *sums, *errors]
        return cls(*torch.stack(columns).cpu().numpy())

    def merged(self, other: Moments) -> Moments:
        """Add the moments of other regions, one or more (Chan, Golub and LeVeque, 1983)."""
        n = self.n + other.n
        share = other.n / n
        weight = self.n * share
        predicted, measured = other.predicted_mean - self.predicted_mean, other.measured_mean - self.measured_mean
        return Moments(  # a constant gene's difference is 0: its mean stays what it is
            n=n,
            predicted_mean=self.predicted_mean + predicted * share,
            predicted_ss=self.predicted_ss + other.predicted_ss + predicted**2 * weight,
            measured_mean=self.measured_mean + measured * share,
            measured_ss=self.measured_ss + other.measured_ss + measured**2 * weight,
            product=self.product + other.product + predicted * measured * weight,
            mse=self.mse + (other.mse - self.mse) * share,
            mae=self.mae + (other.mae - self.mae) * share,
        )

    @property
    def pcc(self) -> NDArray[np.float64]:
        """Pearson correlation of each gene; NaN where measured is constant, 0 where only predicted is."""
        r = self.product / (np.sqrt(self.predicted_ss * self.measured_ss) + _EPS)
        return np.where(self.measured_ss == 0, np.nan, r)

    def mse_of(self, constant: NDArray[np.float64] | float) -> float:
        """Mean squared error of predicting a constant for each gene."""
        spread = self.measured_ss / np.maximum(self.n, 1) + (self.measured_mean - constant) ** 2
        return float(spread.mean()) if self.n.any() else 0.0


class _SizeMoments:
    """Moments of the log-normalised expression of one size's regions: a region without counts has none."""

    def __init__(self, network: Network, objective: Objective, size: int | None, depth: float) -> None:
        self.network, self.objective, self.size, self.depth = network, objective, size, depth
        self.n_genes = network.head.n_outputs - objective.has_total
        self.counts = np.zeros((2, 2))  # predicted and measured, of the genes and of all
        self.values = np.zeros((len(Moments._fields), self.n_genes))
        self.summed = np.zeros(self.n_genes)  # measured counts of each gene

    def add(self, features: Tensor, operator: Operator, target: Target) -> None:
        """Take in a batch's regions of this size."""
        inputs = self.network.region_inputs(self.network.rows(features), operator)
        predict = partial(self.network.region_values, inputs, operator)
        measure = partial(block_of, target, device=features.device)
        kept: Tensor | slice = slice(None)
        totals = None
        if self.objective.has_total:
            last = slice(self.n_genes, None)
            totals = predict(last), measure(last)
            kept = totals[1][:, 0] > 0
            self._count(1, *totals)
        for start in range(0, self.n_genes, DENSE_OUTPUTS):
            genes = slice(start, min(start + DENSE_OUTPUTS, self.n_genes))
            values, about = (predict(genes), measure(genes)), None
            if totals is not None:
                self._count(0, *values)
                self.summed[genes] += values[1].double().sum(0).cpu().numpy()
                about = Totals(*totals, self.network.log_dispersion_of(self.size, genes))
            predicted, measured = self.objective.comparable(*values, about)
            if len(measured := measured[kept]):
                own = Moments.of(predicted[kept], measured)
                self.values[:, genes] = Moments(*self.values[:, genes]).merged(own)

    def _count(self, which: int, predicted: Tensor, measured: Tensor) -> None:
        self.counts[:, which] += [float(predicted.double().sum()) * self.depth, float(measured.double().sum())]

    @property
    def moments(self) -> Moments:
        return Moments(*self.values)

    @property
    def gene_mean(self) -> NDArray[np.float64]:
        """What the mean of each gene predicts: that of log-normalised values, or the logarithm of all its counts."""
        if not self.objective.has_total:
            return self.moments.measured_mean
        sums, total = torch.from_numpy(self.summed)[None], torch.tensor([[self.counts[1, 1]]])
        about = Totals(total, total, torch.zeros(self.n_genes, dtype=torch.float64))
        return self.objective.comparable(sums, sums, about)[1][0].numpy()

    @property
    def count_ratio(self) -> float:
        """Predicted over measured counts, as in `Scores`; 1 where there are none."""
        return float(max(self.counts[0] / self.counts[1], key=_far)) if self.counts[1].all() else 1.0


def _far(ratio: float) -> float:
    """Tell how far a ratio is from 1, on either side."""
    return abs(np.log(ratio)) if 0 < ratio < np.inf else np.inf


@torch.no_grad()
def score_regions(
    network: Network,
    objective: Objective,
    features: FeatureMaps,
    slides: Sequence[TrainingSlide],
    n_batches: int | None = None,
) -> Scores:
    """Score a network on slides' regions, or on some, see `FeatureMaps.scored`."""
    sizes: dict[int, list[_SizeMoments]] = {}
    for batch, maps in features.scored(slides, n_batches):
        slide = batch.plan.slide
        if id(slide) not in sizes:
            known = [features.run.size_number(m.size_name) for m in slide.measured]
            sizes[id(slide)] = [_SizeMoments(network, objective, number, slide.depth) for number in known]
        for size, operator, target in zip(sizes[id(slide)], batch.operators, batch.targets, strict=True):
            size.add(maps, operator, target)
    every = [size for of_slide in sizes.values() for size in of_slide]
    every = [size for size in every if size.moments.n.any()] or every
    per_gene = np.array([size.moments.pcc for size in every])
    n_known = (~np.isnan(per_gene)).sum(axis=0)
    pcc_per_gene = np.nansum(per_gene, axis=0) / np.where(n_known, n_known, np.nan)
    of_means = [size.moments.mse_of(size.gene_mean) for size in every]
    return Scores(
        pcc=float(np.nanmean(pcc_per_gene)) if n_known.any() else float("-inf"),
        mse=float(np.mean([size.moments.mse.mean() for size in every])),
        pcc_per_gene=pcc_per_gene.tolist(),
        gene_mean_mse=float(np.mean(of_means)),
        zero_mse=float(np.mean([size.moments.mse_of(0.0) for size in every])),
        count_ratio=max((size.count_ratio for size in every), key=_far, default=1.0),
    )
