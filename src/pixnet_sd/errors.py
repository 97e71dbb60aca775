"""Errors that a user can mend, to be caught by name: all are a :class:`PixNetError`, which is a :class:`ValueError`."""

from __future__ import annotations

from ._errors import (
    CheckpointError,
    DataError,
    DivergenceError,
    ElementError,
    PixNetError,
    ResolutionError,
    StoreError,
)

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "ElementError",
    "PixNetError",
    "ResolutionError",
    "StoreError",
]
