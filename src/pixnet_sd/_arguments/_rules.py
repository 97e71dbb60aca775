"""What an argument may be: a rule says it in words, and reads a value as what the code behind the door works with.

NumPy's scalars become Python's, any list of names a list of ``str``. Nothing here imports what is large: a value can
only be of a class that is loaded already.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixnet_sd._errors import PixNetError

from ._shown import shown

__all__ = [
    "Rule",
    "Unfit",
    "choice",
    "each",
    "either",
    "element_name",
    "flag",
    "folder",
    "frames",
    "hub_name",
    "instance",
    "keywords",
    "loaded",
    "names",
    "number",
    "optional",
    "path",
    "raising",
    "slides",
    "text",
    "texts_by_name",
    "whole",
]

_LONGEST_NAME = 255
_LONGEST_PREFIX = 100
_LONGEST_PATH = 4096
_NAMES_SHOWN = 5


class Unfit(Exception):
    """A value that an argument does not take; with a text, why, where that is not plain from what is needed."""


@dataclass(frozen=True)
class Rule:
    """What an argument takes.

    Attributes
    ----------
    needed
        In words, after "give".
    read
        From a value to what the verb gets; raises `Unfit`.
    error
        What is raised; None: what the verb raises.
    takes_none
        Whether None is taken.
    """

    needed: str
    read: Callable[[Any], Any]
    error: type[PixNetError] | None = None
    takes_none: bool = False


def raising(error: type[PixNetError], rule: Rule) -> Rule:
    """The same rule with an error of its own."""
    return replace(rule, error=error)


def optional(rule: Rule) -> Rule:
    """The same rule, or None."""
    if rule.takes_none:
        return rule
    read = rule.read
    return replace(
        rule,
        needed=f"{rule.needed}, or None",
        read=lambda value: None if value is None else read(value),
        takes_none=True,
    )


def either(*rules: Rule) -> Rule:
    """The first rule that the value fits; where it fits none, the last one says why."""

    def read(value: Any) -> Any:
        for rule in rules[:-1]:
            try:
                return rule.read(value)
            except Unfit:
                continue
        return rules[-1].read(value)

    return Rule(" or ".join(rule.needed for rule in rules), read)


def flag() -> Rule:
    """True or False, not 1 or 0."""

    def read(value: Any) -> bool:
        if isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")):
            return bool(value)
        raise Unfit

    return Rule("True or False", read)


def number(
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> Rule:
    """A finite number; no bool, no text. Limits are part of the range but for `above` and `below`."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Unfit
        try:
            found = float(value)
        except (OverflowError, ValueError) as error:
            raise Unfit from error
        inside = (
            math.isfinite(found)
            and (low is None or found >= low)
            and (high is None or found <= high)
            and (above is None or found > above)
            and (below is None or found < below)
        )
        if not inside:
            raise Unfit
        return found

    return Rule(_range("number", unit, low, high, above, below), read)


def _range(
    what: str, unit: str, low: float | None, high: float | None, above: float | None = None, below: float | None = None
) -> str:
    of = f" of {unit}" if unit else ""
    if (above, low, high, below) == (0, None, None, None):
        return f"a positive {what}{of}"
    if above is not None and below is not None:
        return f"a {what}{of} between {above:g} and {below:g}"
    if low is None and above is None:
        return f"a finite {what}{of}"
    start = f" above {above:,.10g}" if above is not None else f" from {low:,.10g}"
    joint = ", at most" if above is not None else " to"
    stop = f"{joint} {high:,.10g}" if high is not None else "" if above is not None else " on"
    return f"a {what}{of}{start}{stop}"


def whole(low: int, high: int | None = None, *, multiple: int = 1) -> Rule:
    """A whole number; no bool, and no 64.0, which is how lengths are given."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise Unfit
        found = operator.index(value)
        if found < low or (high is not None and found > high):
            raise Unfit
        if found % multiple:
            raise Unfit(f"such as {max(round(found / multiple) * multiple, low)}")
        return found

    if multiple == 1:
        return Rule(_range("whole number", "", low, high), read)
    return Rule(f"a whole number, a multiple of {multiple}{_range('', '', low, high)[2:]}", read)


def choice(*values: Any) -> Rule:
    """One of some texts or numbers."""

    def read(value: Any) -> Any:
        plain = _plain(value)
        for known in values:
            if type(plain) is type(known) and plain == known:
                return known
        raise Unfit

    *first, last = map(repr, values)
    return Rule(f"{', '.join(first)} or {last}" if first else last, read)


def _plain(value: Any) -> Any:
    """NumPy's scalars and subclasses of text as Python's own."""
    if isinstance(value, str):
        return str(value)
    return value if isinstance(value, bool) or not isinstance(value, numbers.Integral) else operator.index(value)


def text(what: str = "a name", *, empty: bool = True) -> Rule:
    """A text that can be a name: of bounded length, and one that can be written."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise Unfit
        found = str(value)
        _check_text(found, _LONGEST_NAME)
        if not (found or empty):
            raise Unfit("it is empty")
        return found

    return Rule(f"{what} as text", read)


