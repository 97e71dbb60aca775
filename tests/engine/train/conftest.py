"""Runs of a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixnet_sd.engine import TrainingSlide
from pixnet_sd.engine.train import FeatureMaps, Run
from pixnet_sd.params import TrainParams

OWN = ("max_epochs", "batch_size", "objective", "seed", "save_every_s")


class Colours(FeatureMaps):
    """Its map is the colour of the slide over 128, as of a network that knows the answer."""

    def of(self, batch: Any) -> Tensor:
        return torch.nn.functional.avg_pool2d(batch.image.float(), 4)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """A run in a folder of the test's, of the parameters of `Run` and `TrainParams`."""

    def make(
        training: Sequence[TrainingSlide] = (),
        held_out: Sequence[TrainingSlide] = (),
        *,
        folder: str = "run",
        fingerprint: str = "this run",
        **options: Any,
    ) -> Run:
        own = {"max_epochs": 3, "batch_size": 3} | {k: options.pop(k) for k in OWN if k in options}
        params = TrainParams(**({"lr": 5e-3, "tile_px": 64, "anneal": False} | options))
        return Run(training, held_out, params, tmp_path / folder, fingerprint, **own)

    return make
