"""Rules of objects and of mappings.

Nothing here imports what is large: a value can only be of a class that is loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ._rules import Rule, Unfit, text
from ._shown import shown

__all__ = ["frames", "instance", "keywords", "slides", "texts_by_name"]

_NAMES_SHOWN = 5


def _loaded(name: str) -> type | None:
    """A class, if it was imported: nothing can be an instance of it otherwise."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) else None


def instance(name: str, what: str) -> Rule:
    """An object of a class, named by its module and name; the class is not imported for it."""

    def read(value: Any) -> Any:
        kind = _loaded(name)
        if kind is None or not isinstance(value, kind):
            raise Unfit
        return value

    return Rule(what, read)


def slides(one: Rule) -> Rule:
    """A slide, or several by name."""

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return one.read(value)
        if not value:
            raise Unfit("there is none in it")
        name = text()
        for key, slide in value.items():
            name.read(key)
            try:
                one.read(slide)
            except Unfit as error:
                raise Unfit(f"{shown(key)} is a {type(slide).__name__}") from error
        return {str(key): slide for key, slide in value.items()}

    return Rule(f"{one.needed}, or several by name, {{name: sdata}}", read)


def texts_by_name(what: str) -> Rule:
    """A mapping from text to text."""
    word = text()

    def read(value: Any) -> dict[str, str]:
        if not isinstance(value, Mapping) or not value:
            raise Unfit
        return {word.read(key): word.read(item) for key, item in value.items()}

    return Rule(what, read)


def keywords(*known: str) -> Rule:
    """Keyword arguments of another call, by name."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Unfit
        unknown = [key for key in value if key not in known]
        if unknown:
            raise Unfit(f"{shown(unknown[0])} is none")
        return dict(value)

    return Rule(f"a dictionary with some of {', '.join(map(repr, known))}", read)


def frames(column: str, what: str) -> Rule:
    """A data frame with a column of numbers, or several by name."""

    def fits(value: Any) -> bool:
        kind = _loaded("pandas.DataFrame")
        if kind is None or not isinstance(value, kind) or column not in getattr(value, "columns", ()):
            return False
        return getattr(value[column].dtype, "kind", "O") in "fiu"  # type: ignore[index]

    def read(value: Any) -> Any:
        if fits(value):
            return value
        if not isinstance(value, Mapping) or not value:
            raise Unfit("an empty mapping was given" if isinstance(value, Mapping) else "")
        wrong = [key for key, frame in value.items() if not fits(frame)]
        if wrong:
            raise Unfit(f"not so: {', '.join(map(shown, wrong[:_NAMES_SHOWN]))}")
        return {str(key): frame for key, frame in value.items()}

    return Rule(what, read)
