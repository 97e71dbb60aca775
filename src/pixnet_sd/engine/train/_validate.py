"""Scores on held-out regions, summed up batch by batch: a slide's predictions are never held as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.engine import TrainingSlide, TrainingTiles, prefetch, training_tiles
from pixnet_sd.geometry import MAP_STRIDE
from pixnet_sd.model import Network, Objective, Operator

from ._batches import DENSE_OUTPUTS, BatchPlan, Target, block_of, make_batch, plan_batches
from ._features import FeatureMaps
from ._objective import TrainSettings

__all__ = ["GeneMeans", "Moments", "Scores", "gene_means", "score_training", "validate"]

GeneMeans = Mapping[str, NDArray[np.float64]]
"""What the mean of each gene predicts for regions of each size, by which a network is measured; "" for other sizes."""

_EPS = 1e-12
_ABSURD, _ABSURD_ZERO = 100.0, 10.0  # times the error of the gene means, and of zeros
_ABSURD_COUNTS = 1000.0  # times the counts that were measured


class Scores(NamedTuple):
    """Scores on regions, each averaged over slides and sizes.

    Attributes
    ----------
    pcc
        Mean over genes of the Pearson correlation over regions.
    mse
        Mean squared error.
    pcc_per_gene
        Correlation of each gene; NaN for genes constant everywhere.
    gene_mean_mse, zero_mse
        Mean squared error of predicting each gene's mean over the training regions, and of predicting nothing.
    count_ratio
        Of a model of counts, predicted counts over measured ones: of the genes, or of all, whichever is further off.
    """

    pcc: float
    mse: float
    pcc_per_gene: list[float]
    gene_mean_mse: float = float("nan")
    zero_mse: float = float("nan")
    count_ratio: float = 1.0

    @property
    def is_absurd(self) -> bool:
        """Whether predictions are so far off that no training comes back from there."""
        most = max(_ABSURD * self.gene_mean_mse, _ABSURD_ZERO * self.zero_mse)
        return not np.isfinite(self.mse) or self.mse > most or self.counts_are_off

    @property
    def counts_are_off(self) -> bool:
        """The same of the sums of counts."""
        return not 1 / _ABSURD_COUNTS < self.count_ratio < _ABSURD_COUNTS


class Moments:
    """Running first and second moments of predicted and measured expression, gene by gene, in 64 bits.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which keeps the precision that sums of
    squares lose.
    """

    def __init__(self, n_genes: int) -> None:
        self.n = 0
        self.mean = np.zeros((2, n_genes))
        self.product = np.zeros((3, n_genes))  # predicted², measured², predicted · measured, about the means
        self.squared_error = 0.0
        self.low, self.high = np.full((2, n_genes), np.inf), np.full((2, n_genes), -np.inf)

    def add(self, predicted: Tensor, measured: Tensor) -> None:
        """Take in some regions, each (k, M)."""
        k = len(measured)
        if not k:
            return
        both = torch.stack([predicted, measured]).double()
        mean = both.mean(dim=1)
        centred = both - mean[:, None]
        product = torch.stack([(centred[i] * centred[j]).sum(0) for i, j in ((0, 0), (1, 1), (0, 1))])
        self._merge(k, mean.cpu().numpy(), product.cpu().numpy())
        self.squared_error += float(((both[0] - both[1]) ** 2).mean(dim=1).sum())
        self.low = np.minimum(self.low, both.amin(dim=1).cpu().numpy())
        self.high = np.maximum(self.high, both.amax(dim=1).cpu().numpy())

    def _merge(self, k: int, mean: NDArray[np.float64], product: NDArray[np.float64]) -> None:
        step, total = mean - self.mean, self.n + k
        self.product += product + np.stack([step[0] ** 2, step[1] ** 2, step[0] * step[1]]) * (self.n * k / total)
        self.mean += step * (k / total)
        self.n = total

    @property
    def pcc(self) -> NDArray[np.float64]:
        """Pearson correlation of each gene; NaN where measured is constant, 0 where only predicted is."""
        constant = self.low == self.high
        scale = np.sqrt(self.product[0] * self.product[1])
        r = np.where(constant[0], 0.0, self.product[2] / np.maximum(scale, _EPS))
        return np.where(constant[1], np.nan, r)

    @property
    def mse(self) -> float:
        """Mean squared error over regions and genes."""
        return self.squared_error / max(self.n, 1)

    def mse_of(self, constant: NDArray[np.float64]) -> float:
        """The same of predicting a constant for each gene."""
        return float((self.product[1] / max(self.n, 1) + (self.mean[1] - constant) ** 2).mean()) if self.n else 0.0


class _Compared:
    """Moments of one size, of all genes, some at a time; what is compared is log-normalised.

    A region without counts has no log-normalised expression, and is not compared.

    Parameters
    ----------
    network, objective
        What predicts, and what it was trained for.
    size_name
        Of the regions.
    depth
        Of the slide.
    """

    def __init__(self, network: Network, objective: Objective, size_name: str, depth: float) -> None:
        self.network, self.objective = network, objective
        self.size_name, self.depth = size_name, depth
        self.counts = np.zeros((2, 2))  # predicted and measured, of the genes and of all
        n_genes = network.head.n_outputs - objective.has_total
        starts = range(0, n_genes, DENSE_OUTPUTS)
        self.blocks = [slice(start, min(start + DENSE_OUTPUTS, n_genes)) for start in starts]
        self.moments = [Moments(block.stop - block.start) for block in self.blocks]

    def add(self, features: Tensor, operator: Operator, target: Target) -> None:
        """Take in a batch."""
        inputs, last = self.network.region_inputs(features, operator), slice(self.network.head.n_outputs - 1, None)
        predict = partial(self.network.region_values, inputs, operator)
        measure = partial(block_of, target, device=features.device)
        totals: list[Tensor | None] = [None, None]
        kept: Tensor | slice = slice(None)
        if self.objective.has_total:
            total = measure(last)
            totals, kept = [predict(last), total], total[:, 0] > 0
            self._count(1, *(values for values in totals if values is not None))
        for block, moments in zip(self.blocks, self.moments, strict=True):
            values = predict(block), measure(block)
            if self.objective.has_total:
                self._count(0, *values)
            both = zip(values, totals, strict=True)
            moments.add(*(self.objective.comparable(some, total)[kept] for some, total in both))

    def _count(self, which: int, predicted: Tensor, measured: Tensor) -> None:
        self.counts[:, which] += [float(predicted.double().sum()) * self.depth, float(measured.double().sum())]

    @property
    def pcc(self) -> NDArray[np.float64]:
        """See `Moments.pcc`."""
        return np.concatenate([moments.pcc for moments in self.moments])

    @property
    def mse(self) -> float:
        """See `Moments.mse`."""
        return self._over_genes([moments.mse for moments in self.moments])

    def mse_of(self, constant: NDArray[np.float64]) -> float:
        """See `Moments.mse_of`."""
        parts = zip(self.moments, self.blocks, strict=True)
        return self._over_genes([moments.mse_of(constant[block]) for moments, block in parts])

    def _over_genes(self, values: list[float]) -> float:
        return float(np.average(values, weights=[block.stop - block.start for block in self.blocks]))

    @property
    def count_ratio(self) -> float:
        """See `Scores.count_ratio`."""
        if not self.objective.has_total or not self.counts[1].all():
            return 1.0
        ratio = self.counts[0] / self.counts[1]
        return float(max(ratio, key=_far))


def _far(ratio: float) -> float:
    """How far a ratio is from 1, on either side."""
    return abs(np.log(ratio)) if 0 < ratio < np.inf else np.inf


def gene_means(
    means: Sequence[Sequence[NDArray[Any]]], slides: Sequence[TrainingSlide], objective: Objective
) -> GeneMeans:
    """What the means of the training regions' targets, of each slide and size, predict by themselves."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for slide, of_slide in zip(slides, means, strict=True):
        for measured, mean in zip(slide.measured, of_slide, strict=True):
            value = torch.as_tensor(np.asarray(mean, np.float64))[None]
            if objective.has_total:
                value = objective.comparable(value[:, :-1], value[:, -1:])
            found.setdefault(measured.size_name, []).append(value[0].numpy())
    by_size = {name: np.mean(each, axis=0) for name, each in found.items()}
    return {"": np.mean(list(by_size.values()), axis=0), **by_size}


