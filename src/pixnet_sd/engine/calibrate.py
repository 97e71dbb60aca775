"""Measure, once and before training, on what scale each encoder channel varies between regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixnet_sd.nn.encoder import STRIDES
from pixnet_sd.nn.model import Network

from .batches import make_batch, plan_batches
from .features import FeatureMaps
from .settings import TrainSettings
from .slides import TrainingSlide
from .tiling import TrainingTiles

__all__ = ["calibrate"]

_MAX_BATCHES = 16
_MAX_REGIONS = 1024  # kept of a batch and size: two moments need no more, and a batch has thousands of 2 µm bins


@torch.no_grad()
def calibrate(
    network: Network,
    features: FeatureMaps,
    slides: Sequence[TrainingSlide],
    tiles: list[TrainingTiles],
    settings: TrainSettings,
) -> None:
    """Set the standardising constants of the network's laterals.

    They are the mean and standard deviation of each feature channel over training regions, each level pooled exactly
    over the regions: a channel that flickers from pixel to pixel but says little between regions is not drowned, and
    one that separates regions is put on the same scale as its peers.

    Parameters
    ----------
    network
        The network; one without laterals is left as it is.
    features
        Its feature maps.
    slides
        Training slides.
    tiles
        Their tiles.
    settings
        Batch size and seed.
    """
    if not network.has_laterals:
        return
    plans = plan_batches(tiles, settings.batch_size, None)
    picked = torch.randperm(len(plans))[:_MAX_BATCHES].tolist()
    network.train()  # an encoder that will be trained normalises by batch statistics, a frozen one never does
    pooled: list[list[Tensor]] = [[] for _ in STRIDES]
    for plan in (plans[i] for i in picked):
        slide, found = slides[plan.slide], tiles[plan.slide]
        pyramid = features.pyramid(slide, [found.tiles[t] for t in plan.tiles], 0)
        for level, stride in enumerate(STRIDES):
            rows = pyramid[level].float().permute(0, 2, 3, 1).flatten(0, 2)
            for operator in make_batch(slide, found, plan, stride, with_image=False, with_targets=False).operators:
                n_px = torch.as_tensor(operator.n_px, dtype=torch.float32, device=rows.device)
                means = operator.apply(rows) / n_px.clamp_min(1e-12)[:, None]
                pooled[level].append(means[:: -(-len(means) // _MAX_REGIONS) or 1])
    network.calibrate([torch.cat(level) for level in pooled])
