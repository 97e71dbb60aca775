"""Sample data that needs no network, and readers for what is on disk."""

from __future__ import annotations

from ._her2st import her2st
from ._sample import sample, sample_truth, sample_truth_bins
from ._space_ranger import visium_hd_truth, write_visium, write_visium_hd

__all__ = [
    "her2st",
    "sample",
    "sample_truth",
    "sample_truth_bins",
    "visium_hd_truth",
    "write_visium",
    "write_visium_hd",
]
