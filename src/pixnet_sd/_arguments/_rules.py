"""Rules: what an argument takes, in words, and how a value is read as what the code behind the door works with.

NumPy's scalars become Python's, any list of names a list of ``str``. Nothing large is imported: a value can only be of
a class that is loaded already.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixnet_sd._util import shown
from pixnet_sd.errors import PixNetError

_LONGEST_NAME, _LONGEST_PREFIX, _LONGEST_PATH = 255, 100, 4096  # bytes


class Unfit(Exception):
    """A value that an argument does not take; with a text, why, where that is not plain from what is needed."""


def _require(holds: Any, why: str = "") -> None:
    if not holds:
        raise Unfit(why)


@dataclass(frozen=True)
class Rule:
    """What an argument takes."""

    needed: str  # in words
    read: Callable[[Any], Any]  # from a value to what the verb gets, or `Unfit`
    error: type[PixNetError] | None = None  # None: what the verb raises


def raising(error: type[PixNetError], rule: Rule) -> Rule:
    """Give a rule an error of its own."""
    return replace(rule, error=error)


def optional(rule: Rule) -> Rule:
    """Let a rule take None as well."""
    return replace(rule, needed=f"{rule.needed}, or None", read=lambda v: None if v is None else rule.read(v))


def where(rule: Rule, holds: Callable[[Any], Any], why: str = "", *, needed: str = "") -> Rule:
    """Take only those values of a rule for which something holds."""

    def read(value: Any) -> Any:
        plain = rule.read(value)
        _require(holds(plain), why)
        return plain

    return replace(rule, read=read, needed=needed or rule.needed)


def either(*rules: Rule, needed: str = "") -> Rule:
    """Read a value by the first rule that it fits; where it fits none, the last one says why."""

    def read(value: Any) -> Any:
        for rule in rules[:-1]:
            with suppress(Unfit):
                return rule.read(value)
        return rules[-1].read(value)

    return Rule(needed or " or ".join(rule.needed for rule in rules), read)


def flag() -> Rule:
    """Take True or False, not 1 or 0."""

    def read(value: Any) -> bool:
        is_numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
        _require(isinstance(value, bool) or is_numpys)
        return bool(value)

    return Rule("True or False", read)


def number(needed: str = "", within: Callable[[float], bool] = math.isfinite) -> Rule:
    """Take a finite number in a range; no bool, no text."""

    def read(value: Any) -> float:
        _require(isinstance(value, numbers.Real) and not isinstance(value, bool))
        try:
            plain = float(value)
        except (OverflowError, ValueError) as error:
            raise Unfit from error
        _require(math.isfinite(plain) and within(plain))
        return plain

    return Rule(needed, read)


def whole(low: int, high: int, *, multiple: int = 1) -> Rule:
    """Take a whole number in a range; no bool, and no 64.0, which is how lengths are given."""

    def read(value: Any) -> int:
        _require(isinstance(value, numbers.Integral) and not isinstance(value, bool))
        plain = operator.index(value)
        _require(low <= plain <= high)
        _require(plain % multiple == 0, f"such as {max(round(plain / multiple) * multiple, low)}")
        return plain

    kind = "a whole number" if multiple == 1 else f"a whole number, a multiple of {multiple}"
    return Rule(f"{kind} from {low:,} to {high:,.10g}", read)


def choice(*values: Any) -> Rule:
    """Take one of some texts or whole numbers; 1.0 and True are not 1."""

    def read(value: Any) -> Any:
        for known in values:
            is_same = isinstance(value, str if isinstance(known, str) else numbers.Integral) and value == known
            if is_same and not isinstance(value, bool):
                return known
        raise Unfit

    *first, last = map(repr, values)
    return Rule(f"{', '.join(first)} or {last}" if first else last, read)


def text(what: str = "a name", *, empty: bool = True, longest: int = _LONGEST_NAME) -> Rule:
    """Take a text that a file can be called and a store can hold."""

    def read(value: Any) -> str:
        _require(isinstance(value, str))
        try:
            n_bytes = len(value.encode())
        except UnicodeEncodeError as error:
            raise Unfit("it has characters that cannot be written") from error
        _require("\0" not in value, "it has a NUL character")
        _require(n_bytes <= longest, f"it has {n_bytes} bytes, and {longest} is the most")
        _require(value or empty, "it is empty")
        return str(value)

    return Rule(f"{what} as text", read)


def element_name(what: str, *, empty: bool = False) -> Rule:
    """Take the first part of names of elements or files, by SpatialData's own rule."""
    # what starts with a dot is written, and never found again: readers take it for a hidden file
    pattern = re.compile(r"(?!__|\.)[\w.-]*")
    needed = f"{what}: letters, digits, '_', '-' and '.', not starting with '__' or '.'"
    return where(text(empty=empty, longest=_LONGEST_PREFIX), pattern.fullmatch, needed=needed)


