"""The pass over a slide: its plan, and its run."""

from __future__ import annotations

from ._plan import BlockSink, RegionPlan, plan_regions, window_side
from ._run import Inference, InferSettings, infer

__all__ = ["BlockSink", "InferSettings", "Inference", "RegionPlan", "infer", "plan_regions", "window_side"]
