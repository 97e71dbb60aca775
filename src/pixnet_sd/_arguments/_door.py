"""The door of a public verb: what comes in is what its rules read, or an error that names the argument."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pixnet_sd._errors import PixNetError

from ._rules import Rule, Unfit, optional
from ._shown import shown
from ._table import rule_of

__all__ = ["checked"]

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
        signature = inspect.signature(verb)
        rules = {p.name: _rule(verb.__name__, p) for p in _own(signature)}
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        further = {} if options_of is None else _further(verb.__name__, options_of)

        @functools.wraps(verb)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # Python says better what is missing or unknown
                return verb(*args, **kwargs)
            given = bound.arguments
            if rest in given:
                given[rest] = _read_all(further, given[rest], error)
            given |= _read_all(rules, {name: value for name, value in given.items() if name in rules}, error)
            return verb(*bound.args, **bound.kwargs)

        return door

    return decorate


def _own(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Parameters that are named."""
    return [p for p in signature.parameters.values() if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]


def _further(verb: str, passed_to: Callable[..., Any]) -> dict[str, Rule]:
    """Rules of what is passed on; of another package's function those that there are."""
    own = _own(inspect.signature(passed_to))
    return {p.name: _rule(verb, p) for p in own if rule_of(verb, p.name) is not None}


def _rule(verb: str, parameter: inspect.Parameter) -> Rule:
    rule = rule_of(verb, parameter.name)
    if rule is None:
        raise TypeError(f"{verb}: the argument {parameter.name!r} has no rule in pixnet_sd._arguments.")
    takes_none = parameter.default is None or re.search(r"\bNone\b", str(parameter.annotation))
    return optional(rule) if takes_none else rule


def _read_all(rules: dict[str, Rule], given: dict[str, Any], error: type[PixNetError]) -> dict[str, Any]:
    return {k: _read(rules[k], k, value, error) if k in rules else value for k, value in given.items()}


def _read(rule: Rule, name: str, value: Any, error: type[PixNetError]) -> Any:
    try:
        return rule.read(value)
    except Unfit as unfit:
        why = f" ({unfit})" if str(unfit) else ""
        raise (rule.error or error)(f"{name}={shown(value)}: give {rule.needed}{why}.") from None