def each(rule: Rule, what: str, *, n: int | None = None) -> Rule:
    """Take `n`, or one or more values of a rule, in an order that can be read again: no set, mapping or iterator."""

    def read(value: Any) -> tuple[Any, ...]:
        is_array = hasattr(value, "__array__") and getattr(value, "ndim", None) == 1  # or an index, or a series
        is_text = isinstance(value, str | bytes | bytearray | memoryview)
        _require(not is_text and (is_array or isinstance(value, Sequence)))
        items = tuple(rule.read(item) for item in value)
        _require(len(items) == n if n is not None else items, f"{len(items)} were given")
        return items

    return Rule(what, read)


def names(what: str, *, one: bool = True) -> Rule:
    """Take a list of names, and with `one` a single one, as it is."""
    name = text()
    several = each(name, "")

    def read(value: Any) -> str | list[str]:
        return name.read(value) if one and isinstance(value, str) else list(several.read(value))

    return Rule(f"{what} as text, one or a list of them" if one else f"a list of {what} as text", read)


def mapping(
    what: str, *, item: Rule | None = None, known: Collection[str] = (), keys: type = str, empty: bool = True
) -> Rule:
    """Take a mapping from names, or some of those that are known, to anything or what a rule takes."""
    name = text()

    def read(value: Any) -> dict[str, Any]:
        _require(isinstance(value, Mapping))
        _require(value or empty, "there is none in it")
        plain = {}
        for key, entry in value.items():
            _require(key in known if known else isinstance(key, keys), f"{shown(key)} is none")
            try:
                plain[name.read(str(key))] = item.read(entry) if item else entry
            except Unfit as error:
                raise Unfit(f"{shown(key)} is {shown(entry)}") from error
        return plain

    return Rule(what, read)


def path(what: str) -> Rule:
    """Take text or a path object that can name a file."""
    whole_path, part = text(empty=False, longest=_LONGEST_PATH), text()

    def read(value: Any) -> str | Path:
        given = whole_path.read(os.fspath(value) if isinstance(value, os.PathLike) else value)
        for name in Path(given).parts:
            part.read(name)
        try:
            Path(given).expanduser()
        except RuntimeError as error:
            raise Unfit("there is no such user") from error
        return str(value) if isinstance(value, str) else Path(value)

    return Rule(what, read)


def folder(what: str) -> Rule:
    """Take a folder that is there."""
    return where(path(what), lambda given: Path(given).expanduser().is_dir(), "there is no such folder")


def hub_name(what: str) -> Rule:
    """Take a name on the hub, or a folder: what is there, and what could not be a name, has to be one."""

    def holds(given: str | Path) -> bool:
        is_local = str(given).startswith(("~", "/", "./", "../")) or Path(given).exists()
        return not is_local or Path(given).expanduser().is_dir()

    return where(path(what), holds, "there is no such folder")


def new_folder(what: str) -> Rule:
    """Take a folder that is there or can be made."""

    def holds(given: str | Path) -> bool:
        place = Path(given).expanduser()
        above = next((p for p in (place, *place.parents) if p.exists() or p.is_symlink()), None)
        return above is None or above.is_dir()

    return where(path(what), holds, "a file is in its way")


def figure_file() -> Rule:
    """Take a file in a folder that is there, of a kind that matplotlib writes."""

    def holds(given: str | Path) -> bool:
        from matplotlib.backend_bases import FigureCanvasBase

        place, known = Path(given), FigureCanvasBase.get_supported_filetypes()
        is_known = not place.suffix or place.suffix[1:].lower() in known
        _require(is_known, f"it ends in {place.suffix!r}, and {', '.join(known)} can be written")
        return place.parent.is_dir() and not place.is_dir()

    return where(path("a file for the figure"), holds, "it is a folder, or in none")


def instance(name: str, what: str) -> Rule:
    """Take an object of a class, named by its module and name; nothing can be one before the class is imported."""
    module, _, attribute = name.rpartition(".")

    def read(value: Any) -> Any:
        loaded = getattr(sys.modules.get(module), attribute, None)
        _require(isinstance(loaded, type) and isinstance(value, loaded))
        return value

    return Rule(what, read)


def axes() -> Rule:
    """Take Axes to draw on, one or several in any arrangement."""
    one = instance("matplotlib.axes.Axes", "")

    def read(value: Any) -> Any:
        import numpy as np

        if hasattr(value, "get_figure"):
            return one.read(value)
        _require(isinstance(value, list | tuple | np.ndarray) and np.size(value) > 0)
        for ax in np.asarray(value, dtype=object).ravel():
            one.read(ax)
        return value

    return Rule("Axes of matplotlib, or a list of them", read)


def colour_limit() -> Rule:
    """Take a number, a percentile such as ``"p99"``, or one for each gene."""

    def is_percentile(given: str) -> bool:
        with suppress(ValueError):
            return given.startswith("p") and 0 <= float(given[1:]) <= 100
        return False

    one = optional(either(number(), where(text(), is_percentile)))
    return either(one, each(one, ""), needed="a number, a percentile from 'p0' to 'p100', or one for each gene")


def colour_map() -> Rule:
    """Take a colour map or the name of one."""

    def is_known(name: str) -> bool:
        import matplotlib as mpl

        return name in mpl.colormaps

    known = where(text("its name"), is_known, "there is none")
    return either(instance("matplotlib.colors.Colormap", "a colour map of matplotlib"), known)
