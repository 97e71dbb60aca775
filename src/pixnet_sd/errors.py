"""Errors that a user can mend: each says what was found and what to do."""

from __future__ import annotations

import re

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "ElementError",
    "PixNetError",
    "ResolutionError",
    "StoreError",
]


class PixNetError(ValueError):
    """Base of every error that pixnet_sd raises on purpose.

    Attributes
    ----------
    argument
        Name of the argument whose value is to blame: the one that is given, or with which the message begins, as in
        ``radius_um=9000: ...``. None where it is not one argument's.
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        begins_with = re.match(r"(\w+)=", str(message))
        self.argument = begins_with[1] if argument is None and begins_with else argument


class ElementError(PixNetError):
    """No element, several elements, or the wrong kind of element where one was needed."""


class ResolutionError(PixNetError):
    """Micrometres per pixel unknown or absurd, or a transformation that cannot be used."""


class DataError(PixNetError):
    """Counts, genes or pixels that cannot be used as they are."""


class DivergenceError(PixNetError):
    """A training that left any sane range: nothing of it is worth keeping."""


class CheckpointError(PixNetError):
    """Weights or a checkpoint that are missing, truncated or of another kind."""


class StoreError(PixNetError):
    """A store that cannot be read or written: files away, name taken, read-only, too little disk."""
