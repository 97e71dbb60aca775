"""After the training of densities: level and scatter of counts as they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.model import Network
from pixnet_sd.model.noise import calibrated_dispersion

from ._batches import DENSE_OUTPUTS, block_of, output_blocks
from ._features import FeatureMaps

_FURTHEST = 10.0  # times that a density is made larger or smaller
_MOST_BATCHES, _MOST_REGIONS, _MOST_VALUES = 32, 256, 2**19  # whose scatter is looked at; the latter two of a batch


class _Compared(NamedTuple):
    """Expected counts of some outputs at the measured depth, and measured ones, of regions of one size."""

    slide: TrainingSlide
    size: int
    outputs: slice
    expected: Tensor  # (n, outputs)
    measured: Tensor
    total: Tensor  # expected at the slide's depth, and measured, (n, 2)


def _compared(
    network: Network, features: FeatureMaps, slides: Sequence[TrainingSlide], n_batches: int | None
) -> Iterator[_Compared]:
    """Compare regions of slides, see `FeatureMaps.scored`, each size after the other, some genes at a time."""
    n_genes = network.head.n_outputs - 1
    for batch, maps in features.scored(slides, n_batches):
        slide = batch.plan.slide
        for size, (operator, target) in enumerate(zip(batch.operators, batch.targets, strict=True)):
            inputs = network.region_inputs(network.rows(maps), operator)
            predict = partial(network.region_values, inputs, operator)
            measure, last = partial(block_of, target, device=maps.device), slice(n_genes, n_genes + 1)
            total, depth = measure(last), predict(last)
            both = torch.cat([slide.depth * depth, total], dim=1)  # regions without counts are of the total's level
            for outputs in output_blocks(n_genes, len(inputs), min(n_genes, DENSE_OUTPUTS)):
                expected = predict(outputs) * (total / depth.clamp_min(1e-12))
                yield _Compared(slide, size, outputs, expected, measure(outputs), both)


@torch.no_grad()
def set_level(
    network: Network, features: FeatureMaps, slides: Sequence[TrainingSlide], n_batches: int | None = None
) -> None:
    """Scale the density of each output so that on slides' regions, or some, expected and measured counts add up alike.

    A gene's counts are those expected at the measured number of all. Every slide and size has the same weight. It is
    where a likelihood by itself would end, and the other terms of an objective, and dropout, pull away from.
    """
    sums: dict[tuple[int, int], NDArray[np.float64]] = {}
    for slide, size, outputs, expected, measured, total in _compared(network, features, slides, n_batches):
        of_size = sums.setdefault((id(slide), size), np.zeros((2, network.head.n_outputs)))
        of_size[:, outputs] += torch.stack([expected, measured]).double().sum(1).cpu().numpy()
        if outputs.start == 0:
            of_size[:, -1] += total.double().sum(0).cpu().numpy()
    # Of the counts of all genes, so that one slide or size is like another.
    shares = [of_size / of_size[1, -1] for of_size in sums.values() if of_size[1, -1] > 0]
    expected_share, share = np.mean(shares, axis=0)
    known = (expected_share > 0) & (share > 0)
    ratio = np.where(known, share, 1) / np.where(known, expected_share, 1)
    ratio = ratio.clip(1 / _FURTHEST, _FURTHEST)
    ratio[:-1] *= ratio[-1]  # a gene is a share of the total
    network.head.unit.mul_(torch.from_numpy(ratio).to(network.head.unit))


@torch.no_grad()
def set_dispersion(network: Network, features: FeatureMaps, held_out: Sequence[TrainingSlide]) -> None:
    """Widen or narrow the dispersion of each gene and size so that intervals hold their share of held-out regions.

    What was learnt in the training is of regions that the network knows. A size of which none is held out keeps it.
    """
    assert network.log_dispersion is not None  # of densities
    most = min(_MOST_REGIONS, max(_MOST_VALUES // network.head.n_outputs, 1))
    found: dict[tuple[int, int], list[NDArray[np.float64]]] = {}
    blocks: dict[int, slice] = {}
    for slide, size, outputs, mean, counts, total in _compared(network, features, held_out, _MOST_BATCHES):
        number, some = features.run.size_number(slide.measured[size].size_name), total[:, 1] > 0
        mean, counts = mean[some], counts[some]
        if number is not None and len(counts):
            picked = np.unique(np.linspace(0, len(counts) - 1, most).astype(np.intp))
            both = torch.stack([counts, mean])[:, picked].double()
            found.setdefault((number, outputs.start), []).append(both.cpu().numpy())
            blocks[outputs.start] = outputs
    for (number, start), parts in found.items():
        learnt = network.log_dispersion[number, blocks[start]]
        measured, expected = np.concatenate(parts, axis=1)
        values = calibrated_dispersion(measured, expected, learnt.exp().double().cpu().numpy())
        learnt.copy_(torch.from_numpy(np.log(values)).to(learnt))
