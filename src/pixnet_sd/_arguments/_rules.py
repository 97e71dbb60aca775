"""Rules: what an argument takes, in words, and how a value is read as what the code behind the door works with.

NumPy's scalars become Python's, any list of names a list of ``str``. Nothing large is imported: a value can only be of
a class that is loaded already.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixnet_sd.errors import PixNetError

_WIDTH = 60
_LONGEST_NAME, _LONGEST_PREFIX, _LONGEST_PATH = 255, 100, 4096


class _Short(reprlib.Repr):
    """Cuts what is long, and names what it does not know by its type: a slide's own text takes long and many lines."""

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to spell out numbers of thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<a number of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, os.PathLike | str):
            return self.repr_str(str(x), level)
        if isinstance(x, bytes):
            return repr(bytes(x[:_WIDTH]))
        spelt = str(x) if x is None or isinstance(x, bool | numbers.Real) else ""
        return spelt if 0 < len(spelt) <= _WIDTH else f"<{type(x).__name__}>"


_SHORT = _Short()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 2, _WIDTH, _WIDTH


def shown(value: Any) -> str:
    """Spell a value as Python does, cut where it is long."""
    return _SHORT.repr(value)


class Unfit(Exception):
    """A value that an argument does not take; with a text, why, where that is not plain from what is needed."""


def _require(holds: bool, why: str = "") -> None:
    if not holds:
        raise Unfit(why)


@dataclass(frozen=True)
class Rule:
    """What an argument takes: in words, and from a value to what the verb gets, or `Unfit`."""

    needed: str
    read: Callable[[Any], Any]
    error: type[PixNetError] | None = None  # None: what the verb raises
    takes_none: bool = False


def raising(error: type[PixNetError], rule: Rule) -> Rule:
    """Give a rule an error of its own."""
    return replace(rule, error=error)


def optional(rule: Rule) -> Rule:
    """Let a rule take None as well."""
    if rule.takes_none:
        return rule
    read = rule.read
    needed = f"{rule.needed}, or None"
    return replace(rule, needed=needed, read=lambda v: None if v is None else read(v), takes_none=True)


def either(*rules: Rule) -> Rule:
    """Read a value by the first rule that it fits; where it fits none, the last one says why."""

    def read(value: Any) -> Any:
        for rule in rules[:-1]:
            try:
                return rule.read(value)
            except Unfit:
                continue
        return rules[-1].read(value)

    return Rule(" or ".join(rule.needed for rule in rules), read)


def flag() -> Rule:
    """Take True or False, not 1 or 0."""

    def read(value: Any) -> bool:
        is_numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
        _require(isinstance(value, bool) or is_numpys)
        return bool(value)

    return Rule("True or False", read)


def number(needed: str, within: Callable[[float], bool] = math.isfinite) -> Rule:
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
    """Take one of some texts or numbers; 1.0 and True are not 1."""

    def read(value: Any) -> Any:
        plain = str(value) if isinstance(value, str) else value
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            plain = operator.index(value)
        for known in values:
            if type(plain) is type(known) and plain == known:
                return known
        raise Unfit

    *first, last = map(repr, values)
    return Rule(f"{', '.join(first)} or {last}" if first else last, read)


def _check_writable(value: str, longest: int) -> None:
    """Refuse what no file can be called, nor any store hold."""
    try:
        n_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise Unfit("it has characters that cannot be written") from error
    _require("\0" not in value, "it has a NUL character")
    _require(n_bytes <= longest, f"it has {n_bytes} bytes, and {longest} is the most")


def text(what: str = "a name", *, empty: bool = True, longest: int = _LONGEST_NAME) -> Rule:
    """Take a text of bounded length that can be written."""

    def read(value: Any) -> str:
        _require(isinstance(value, str))
        _check_writable(value, longest)
        _require(bool(value) or empty, "it is empty")
        return str(value)

    return Rule(f"{what} as text", read)


def element_name(what: str, *, empty: bool = False) -> Rule:
    """Take the first part of names of elements or files, by SpatialData's own rule."""
    plain = text(empty=empty, longest=_LONGEST_PREFIX)

    def read(value: Any) -> str:
        name: str = plain.read(value)
        # what starts with a dot is written, and never found again: readers take it for a hidden file
        _require(not name.startswith(("__", ".")) and all(c.isalnum() or c in "_-." for c in name))
        return name

    return Rule(f"{what}: letters, digits, '_', '-' and '.', not starting with '__' or '.'", read)


def _listed(value: Any) -> list[Any]:
    """List items of anything that has an order and can be read again: no set, no mapping, no iterator."""
    is_array = hasattr(value, "__array__") and getattr(value, "ndim", None) == 1  # or an index, or a series
    is_text = isinstance(value, str | bytes | bytearray | memoryview)
    _require(not is_text and (is_array or isinstance(value, Sequence)))
    return list(value)


def names(what: str, *, one: bool = True) -> Rule:
    """Take names in an order, and with `one` a single text, as it is."""
    item = text()

    def read(value: Any) -> str | list[str]:
        if one and isinstance(value, str):
            return str(item.read(value))
        listed = _listed(value)
        for name in listed:
            _require(isinstance(name, str), f"{shown(name)} is no text")
        _require(bool(listed), "it is empty")
        return [item.read(name) for name in listed]

    return Rule(f"{what} as text, one or a list of them" if one else f"a list of {what} as text", read)


