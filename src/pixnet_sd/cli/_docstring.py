"""What a numpy docstring says of a function and of its parameters, as plain text."""

from __future__ import annotations

import inspect
import re

__all__ = ["parameters", "plain", "summary"]

_SECTION = re.compile(r"^(?P<name>[A-Z][A-Za-z ]*)\n-+\n", re.MULTILINE)
_ROLE = re.compile(r":(?:py:)?\w+:`~?(?:[\w.]*\.)?(\w+)`")
_QUOTED = re.compile(r"(`{1,2})(.+?)\1")


def plain(text: str) -> str:
    """Text without reStructuredText's marks, on one line."""
    return " ".join(_QUOTED.sub(r"\2", _ROLE.sub(r"\1", text)).split())


def summary(docstring: str) -> str:
    """The first sentence."""
    return plain(inspect.cleandoc(docstring).partition("\n\n")[0])


def parameters(docstring: str) -> dict[str, str]:
    """Text of each parameter; of those that are described together, the same."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", _section(inspect.cleandoc(docstring), "Parameters")):
        head, _, body = entry.partition("\n")
        found |= {name.strip(): plain(body) for name in head.split(",")}
    return found


def _section(text: str, wanted: str) -> str:
    starts = [*_SECTION.finditer(text)]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return next((text[m.end() : end] for m, end in zip(starts, ends, strict=True) if m["name"] == wanted), "").strip()
