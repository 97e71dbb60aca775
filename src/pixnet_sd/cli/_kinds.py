"""From a parameter's annotation to what its option takes on the command line, and back to a value."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Kind"]

_NUMBERS: dict[str, tuple[Callable[[str], Any], str]] = {"int": (int, "N"), "float": (float, "NUMBER")}
_TEXTS = ("str", "Path")


@dataclass(frozen=True)
class Kind:
    """What an option takes; every text that fits one of the alternatives is read as the first that it fits.

    Attributes
    ----------
    none
        The word ``none``.
    numbers
        ``"int"``, ``"float"``.
    literals
        Values by their texts.
    items
        What a list with commas (or ``@file``, one a line) holds: ``"str"``, ``"int"``, ``"float"``; empty: no list.
    text
        Any text.
    mapping
        ``KEY=VALUE,KEY=VALUE``.
    flag
        A switch.
    """

    none: bool = False
    numbers: tuple[str, ...] = ()
    literals: tuple[Any, ...] = ()
    items: str = ""
    text: bool = False
    mapping: bool = False
    flag: bool = False

    @classmethod
    def of(cls, annotation: ast.expr, aliases: Callable[[str], ast.expr | None]) -> Kind:
        """Kind of an annotation.

        Parameters
        ----------
        annotation
            As in the source.
        aliases
            What a name that is none of Python's stands for; None: a class, which no text can be.
        """
        found: dict[str, Any] = {}
        for part in _alternatives(annotation, aliases):
            _add(found, part)
        return cls(**found)

    def metavar(self, *, none: bool = True) -> str:
        """How the value is called in the help, with the word ``none`` where it is meant."""
        names = [str(value) for value in self.literals]
        names += [_NUMBERS[name][1] for name in self.numbers]
        if self.mapping:
            names.append("NAME=VALUE[,...]")
        if self.items:
            unit = _NUMBERS[self.items][1] if self.items in _NUMBERS else "NAME"
            names = [*(name for name in names if name != unit), f"{unit}[,{unit}...]"]
        elif self.text:
            names.append("TEXT")
        return "|".join([*names, "none"] if self.none and none else names)

    def read(self, text: str) -> Any:
        """Value of a text.

        Raises
        ------
        argparse.ArgumentTypeError
            It is none.
        """
        if self.none and text.lower() == "none":
            return None
        literal = {str(value): value for value in self.literals}
        if text in literal:
            return literal[text]
        for name in self.numbers:
            try:
                return _NUMBERS[name][0](text)
            except ValueError:
                continue
        return self._read_more(text, [*literal])

    def _read_more(self, text: str, literals: list[str]) -> Any:
        if self.mapping:
            return dict(_pair(item) for item in _items(text))
        if self.text and not (self.items and ("," in text or text.startswith("@"))):
            return text
        if self.items:
            return [_number(item, self.items) for item in _items(text)]
        near = difflib.get_close_matches(text, literals, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {self.metavar()}{hint}")

    def show(self, value: Any) -> str:
        """Text of a value, as `read` takes it."""
        if value is None:
            return "none"
        if isinstance(value, dict):
            return ",".join(f"{key}={item}" for key, item in value.items())
        if isinstance(value, list | tuple):
            return ",".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)


def _alternatives(annotation: ast.expr, aliases: Callable[[str], ast.expr | None]) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return [*_alternatives(annotation.left, aliases), *_alternatives(annotation.right, aliases)]
    if isinstance(annotation, ast.Name) and annotation.id not in {*_NUMBERS, *_TEXTS, "bool"}:
        meant = aliases(annotation.id)
        return [] if meant is None else _alternatives(meant, aliases)
    return [annotation]


def _add(found: dict[str, Any], part: ast.expr) -> None:
    """Take one alternative in; those that no text can be, such as classes, are left out."""
    match part:
        case ast.Constant(value=None):
            found["none"] = True
        case ast.Name(id="bool"):
            found["flag"] = True
        case ast.Name(id=name) if name in _NUMBERS:
            found["numbers"] = (*found.get("numbers", ()), name)
        case ast.Name(id=name) if name in _TEXTS:
            found["text"] = True
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            elements = values.elts if isinstance(values, ast.Tuple) else [values]
            found["literals"] = (*found.get("literals", ()), *(ast.literal_eval(value) for value in elements))
        case ast.Subscript(value=ast.Name(id="Sequence"), slice=ast.Name(id=name)):
            found["items"] = name
        case ast.Subscript(value=ast.Name(id="Mapping")):
            found["mapping"] = True


def _items(text: str) -> list[str]:
    """Parts of a list; ``@file`` has one a line, or commas."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"the file {text[1:]!r} cannot be read ({error})") from error
    found = [item.strip() for item in text.replace("\n", ",").split(",")]
    found = [item for item in found if item]
    if not found:
        raise argparse.ArgumentTypeError("the list is empty")
    return found


def _pair(item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not (key and separator and value):
        raise argparse.ArgumentTypeError(f"{item!r} is not NAME=VALUE")
    return key.strip(), value.strip()


def _number(item: str, name: str) -> Any:
    if name not in _NUMBERS:
        return item
    convert, metavar = _NUMBERS[name]
    try:
        return convert(item)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{item!r} is not {metavar}") from None
