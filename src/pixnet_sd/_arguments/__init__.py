"""Type and range of every argument of every public verb, checked before a verb does anything.

What comes in is what its rule reads, or an error that names the argument.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from pixnet_sd.errors import PixNetError

from ._rules import Rule, Unfit, optional, shown
from ._table import rule_of

__all__ = ["check_fields", "checked"]

P = ParamSpec("P")
R = TypeVar("R")


def checked(
    error: type[PixNetError] = PixNetError, *, options_of: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a verb by the table, before it runs.

    Only what a call gives is checked, and handed on as the rule reads it: a NumPy scalar as a number of Python's, an
    index of genes as a list. Signature and docstring stay those of the verb.

    Parameters
    ----------
    error
        What is raised for arguments whose rule names nothing else.
    options_of
        What the verb passes its further keyword arguments to. It says itself which ones it does not know.

    Raises
    ------
    TypeError
        An argument has no rule.
    """

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(verb), verb.__name__
        rules = _rules(name, _named(signature))
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        passed_on = {} if options_of is None else _named(inspect.signature(options_of))
        further = _rules(name, {key: text for key, text in passed_on.items() if rule_of(name, key)})

        @functools.wraps(verb)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # Python says better what is missing or unknown
                return verb(*args, **kwargs)
            given = bound.arguments
            if rest in given:
                given[rest] = _read_all(further, given[rest], error)
            given |= _read_all(rules, given, error)
            return verb(*bound.args, **bound.kwargs)

        return door

    return decorate


def check_fields(group: Any) -> dict[str, Any]:
    """Read the fields of a dataclass by the table, as :func:`checked` reads arguments."""
    rules = _rules(type(group).__name__, {f.name: str(f.type) for f in dataclasses.fields(group)})
    return _read_all(rules, {name: getattr(group, name) for name in rules}, PixNetError)


def _named(signature: inspect.Signature) -> dict[str, str]:
    """Annotations of the parameters that have a name, ``None`` added where it is the default."""
    every = [p for p in signature.parameters.values() if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]
    return {p.name: f"{p.annotation} {p.default if p.default is None else ''}" for p in every}


def _rules(owner: str, annotations: Mapping[str, str]) -> dict[str, Rule]:
    rules = {}
    for name, annotation in annotations.items():
        rule = rule_of(owner, name)
        if rule is None:
            raise TypeError(f"{owner}: the argument {name!r} has no rule in pixnet_sd._arguments.")
        rules[name] = optional(rule) if re.search(r"\bNone\b", annotation) else rule
    return rules


def _read_all(rules: Mapping[str, Rule], given: Mapping[str, Any], error: type[PixNetError]) -> dict[str, Any]:
    return {name: _read(rules[name], name, value, error) if name in rules else value for name, value in given.items()}


def _read(rule: Rule, name: str, value: Any, error: type[PixNetError]) -> Any:
    try:
        return rule.read(value)
    except Unfit as unfit:
        why = f" ({unfit})" if str(unfit) else ""
        message = f"{name}={shown(value)}: give {rule.needed}{why}."
        raise (rule.error or error)(message, argument=name) from None
