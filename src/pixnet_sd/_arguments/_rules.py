"""Any value on a few characters of a message, however large or odd it is.

What an argument may be: a rule says it in words, and reads a value as what the code behind the door works with.

NumPy's scalars become Python's, any list of names a list of ``str``.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixnet_sd.errors import PixNetError

__all__ = [
    "LONGEST_NAME",
    "Rule",
    "Unfit",
    "check_text",
    "choice",
    "each",
    "either",
    "element_name",
    "flag",
    "names",
    "number",
    "optional",
    "raising",
    "shown",
    "text",
    "whole",
]

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


LONGEST_NAME = 255
_LONGEST_PREFIX = 100


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
        check_text(found, LONGEST_NAME)
        if not (found or empty):
            raise Unfit("it is empty")
        return found

    return Rule(f"{what} as text", read)


def check_text(found: str, longest: int) -> None:
    """Refuse what no file can be called, nor any store hold."""
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
        check_text(found, _LONGEST_PREFIX)
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
