"""Scores on held-out regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pixnet_sd.nn.losses import pearson_per_gene
from pixnet_sd.nn.model import MAP_STRIDE, Network

from .batches import make_batch, plan_batches
from .features import FeatureMaps
from .settings import TrainSettings
from .slides import TrainingSlide
from .tiling import training_tiles

__all__ = ["Scores", "validate"]


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


@torch.no_grad()
def _predict(network: Network, features: FeatureMaps, slide: TrainingSlide, settings: TrainSettings) -> list[Tensor]:
    """Predictions of a slide's regions, per size, in the regions' order."""
    tiles = training_tiles(slide, settings.tile_px, once=True)
    out = [torch.zeros(m.values.shape) for m in slide.measured]
    for plan in plan_batches([tiles], settings.batch_size, rng=None):
        batch = make_batch(slide, tiles, plan, MAP_STRIDE, with_image=not features.stored)
        maps = features.of(batch, slide, tiles)
        for values, operator, index in zip(out, batch.operators, batch.members, strict=True):
            values[index] = network.predict_regions(maps, operator).cpu()
    return out


def validate(
    network: Network, features: FeatureMaps, slides: Sequence[TrainingSlide], settings: TrainSettings
) -> Scores:
    """Score a network on held-out regions.

    Parameters
    ----------
    network
        The network; its mode is kept.
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
    per_gene, errors = [], []
    for slide in slides:
        for measured, predicted in zip(slide.measured, _predict(network, features, slide, settings), strict=True):
            target = torch.from_numpy(measured.values)
            per_gene.append(pearson_per_gene(predicted, target).numpy())
            errors.append(float(((predicted - target) ** 2).mean()))
    known = ~np.isnan(per_gene)
    mean = np.nansum(per_gene, axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    pcc = float(np.nanmean(mean)) if known.any() else float("-inf")
    return Scores(pcc, float(np.mean(errors)), [float(v) for v in mean])
