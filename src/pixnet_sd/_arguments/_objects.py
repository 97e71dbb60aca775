"""Rules of what names a file or a folder.

Rules of objects and of mappings.

Nothing here imports what is large: a value can only be of a class that is loaded already.

Rules of what plots take; matplotlib is loaded where plots are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixnet_sd.errors import PixNetError

from ._rules import LONGEST_NAME, Rule, Unfit, check_text, each, either, number, optional, shown, text

__all__ = [
    "axes",
    "colour_limit",
    "colour_map",
    "figure_file",
    "folder",
    "frames",
    "hub_name",
    "instance",
    "keywords",
    "mapping",
    "path",
    "slides",
    "texts_by_name",
]

_LONGEST_PATH = 4096


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
    check_text(found, _LONGEST_PATH)
    for part in Path(found).parts:
        check_text(part, LONGEST_NAME)
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


_NAMES_SHOWN = 5


def _loaded(name: str) -> type | None:
    """A class, if it was imported: nothing can be an instance of it otherwise."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) else None


def instance(name: str, what: str) -> Rule:
    """An object of a class, named by its module and name; the class is not imported for it."""

    def read(value: Any) -> Any:
        kind = _loaded(name)
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


def mapping(what: str) -> Rule:
    """A mapping with texts for keys."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise Unfit
        return dict(value)

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
        kind = _loaded("pandas.DataFrame")
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


def axes() -> Rule:
    """Axes to draw on, one or several in any arrangement."""
    one = instance("matplotlib.axes.Axes", "Axes")

    def read(value: Any) -> Any:
        import numpy as np

        if hasattr(value, "get_figure"):
            return one.read(value)
        if not isinstance(value, list | tuple | np.ndarray):
            raise Unfit
        each_one = np.asarray(value, dtype=object).ravel()
        if not len(each_one):
            raise Unfit("there are none")
        for ax in each_one:
            one.read(ax)
        return value

    return Rule("Axes of matplotlib, or a list of them", read)


def colour_limit() -> Rule:
    """A number, a percentile such as ``"p99"``, or one for each gene."""

    def percentile(value: Any) -> str:
        try:
            of = float(value.removeprefix("p")) if isinstance(value, str) and value.startswith("p") else -1.0
        except ValueError:
            of = -1.0
        if not 0 <= of <= 100:
            raise Unfit
        return str(value)

    what = "a number, a percentile from 'p0' to 'p100', or one for each gene"
    return each(optional(either(number(), Rule("", percentile))), what, one=True)


def colour_map() -> Rule:
    """Name of a colour map, or one."""
    made = instance("matplotlib.colors.Colormap", "a colour map of matplotlib")

    def read(value: Any) -> Any:
        import matplotlib as mpl

        if not isinstance(value, str):
            return made.read(value)
        if value not in mpl.colormaps:
            raise Unfit("there is none of this name")
        return str(value)

    return Rule("a colour map of matplotlib or its name", read)


def figure_file() -> Rule:
    """A file in a folder that is there, of a kind that matplotlib writes."""
    where = path()

    def read(value: Any) -> str | Path:
        from matplotlib.backend_bases import FigureCanvasBase

        found = where.read(value)
        place, kinds = Path(found), FigureCanvasBase.get_supported_filetypes()
        if place.suffix and place.suffix[1:].lower() not in kinds:
            raise Unfit(f"it ends in {place.suffix!r}, and {', '.join(kinds)} can be written")
        if place.is_dir():
            raise Unfit("it is a folder")
        if not place.parent.is_dir():
            raise Unfit("there is no such folder")
        return found

    return Rule("a file for the figure", read)
