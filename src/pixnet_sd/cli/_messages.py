"""What a verb says, in the terms of the command line."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Collection

from ._options import flag_of
from ._verbs import read_verb

__all__ = ["as_options", "as_options_of_convert"]

_LEFT = r"\w\([^()]*\)|(?<!\w)'[^'\n]*'(?!\w)|(?<!\w)\"[^\"\n]*\"(?!\w)"
"""Calls, which are Python anyway, and what is quoted: names of files, elements and genes."""
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\[\]]*\]|[^\s,;:()`]*[^\s,;:()`.]"
_NONE = r"(?<=\bor )(?P<none>None)\b(?! of)"


def as_options(message: str, names: Collection[str]) -> str:
    """A message in which arguments of a verb are called as on the command line.

    Parameters
    ----------
    message
        As in Python: ``overwrite=True``, ``validation=None``, ``mpp=``, ```key_added```.
    names
        Arguments that are options. A bare name is taken for one if no English word looks like it: it has a ``_``.
    """
    any_name, underscored = "|".join(names), "|".join(name for name in names if "_" in name)
    found = [_LEFT, _NONE]
    if any_name:
        found += [rf"(?<=`)(?P<ticked>{any_name})(?=`)", rf"(?<![\w.])(?P<name>{any_name})=(?P<value>{_VALUE})?"]
    if underscored:
        found.append(rf"(?<![\w./-])(?P<bare>{underscored})(?![\w/-]|\.\w)")
    return re.sub("|".join(found), _translated, message)


def as_options_of_convert(message: str) -> str:
    """What `convert_visium_hd` says, for another command, which has none of its options."""
    said = as_options(message, read_verb("io._convert", "convert_visium_hd").parameters)
    return said if said == message else f"{said} (An option of pixnet-sd convert, which makes a store of the folder.)"


def _translated(found: re.Match[str]) -> str:
    given = {key: text for key, text in found.groupdict().items() if text is not None}
    match given:
        case {"none": _}:
            return "none"
        case {"ticked": name} | {"bare": name}:
            return flag_of(name)
        case {"name": name}:
            return _option(name, given.get("value", ""))
    return found[0]


def _option(name: str, value: str) -> str:
    """``name=value`` as it is typed."""
    if value == "False":
        return flag_of(f"no_{name}")
    if value in ("", "True"):
        return flag_of(name)
    return f"{flag_of(name)} {_typed(value)}"


def _typed(value: str) -> str:
    """A value as a shell takes it: without Python's quotes and brackets."""
    if value == "None":
        return "none"
    try:
        read = ast.literal_eval(value) if value[0] in "'\"[" else value
    except (ValueError, SyntaxError):  # a description: [names of slides]
        return value
    return shlex.quote(",".join(map(str, read)) if isinstance(read, list) else read)
