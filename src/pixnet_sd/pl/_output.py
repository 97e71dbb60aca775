"""Figures: made or taken from the caller, then saved, shown or returned in scanpy's way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pixnet_sd._errors import PixNetError

__all__ = ["AxesLike", "Drawn", "Panels", "axes_grid", "figure_of", "finish", "resolution", "shown_px"]

_MOST_PX = 2**16  # of the raster that matplotlib draws on

Panels = np.ndarray[Any, Any]
"""Axes, in rows and columns."""

AxesLike = Axes | Sequence[Axes] | Panels | None
"""What ``ax=`` takes: one Axes, or as many as there are panels."""

Drawn = Figure | Axes | Panels | None
"""What a plot returns."""


def axes_grid(
    ax: AxesLike,
    shape: tuple[int, int],
    *,
    figsize: tuple[float, float] | None,
    panel_in: tuple[float, float],
    dpi: float | None,
) -> Panels:
    """Axes of a grid of panels.

    Parameters
    ----------
    ax
        Axes of the caller, in reading order; None: those of a new figure.
    shape
        Rows and columns of panels.
    figsize
        Size of a new figure, inches; None: from that of a panel, `panel_in`.
    dpi
        Of a new figure.

    Raises
    ------
    PixNetError
        There are more or fewer Axes than panels.
    """
    if ax is None:
        size = figsize or (shape[1] * panel_in[0], shape[0] * panel_in[1])
        _check_px(size, dpi)
        figure = plt.figure(figsize=size, dpi=dpi, layout="constrained")
        return np.asarray(figure.subplots(*shape, squeeze=False), dtype=object)
    given = [ax] if isinstance(ax, Axes) else list(np.asarray(ax, dtype=object).ravel())
    if len(given) != shape[0] * shape[1]:
        raise PixNetError(
            f"ax= has {len(given)} Axes, and {shape[0] * shape[1]} panels are drawn ({shape[0]} x {shape[1]}). Give "
            "as many, or leave ax= out."
        )
    grid = np.empty(len(given), dtype=object)
    grid[:] = given
    return grid.reshape(shape)


def _check_px(size_in: tuple[float, float], dpi: float | None) -> None:
    """Refuse a picture with more pixels a side than any backend draws."""
    given = float(plt.rcParams["figure.dpi"]) if dpi is None else dpi
    if max(size_in) * given >= _MOST_PX:
        raise PixNetError(
            f"figsize=({size_in[0]:g}, {size_in[1]:g}) at dpi={given:g}: a side would have {max(size_in) * given:,.0f} "
            f"pixels, and {_MOST_PX:,} is the most. Give a smaller one, or fewer panels."
        )


def figure_of(ax: Axes) -> Figure:
    """The figure that a panel is in, the outermost of nested ones."""
    figure: Any = ax.get_figure(root=True)
    return figure


def resolution(dpi: float | None, save: str | Path | None) -> float:
    """Dots per inch of the picture that is made: of the file, if one is."""
    if dpi is not None:
        return dpi
    on_file: Any = plt.rcParams["savefig.dpi"]
    screen = float(plt.rcParams["figure.dpi"])
    return max(screen, float(on_file)) if save is not None and on_file != "figure" else screen


def shown_px(ax: AxesLike, panel_in: float, dpi: float) -> float:
    """Pixels along the longer side of a panel."""
    if ax is None:
        return panel_in * dpi
    first = ax if isinstance(ax, Axes) else np.asarray(ax, dtype=object).flat[0]
    box = first.get_window_extent()
    return float(max(box.width, box.height, 1.0))


def finish(
    axes: Panels,
    *,
    is_new: bool,
    show: bool | None,
    save: str | Path | None,
    return_fig: bool,
) -> Drawn:
    """Save, show and return.

    Parameters
    ----------
    axes
        All panels.
    is_new
        Whether the figure was made here; only then is it shown by itself.
    show, save, return_fig
        As of :func:`pixnet_sd.pl.gene_map`.

    Returns
    -------
    The figure if `return_fig`; None if it was shown; else the Axes, a single one by itself.
    """
    figure = figure_of(axes.flat[0])
    if save is not None:
        figure.savefig(save)  # the layout leaves no margin to cut off
    if return_fig:
        return figure
    if show or (show is None and is_new):
        plt.show()
        return None
    return axes.flat[0] if axes.size == 1 else axes
