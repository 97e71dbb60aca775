"""The training loop: data, steps, validation, state."""

from __future__ import annotations

from ._loop import train
from ._objective import TrainSettings
from ._split import hold_out_blocks
from ._state import RunState

__all__ = ["RunState", "TrainSettings", "hold_out_blocks", "train"]
