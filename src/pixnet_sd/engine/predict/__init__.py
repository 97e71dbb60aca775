"""The pass over a slide: its plan, and its run."""

from __future__ import annotations

from ._plan import Block, PredictPlan, RegionPlan, StoredMap, Tiling, plan_regions, window_side, windows_of
from ._run import Lent, Walk

__all__ = [
    "Block",
    "Lent",
    "PredictPlan",
    "RegionPlan",
    "StoredMap",
    "Tiling",
    "Walk",
    "plan_regions",
    "window_side",
    "windows_of",
]
