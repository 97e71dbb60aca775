"""Warnings that point at the line that called the package, however deep inside they arise."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_OWN = __name__.partition(".")[0]


def warn(message: str) -> None:
    """Warn of the first caller outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _OWN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
