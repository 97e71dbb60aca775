"""Measured expression: tables, counts, genes and targets."""

from __future__ import annotations

from ._cache import content_key
from ._counts import Counts, checked_blocks, checked_totals, log_normalise
from ._kind import Genes, genes_of
from ._measured import Measured, counts_of, measured
from ._select import measured_regions, measured_tables, select_tables
from ._targets import StoredTargets, Targets, check_genes, choose_genes, targets_of

__all__ = [
    "Counts",
    "Genes",
    "Measured",
    "StoredTargets",
    "Targets",
    "check_genes",
    "checked_blocks",
    "checked_totals",
    "choose_genes",
    "content_key",
    "counts_of",
    "genes_of",
    "log_normalise",
    "measured",
    "measured_regions",
    "measured_tables",
    "select_tables",
    "targets_of",
]
