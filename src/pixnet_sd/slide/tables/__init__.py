"""Measured expression of a slide: tables, counts, genes and targets."""

from __future__ import annotations

from ._cache import CountFile, find_pooling, open_counts, write_counts
from ._checks import Look, checked_blocks, checked_totals
from ._counts import Counts, log_normalise
from ._measured import Measured, counts_of, genes_of, measured, measured_regions, measured_tables, select_tables
from ._targets import StoredTargets, Targets, check_genes, choose_genes, targets_of

__all__ = [
    "CountFile",
    "Counts",
    "Look",
    "Measured",
    "StoredTargets",
    "Targets",
    "check_genes",
    "checked_blocks",
    "checked_totals",
    "choose_genes",
    "counts_of",
    "find_pooling",
    "genes_of",
    "log_normalise",
    "measured",
    "measured_regions",
    "measured_tables",
    "open_counts",
    "select_tables",
    "targets_of",
    "write_counts",
]
