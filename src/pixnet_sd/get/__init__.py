"""Predictions as images, lazily."""

from __future__ import annotations

from ._gene_map import gene_map

__all__ = ["gene_map"]
