"""Sample data that needs no network, and readers for what is on disk."""

from __future__ import annotations

from ._her2st import her2st
from ._sample import sample, sample_truth, sample_truth_bins

__all__ = ["her2st", "sample", "sample_truth", "sample_truth_bins"]
