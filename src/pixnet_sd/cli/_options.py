"""Options of a subcommand, made from the parameters of its verb."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from ._verbs import REQUIRED, Parameter, Verb, read_verb

__all__ = ["add_options", "flag_of"]

_ELSEWHERE = re.compile(r"As in (\w+)\.$")
_VERBS = {"fit": "tl._fit", "predict": "tl._predict"}


def flag_of(name: str) -> str:
    """Option of a parameter."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, verb: Verb, *, without: Iterable[str] = ()) -> list[str]:
    """Give a parser an option for each parameter of a verb.

    Parameters
    ----------
    parser
        The parser.
    verb
        The verb.
    without
        Parameters that get none.

    Returns
    -------
    Names of the parameters that got one.
    """
    names = [name for name in verb.parameters if name not in set(without)]
    for name in names:
        _add(parser, verb.parameters[name])
    return names


def _add(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    flag, text = flag_of(parameter.name), _help(parameter)
    if parameter.kind.flag:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=parameter.default, help=text)
    else:
        required = parameter.default is REQUIRED
        parser.add_argument(
            flag,
            type=parameter.kind.read,
            default=None if required else parameter.default,
            required=required,
            metavar=parameter.kind.metavar(none=parameter.default is not None),
            help=text,
        )


def _help(parameter: Parameter) -> str:
    """Text of the docstring, and the default unless it is None, which the text explains."""
    text = parameter.help
    match = _ELSEWHERE.match(text)
    if match and match[1] in _VERBS:
        text = read_verb(_VERBS[match[1]], match[1]).parameters[parameter.name].help
    if parameter.default is not REQUIRED and parameter.default is not None:
        default = parameter.default
        shown = ("yes" if default else "no") if isinstance(default, bool) else parameter.kind.show(default)
        text += f" [{shown}]"
    return text.replace("%", "%%")
