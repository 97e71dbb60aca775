"""How a training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pixnet_sd._arguments import checked
from pixnet_sd._errors import PixNetError

from ._output import AxesLike, Drawn, axes_grid, finish

if TYPE_CHECKING:
    from pixnet_sd.store import PixNet

__all__ = ["history"]

_LABELS = {
    "loss": "training loss",
    "val_pcc": "held-out PCC, mean over genes",
    "val_mse": "held-out MSE",
    "lr": "learning rate",
    "seconds": "seconds per epoch",
}
_DEFAULT = ("loss", "val_pcc", "val_mse")
_PANEL_IN = (3.8, 3.0)


@checked()
def history(
    model: PixNet | str | Path,
    *,
    keys: str | Sequence[str] | None = None,
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    ax: AxesLike = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw the curves of a training, and mark the epoch whose weights were kept.

    Parameters
    ----------
    model
        The model, or its folder.
    keys
        Columns of ``model.history``, one panel each: ``"loss"``, ``"val_pcc"``, ``"val_mse"``, ``"lr"``, ``"seconds"``;
        default: the first three, as far as they are there.
    figsize, dpi, ax, show, save, return_fig
        As of :func:`pixnet_sd.pl.gene_map`.

    Returns
    -------
    Nothing if the figure is shown; the figure with `return_fig`; else the Axes, an array of shape (1, panels), or a
    single one.

    Raises
    ------
    PixNetError
        The model has no history, or not these columns.
    CheckpointError
        The folder holds no model.
    """
    rows, best = _record(model)
    wanted = [keys] if isinstance(keys, str) else list(keys or [key for key in _DEFAULT if key in rows])
    unknown = [key for key in wanted if key not in rows]
    if unknown or not wanted:
        missing = ", ".join(map(repr, unknown)) or "epochs"
        raise PixNetError(
            f"keys={wanted}: the model's history has no {missing}. It has {len(rows)} epochs, and of each "
            f"{', '.join(map(repr, rows.columns)) or 'nothing'}."
        )
    axes = axes_grid(ax, (1, len(wanted)), figsize=figsize, panel_in=_PANEL_IN, dpi=dpi)
    for panel, key in zip(axes.flat, wanted, strict=True):
        _draw(panel, rows[key], best)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


def _record(model: PixNet | str | Path) -> tuple[pd.DataFrame, int | None]:
    """Rows by epoch, and the epoch that was kept."""
    from pixnet_sd.store import PixNet  # loads torch

    found = model if isinstance(model, PixNet) else PixNet.load(model)
    best = found.record.training.get("best_epoch")
    return found.history, None if best is None else int(best)


def _draw(ax: Axes, values: pd.Series, best: int | None) -> None:
    marker = "o" if len(values) == 1 else None
    ax.plot(values.index, values, color="C0", marker=marker, linewidth=1.5)
    if best is not None and best in values.index:
        ax.axvline(best, color="0.4", linestyle="--", linewidth=1, label=f"kept: epoch {best}")
        ax.plot([best], [values[best]], "o", color="C3", markersize=5, zorder=3)
        ax.legend(frameon=False, fontsize="small")
    ax.set(xlabel="epoch", ylabel=_LABELS.get(str(values.name), str(values.name)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
