"""Rules of what plots take; matplotlib is loaded where plots are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._objects import instance
from ._paths import path
from ._rules import Rule, Unfit, each, either, number, optional

__all__ = ["axes", "colour_limit", "colour_map", "figure_file"]


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
