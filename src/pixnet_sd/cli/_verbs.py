"""The verbs' parameters, read from their source: asking the functions themselves would load torch for a ``--help``."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pixnet_sd.cli import _docstring

from ._kinds import Kind

__all__ = ["REQUIRED", "Parameter", "Verb", "read_verb"]

_PACKAGE = Path(__file__).parents[1]

REQUIRED: Any = object()
"""Default of a parameter that has none."""


@dataclass(frozen=True)
class Parameter:
    """A keyword argument of a verb.

    Attributes
    ----------
    name
        As in Python.
    kind
        What it takes.
    default
        Its default, or `REQUIRED`.
    help
        From the docstring.
    """

    name: str
    kind: Kind
    default: Any
    help: str


@dataclass(frozen=True)
class Verb:
    """A function that users call.

    Attributes
    ----------
    summary
        First sentence of its docstring.
    parameters
        All but the first, by name, in order.
    """

    summary: str
    parameters: dict[str, Parameter]


@cache
def read_verb(room: str, name: str) -> Verb:
    """Read a verb.

    Parameters
    ----------
    room
        Module of the package with the function, such as ``"tl._fit"``.
    name
        Of the function.
    """
    module = _Module.read(room)
    function = next(node for node in module.tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    docstring = ast.get_docstring(function) or ""
    texts = _docstring.parameters(docstring)
    parameters = {}
    for argument, default in _arguments(function):
        if argument.annotation is not None:
            kind = Kind.of(argument.annotation, module.alias)
            parameters[argument.arg] = Parameter(argument.arg, kind, default, texts.get(argument.arg, ""))
    return Verb(_docstring.summary(docstring), parameters)


def _arguments(function: ast.FunctionDef) -> list[tuple[ast.arg, Any]]:
    """Arguments after the first, with their defaults."""
    positional = function.args.args
    defaults = [None] * (len(positional) - len(function.args.defaults)) + [*function.args.defaults]
    both = [*zip(positional, defaults, strict=True)][1:]
    both += zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return [(argument, REQUIRED if value is None else ast.literal_eval(value)) for argument, value in both]


@dataclass(frozen=True)
class _Module:
    """Source of a module of the package."""

    tree: ast.Module

    @classmethod
    def read(cls, room: str) -> _Module:
        path = _PACKAGE.joinpath(*room.split(".")).with_suffix(".py")
        return cls(ast.parse(path.read_text(encoding="utf-8")))

    def alias(self, name: str) -> ast.expr | None:
        """What a name stands for, if it is one for a ``Literal``, here or in a module that it comes from."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node.value
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                return self._imported(node, name)
        return None

    def _imported(self, node: ast.ImportFrom, name: str) -> ast.expr | None:
        room = (node.module or "").removeprefix("pixnet_sd.")
        if room == node.module or not _PACKAGE.joinpath(*room.split(".")).with_suffix(".py").is_file():
            return None
        return _Module.read(room).alias(name)