def each(rule: Rule, what: str, *, n: int | None = None, one: bool = False, box: bool = False) -> Rule:
    """Take `n`, or one or more values of a rule; with `one` also a single one, as it is; a `box` is x0, y0, x1, y1."""

    def read(value: Any) -> Any:
        if one:
            try:
                return rule.read(value)
            except Unfit:
                pass
        items = tuple(rule.read(item) for item in _listed(value))
        _require(len(items) == n if n is not None else bool(items), f"{len(items)} were given")
        _require(not box or (items[0] < items[2] and items[1] < items[3]))
        return items

    return Rule(what, read)


def path(what: str, *checks: Callable[[Path], None]) -> Rule:
    """Take text or a path object that can name a file, and that passes the checks."""

    def read(value: Any) -> str | Path:
        given = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        if not isinstance(given, str):
            raise Unfit
        _require(bool(given), "it is empty")
        _check_writable(given, _LONGEST_PATH)
        for part in Path(given).parts:
            _check_writable(part, _LONGEST_NAME)
        try:
            place = Path(given).expanduser()
        except RuntimeError as error:
            raise Unfit("there is no such user") from error
        for check in checks:
            check(place)
        return str(value) if isinstance(value, str) else Path(value)

    return Rule(what, read)


def is_folder(place: Path) -> None:
    """Refuse what is no folder."""
    _require(place.is_dir(), "it is a file" if place.exists() else "there is no such folder")


def local_is_folder(place: Path) -> None:
    """Refuse what is there, or could not be a name on the hub, and is no folder."""
    if place.is_absolute() or str(place).startswith("..") or place.exists():
        is_folder(place)


def within_folders(place: Path) -> None:
    """Refuse a folder that cannot be made, because a file is in the way."""
    above = next((p for p in (place, *place.parents) if p.is_dir() or p.exists() or p.is_symlink()), None)
    _require(above is None or above.is_dir(), f"{shown(above)} is no folder")


def _is_figure(place: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    is_known = not place.suffix or place.suffix[1:].lower() in known
    _require(is_known, f"it ends in {place.suffix!r}, and {', '.join(known)} can be written")
    _require(not place.is_dir(), "it is a folder")
    _require(place.parent.is_dir(), "there is no such folder")


def figure_file() -> Rule:
    """Take a file in a folder that is there, of a kind that matplotlib writes."""
    return path("a file for the figure", _is_figure)


def _loaded(name: str) -> type | None:
    """Find a class, if it was imported: nothing can be an instance of it otherwise."""
    module, _, attribute = name.rpartition(".")
    loaded = getattr(sys.modules.get(module), attribute, None)
    return loaded if isinstance(loaded, type) else None


def instance(name: str, what: str) -> Rule:
    """Take an object of a class, named by its module and name; the class is not imported for it."""

    def read(value: Any) -> Any:
        loaded = _loaded(name)
        _require(loaded is not None and isinstance(value, loaded))
        return value

    return Rule(what, read)


def by_name(one: Rule, needed: str, *, keys: type = str) -> Rule:
    """Take a value of one rule, or several in a mapping; text is made of keys that are none."""
    name = text()

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return one.read(value)
        _require(bool(value), "there is none in it")
        for key, item in value.items():
            _require(isinstance(key, keys))
            name.read(str(key))
            try:
                one.read(item)
            except Unfit as error:
                raise Unfit(f"{shown(key)} is {shown(item)}") from error
        return {str(key): item for key, item in value.items()}

    return Rule(needed, read)


def mapping(what: str, *, item: Rule | None = None, known: Collection[str] = ()) -> Rule:
    """Take a mapping with texts for keys, or with some of those that are known."""

    def read(value: Any) -> dict[str, Any]:
        _require(isinstance(value, Mapping))
        for key in value:
            _require(key in known if known else isinstance(key, str), f"{shown(key)} is none")
        return {key: item.read(value[key]) if item else value[key] for key in value}

    return Rule(what, read)


def frame(column: str, what: str) -> Rule:
    """Take a data frame with a column of numbers."""
    any_frame = instance("pandas.DataFrame", "")

    def read(value: Any) -> Any:
        any_frame.read(value)
        _require(column in value.columns and getattr(value[column].dtype, "kind", "O") in "fiu")
        return value

    return Rule(what, read)


def axes() -> Rule:
    """Take Axes to draw on, one or several in any arrangement."""
    one = instance("matplotlib.axes.Axes", "")

    def read(value: Any) -> Any:
        import numpy as np

        if hasattr(value, "get_figure"):
            return one.read(value)
        _require(isinstance(value, list | tuple | np.ndarray))
        every = np.asarray(value, dtype=object).ravel()
        _require(len(every) > 0, "there are none")
        for ax in every:
            one.read(ax)
        return value

    return Rule("Axes of matplotlib, or a list of them", read)


def colour_limit() -> Rule:
    """Take a number, a percentile such as ``"p99"``, or one for each gene."""
    share = number("", lambda x: 0 <= x <= 100)

    def percentile(value: Any) -> str:
        _require(isinstance(value, str) and value.startswith("p"))
        try:
            share.read(float(value[1:]))
        except ValueError as error:
            raise Unfit from error
        return str(value)

    what = "a number, a percentile from 'p0' to 'p100', or one for each gene"
    return each(optional(either(number(""), Rule("", percentile))), what, one=True)


def colour_map() -> Rule:
    """Take a colour map or the name of one."""
    made = instance("matplotlib.colors.Colormap", "")

    def read(value: Any) -> Any:
        import matplotlib as mpl

        if not isinstance(value, str):
            return made.read(value)
        _require(value in mpl.colormaps, "there is none of this name")
        return str(value)

    return Rule("a colour map of matplotlib or its name", read)
