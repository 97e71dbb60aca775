"""How a network is trained.

The loss of a batch and its gradient, some outputs at a time where there are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from pixnet_sd.model import Densities, Network, Objective, Operator, Part
from pixnet_sd.params import ObjectiveName

from ._batches import Target, block_of, output_blocks

__all__ = ["BatchLoss", "TrainSettings", "learning_rate"]

_WARM_UP = 0.2


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run.

    Attributes
    ----------
    max_epochs
        Passes over the tiles.
    max_steps
        Optimizer steps after which to stop, in the middle of an epoch if need be; None: no such limit.
    lr, weight_decay
        Of the optimizer.
    optimizer
        ``"adamw"``, or ``"adam"`` (the paper's, with the weight decay as an L2 term).
    anneal
        True: one cycle, the rate rises over the first fifth and falls to zero (a run of known length). False:
        constant (a run that early stopping may end at any time).
    objective
        What is minimised, and so what targets are: log-normalised expression, or raw counts with their sum last.
    pcc_weight
        λ of Eq. 6.
    target_sum
        Of the log-normalised values by which models of counts are compared.
    tile_px
        Largest side of a tile, working pixels.
    batch_size
        Tiles of one slide per step.
    patience
        Epochs without a better held-out PCC after which to stop; None never stops early.
    keep_best
        End with the weights of the best epoch on held-out regions instead of the last.
    stain_jitter
        Strength of `jitter_stain`.
    symmetries
        Turn and mirror tiles at random.
    compile
        Run the network through ``torch.compile``.
    seed
        Of everything random.
    """

    max_epochs: int = 500
    max_steps: int | None = None
    lr: float = 5e-4
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "adam"] = "adamw"
    anneal: bool = False
    objective: ObjectiveName = "mse_pcc"
    pcc_weight: float = 2.0
    target_sum: float = 1e4
    tile_px: int = 512
    batch_size: int = 8
    patience: int | None = None
    keep_best: bool = True
    stain_jitter: float = 0.05
    symmetries: bool = True
    compile: bool = False
    seed: int = 0


def learning_rate(settings: TrainSettings, progress: float) -> float:
    """Learning rate at a share of the run, 0 to 1; a function of progress alone, so that a resumed run agrees."""
    if not settings.anneal:
        return settings.lr
    if progress < _WARM_UP:
        return settings.lr * (0.04 + 0.96 * progress / _WARM_UP)
    return float(settings.lr * 0.5 * (1 + np.cos(np.pi * (progress - _WARM_UP) / (1 - _WARM_UP))))


@dataclass(frozen=True)
class BatchLoss:
    """Mean over region sizes of the objective, every size with the same weight, however many regions it has.

    A tile holds 64 times as many 2 µm bins as 16 µm ones; weighted by their number, the noisiest size would decide.

    Attributes
    ----------
    network, objective
        What predicts, and what is minimised.
    operators, targets, sizes
        Of each size, and its number among all sizes of the run.
    depth
        Counts of this slide relative to the mean of all, where they are what is learnt.
    """

    network: Network
    objective: Objective
    operators: list[Operator]
    targets: list[Target]
    sizes: list[int]
    depth: float = 1.0

    def backward(self, features: Tensor, fabric: Fabric) -> Tensor:
        """The loss, detached; its gradient is added to that of all parameters.

        Parameters
        ----------
        features
            D of the batch, shape (B, C, h, w).
        fabric
            What carries gradients back.
        """
        there = [k for k, target in enumerate(self.targets) if len(target)]
        inputs = [self.network.region_inputs(features, self.operators[k]) for k in there]
        n_rows = max(max(len(given), len(self.targets[k])) for k, given in zip(there, inputs, strict=True))
        blocks = output_blocks(self.network.head.n_outputs, n_rows)
        varying = [
            self.objective.n_varying(block_of(self.targets[k], block, features.device) for block in blocks)
            for k in there
        ]
        if len(blocks) == 1:
            loss = self._block(blocks[0], there, inputs, varying)
            fabric.backward(loss)
            return loss.detach()
        # the gradient stops at what all blocks share, and is carried on from there once
        leaves = [given.detach().requires_grad_() for given in inputs]
        total = features.new_zeros(())
        for block in blocks:
            loss = self._block(block, there, leaves, varying)
            fabric.backward(loss)
            total += loss.detach()
        carried = [
            (given * leaf.grad).sum() for given, leaf in zip(inputs, leaves, strict=True) if leaf.grad is not None
        ]
        fabric.backward(torch.stack(carried).sum())
        return total

    def _block(self, outputs: slice, there: list[int], inputs: list[Tensor], varying: list[Tensor | None]) -> Tensor:
        """Share of the loss of some outputs."""
        parts = []
        for k, given, n_varying in zip(there, inputs, varying, strict=True):
            predicted = self.network.region_values(given, self.operators[k], outputs)
            if self.depth != 1:
                predicted = predicted * self.depth
            densities = self._densities(k, outputs, given) if self.objective.has_total else None
            about = Part(outputs, self.network.head.n_outputs, n_varying, self.sizes[k], densities)
            parts.append(self.objective.part(predicted, block_of(self.targets[k], outputs, given.device), about))
        return torch.stack(parts).mean()

    def _densities(self, k: int, outputs: slice, given: Tensor) -> Densities:
        """What is usual, and the sums over all genes."""
        operator, unit = self.operators[k], self.depth * self.network.head.unit
        n_px = torch.as_tensor(operator.n_px, dtype=unit.dtype, device=unit.device)[:, None]
        last = slice(len(unit) - 1, len(unit))
        total = self.network.region_values(given, operator, last) * self.depth
        return Densities(n_px * unit[outputs], n_px * unit[last], total, block_of(self.targets[k], last, unit.device))
