"""Plots that squidpy and spatialdata-plot do not have."""

from __future__ import annotations

from ._gene_map import gene_map
from ._reliability import reliability
from ._training import evaluation, history, training_regions

__all__ = ["evaluation", "gene_map", "history", "reliability", "training_regions"]
