"""Predictions as images, lazily."""

from __future__ import annotations

from ._gene_map import gene_map, stored_key

__all__ = ["gene_map", "stored_key"]
