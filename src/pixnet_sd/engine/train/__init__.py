"""The training loop: data, steps, validation, state."""

from __future__ import annotations

from ._batches import BatchPlan, make_batch, output_blocks, plan_batches
from ._features import FeatureMaps, PyramidCache, calibrate
from ._level import set_dispersion, set_level
from ._loop import Trainer, train
from ._run import BestEpoch, Run, RunState, seal, warn_of_versions
from ._scores import BatchLoss, Moments, Scores, score_regions
from ._split import hold_out_blocks

__all__ = [
    "BatchLoss",
    "BatchPlan",
    "BestEpoch",
    "FeatureMaps",
    "Moments",
    "PyramidCache",
    "Run",
    "RunState",
    "Scores",
    "Trainer",
    "calibrate",
    "hold_out_blocks",
    "make_batch",
    "output_blocks",
    "plan_batches",
    "score_regions",
    "seal",
    "set_dispersion",
    "set_level",
    "train",
    "warn_of_versions",
]
