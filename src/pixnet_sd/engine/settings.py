"""How a network is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pixnet_sd.nn.objectives import ObjectiveName

__all__ = ["TrainSettings", "learning_rate"]

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
