"""Any value on a few characters of a message, however large or odd it is."""

from __future__ import annotations

import numbers
import os
import reprlib
from typing import Any

__all__ = ["shown"]

_WIDTH = 60


class _Short(reprlib.Repr):
    """Cuts what is long, and names what it does not know by its type: a slide's own text takes long and many lines."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 4
        self.maxlevel, self.maxstring, self.maxlong = 2, _WIDTH, _WIDTH

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to spell out numbers of thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<a number of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, os.PathLike):
            return self.repr_str(str(x), level)
        if isinstance(x, str | bytes):
            return self.repr1(str(x) if isinstance(x, str) else bytes(x), level)
        is_plain = x is None or isinstance(x, bool | numbers.Real)
        text = str(x) if is_plain else ""
        return text if 0 < len(text) <= _WIDTH else f"<{type(x).__name__}>"

    def repr_bytes(self, x: bytes, level: int) -> str:  # noqa: ARG002 - as the others
        return repr(x[:_WIDTH])


_SHORT = _Short()


def shown(value: Any) -> str:
    """The value as Python spells it, cut where it is long."""
    return _SHORT.repr(value)