def _check_text(found: str, longest: int) -> None:
    try:
        n_bytes = len(found.encode())
    except UnicodeEncodeError as error:
        raise Unfit("it has characters that cannot be written") from error
    if "\0" in found:
        raise Unfit("it has a NUL character")
    if n_bytes > longest:
        raise Unfit(f"it has {n_bytes} bytes, and {longest} is the most")


def element_name(what: str, *, empty: bool = False) -> Rule:
    """First part of names of elements or files, by SpatialData's own rule."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise Unfit
        found = str(value)
        _check_text(found, _LONGEST_PREFIX)
        if not found and not empty:
            raise Unfit("it is empty")
        # what starts with a dot is written, and never found again: readers take it for a hidden file
        if found.startswith(("__", ".")) or not all(c.isalnum() or c in "_-." for c in found):
            raise Unfit
        return found

    return Rule(f"{what}: letters, digits, '_', '-' and '.', not starting with '__' or '.'", read)


def names(what: str, *, one: bool = True, empty: bool = False) -> Rule:
    """Names in an order: a list, a tuple, an array or an index of text; with `one` also a single text, as it is.

    Sets have no order, mappings have values, and what can be read only once would be empty the second time.
    """
    item = text()

    def read(value: Any) -> str | list[str]:
        if isinstance(value, str) and one:
            return str(item.read(value))
        found = _listed(value)
        wrong = [each for each in found if not isinstance(each, str)]
        if wrong:
            raise Unfit(f"{shown(wrong[0])} is no text")
        if not (found or empty):
            raise Unfit("it is empty")
        return [str(item.read(each)) for each in found]

    return Rule(f"{what} as text, one or a list of them" if one else f"a list of {what} as text", read)


def _listed(value: Any) -> list[Any]:
    """Items of anything that has an order and can be read again."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        raise Unfit
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "__array__") and getattr(value, "ndim", None) == 1:  # arrays, an index, a series
        return list(value)
    raise Unfit


def each(rule: Rule, what: str, *, n: int | None = None, one: bool = False, ordered: bool = False) -> Rule:
    """Several values of one rule.

    Parameters
    ----------
    rule
        Of each.
    what
        In words.
    n
        How many; None: one or more.
    one
        Take a single value too, as it is.
    ordered
        Of a box x0, y0, x1, y1: the first two are smaller.
    """

    def read(value: Any) -> Any:
        if one:
            try:
                return rule.read(value)
            except Unfit:
                pass
        found = [rule.read(item) for item in _listed(value)]
        if len(found) != n if n is not None else not found:
            raise Unfit(f"{len(found)} were given")
        if ordered and not (found[0] < found[2] and found[1] < found[3]):
            raise Unfit
        return tuple(found)

    return Rule(what, read)


def path(what: str = "a path", *, exists: bool = False) -> Rule:
    """Text or a path object that can name a file; not looked for unless it has to be a folder that `exists`."""

    def read(value: Any) -> str | Path:
        if not isinstance(value, str | Path) and not (
            isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
        ):
            raise Unfit
        found = os.fspath(value)
        _check_path(found)
        if exists and not Path(found).expanduser().is_dir():
            raise Unfit("it is a file" if Path(found).expanduser().exists() else "there is no such folder")
        return str(value) if isinstance(value, str) else Path(value)

    return Rule(what, read)


def hub_name(what: str) -> Rule:
    """A name on the hub, or a folder: what is there, and what could not be a name, has to be one."""
    anywhere, here = path(what), path(what, exists=True)

    def read(value: Any) -> str | Path:
        found = anywhere.read(value)
        is_local = str(found).startswith(("~", "/", "./", "../")) or Path(found).exists()
        return here.read(found) if is_local else found

    return Rule(what, read)


def _check_path(found: str) -> None:
    if not found:
        raise Unfit("it is empty")
    _check_text(found, _LONGEST_PATH)
    for part in Path(found).parts:
        _check_text(part, _LONGEST_NAME)
    try:
        Path(found).expanduser()
    except RuntimeError as error:
        raise Unfit("there is no such user") from error


def folder(what: str, error: type[PixNetError]) -> Rule:
    """A folder that is there or can be made."""
    where = path(what)

    def read(value: Any) -> str | Path:
        found = where.read(value)
        place = Path(found).expanduser()
        for above in (place, *place.parents):
            if above.is_dir():
                break
            if above.exists() or above.is_symlink():
                raise Unfit(f"{shown(above)} is no folder")
        return found

    return Rule(what, read, error)


def loaded(name: str) -> type | None:
    """A class, if it was imported: nothing can be an instance of it otherwise."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) else None


def instance(name: str, what: str) -> Rule:
    """An object of a class, named by its module and name; the class is not imported for it."""

    def read(value: Any) -> Any:
        kind = loaded(name)
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
        kind = loaded("pandas.DataFrame")
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