@torch.no_grad()
def _moments(
    network: Network,
    objective: Objective,
    features: FeatureMaps,
    slide: TrainingSlide,
    tiles: TrainingTiles,
    plans: Sequence[BatchPlan],
) -> list[_Compared]:
    """Moments over a slide's regions in some batches, per size."""
    options = {"with_image": not features.stored, "pin": features.pins, "gradient": False}
    tasks = (partial(make_batch, slide, tiles, plan, MAP_STRIDE, **options) for plan in plans)
    found = [_Compared(network, objective, m.size_name, slide.depth) for m in slide.measured]
    for batch in features.copies.arriving(prefetch(tasks)):
        maps = features.of(batch, slide, tiles)
        for compared, operator, target in zip(found, batch.operators, batch.targets, strict=True):
            compared.add(maps, operator, target)
    return found


def validate(
    network: Network,
    objective: Objective,
    features: FeatureMaps,
    slides: Sequence[TrainingSlide],
    settings: TrainSettings,
    means: GeneMeans,
) -> Scores:
    """Score a network on held-out regions.

    Parameters
    ----------
    network
        The network, put into evaluation mode.
    objective
        What it is trained for, which says what of its output is compared.
    features
        Its feature maps.
    slides
        Slides with their held-out regions.
    settings
        Tile and batch size.
    means
        Of the training regions.

    Returns
    -------
    The scores.
    """
    network.eval()
    found = []
    for slide in slides:
        tiles = training_tiles(slide, settings.tile_px, once=True)
        plans = plan_batches([tiles], settings.batch_size, rng=None)
        found += _moments(network, objective, features, slide, tiles, plans)
    return _scores(found, means)


