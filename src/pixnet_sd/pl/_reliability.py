"""Whether error bars hold what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError

from ._draw import AxesLike, Drawn, axes_grid, finish

_PANEL_IN = (3.8, 3.6)
_LEVELS = (*np.arange(1, 10) / 10, 0.95, 0.99)


@checked()
def reliability(  # noqa: PLR0913
    sdata: SpatialData,
    *,
    table_key: str,
    predicted_key: str,
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    ax: AxesLike = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw how many measurements lie in intervals of every level, over how many should.

    A curve below the diagonal tells of intervals that are too narrow: the slide differs from the regions by which they
    were set. Between the quartiles of the genes the area is shaded.

    Parameters
    ----------
    sdata, table_key, predicted_key
        As of :func:`pixnet_sd.tl.evaluate`; of a model of counts.
    figsize, dpi, ax, show, save, return_fig
        As of :func:`pixnet_sd.pl.gene_map`.

    Returns
    -------
    Nothing if the figure is shown; the figure with `return_fig`; else the Axes.

    Raises
    ------
    ElementError, DataError
        As of :func:`pixnet_sd.tl.evaluate`; or the prediction has no intervals.
    """
    from pixnet_sd.tl import matched_values  # it needs torch, which no other plot does

    matched = matched_values(sdata, table_key=table_key, predicted_key=predicted_key)
    if matched.noise is None:
        what = f"Table {predicted_key!r} is of a model without error bars"
        raise DataError(f"{what}: its objective is not 'nb_pcc'. Train with objective='nb_pcc'.")
    covered = matched.coverage(_LEVELS)
    axes = axes_grid(ax, (1, 1), figsize=figsize, panel_in=_PANEL_IN, dpi=dpi)
    panel = axes.flat[0]
    low, high = np.quantile(covered, [0.25, 0.75], axis=1)
    panel.fill_between(_LEVELS, low, high, alpha=0.25, linewidth=0, label="half of the genes")
    panel.plot(_LEVELS, covered.mean(axis=1), ".-", label="mean over genes")
    panel.axline((0, 0), slope=1, color="0.4", linestyle="--", linewidth=1)
    panel.set(
        xlabel="share that an interval should hold", ylabel="share of measurements in it", xlim=(0, 1), ylim=(0, 1)
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small", loc="upper left")
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)
