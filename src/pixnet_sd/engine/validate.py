"""Scores on held-out regions, summed up batch by batch: a slide's predictions are never held as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.nn.model import MAP_STRIDE, Network
from pixnet_sd.nn.objectives import Objective
from pixnet_sd.nn.operators import Operator

from .batches import make_batch, plan_batches, prefetch
from .features import FeatureMaps
from .settings import TrainSettings
from .slides import TrainingSlide
from .targets import DENSE_OUTPUTS, Target, block_of
from .tiling import training_tiles

__all__ = ["Moments", "Scores", "validate"]

_EPS = 1e-12


class Scores(NamedTuple):
    """Held-out scores, each averaged over slides and sizes.

    Attributes
    ----------
    pcc
        Mean over genes of the Pearson correlation over regions.
    mse
        Mean squared error.
    pcc_per_gene
        Correlation of each gene; NaN for genes constant everywhere.
    """

    pcc: float
    mse: float
    pcc_per_gene: list[float]


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


class _Compared:
    """Moments of one size, of all genes, some at a time; what is compared is log-normalised.

    A region without counts has no log-normalised expression, and is not compared.

    Parameters
    ----------
    network, objective
        What predicts, and what it was trained for.
    """

    def __init__(self, network: Network, objective: Objective) -> None:
        self.network, self.objective = network, objective
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
        for block, moments in zip(self.blocks, self.moments, strict=True):
            both = zip((predict, measure), totals, strict=True)
            predicted, measured = (self.objective.comparable(values(block), total)[kept] for values, total in both)
            moments.add(predicted, measured)

    @property
    def pcc(self) -> NDArray[np.float64]:
        """See `Moments.pcc`."""
        return np.concatenate([moments.pcc for moments in self.moments])

    @property
    def mse(self) -> float:
        """See `Moments.mse`."""
        return float(np.average([m.mse for m in self.moments], weights=[m.mean.shape[1] for m in self.moments]))


@torch.no_grad()
def _moments(
    network: Network, objective: Objective, features: FeatureMaps, slide: TrainingSlide, settings: TrainSettings
) -> list[_Compared]:
    """Moments over a slide's regions, per size."""
    tiles = training_tiles(slide, settings.tile_px, once=True)
    plans = plan_batches([tiles], settings.batch_size, rng=None)
    options = {"with_image": not features.stored, "pin": features.pins, "gradient": False}
    tasks = (partial(make_batch, slide, tiles, plan, MAP_STRIDE, **options) for plan in plans)
    found = [_Compared(network, objective) for _ in slide.measured]
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

    Returns
    -------
    The scores.
    """
    network.eval()
    found = [size for slide in slides for size in _moments(network, objective, features, slide, settings)]
    per_gene = np.array([moments.pcc for moments in found])
    known = ~np.isnan(per_gene)
    mean = np.nansum(per_gene, axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    pcc = float(np.nanmean(mean)) if known.any() else float("-inf")
    return Scores(pcc, float(np.mean([moments.mse for moments in found])), [float(v) for v in mean])