def score_training(
    network: Network,
    objective: Objective,
    features: FeatureMaps,
    slides: Sequence[TrainingSlide],
    settings: TrainSettings,
    means: GeneMeans,
    n_batches: int,
) -> Scores:
    """Score a network on a few batches of its training regions, as it predicts and not as it trains.

    Parameters are those of `validate`, and how many batches to take, evenly spread.
    """
    network.eval()
    tiles = [training_tiles(slide, settings.tile_px, once=True) for slide in slides]
    plans = plan_batches(tiles, settings.batch_size, rng=None)
    picked = np.unique(np.linspace(0, len(plans) - 1, min(n_batches, len(plans))).astype(np.intp))
    found = []
    for k, (slide, own) in enumerate(zip(slides, tiles, strict=True)):
        mine = [plans[i] for i in picked if plans[i].slide == k]
        if mine:
            found += _moments(network, objective, features, slide, own, mine)
    return _scores(found, means)


def _scores(found: Sequence[_Compared], means: GeneMeans) -> Scores:
    found = [each for each in found if each.moments[0].n] or found
    per_gene = np.array([each.pcc for each in found])
    known = ~np.isnan(per_gene)
    mean = np.nansum(per_gene, axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    pcc = float(np.nanmean(mean)) if known.any() else float("-inf")
    by_mean = [each.mse_of(means.get(each.size_name, means[""])) for each in found]
    by_zero = [each.mse_of(np.zeros_like(means[""])) for each in found]
    mse = float(np.mean([each.mse for each in found]))
    ratio = max((each.count_ratio for each in found), key=_far, default=1.0)
    return Scores(pcc, mse, [float(v) for v in mean], float(np.mean(by_mean)), float(np.mean(by_zero)), ratio)
