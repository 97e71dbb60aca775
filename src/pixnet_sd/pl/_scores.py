"""How good a prediction is, gene by gene, and how a training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd.errors import PixNetError

from ._draw import AxesLike, Drawn, axes_grid, figure_of, finish

if TYPE_CHECKING:
    from pixnet_sd.model import PixNet

_PANEL_IN = (4.2, 3.6)
_HISTORY_PANEL_IN = (3.8, 3.0)
_MANY = 2000  # regions; more are counted in hexagons
_LABELS = {
    "loss": "training loss",
    "val_pcc": "held-out PCC, mean over genes",
    "val_mse": "held-out MSE",
    "lr": "learning rate",
    "seconds": "seconds per epoch",
}
_DEFAULT = ("loss", "val_pcc", "val_mse")


@checked()
def evaluation(  # noqa: PLR0913
    evaluation: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    gene: str | None = None,
    sdata: SpatialData | None = None,
    table_key: str | None = None,
    predicted_key: str | None = None,
    n_labels: int = 3,
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    ax: AxesLike = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw what :func:`pixnet_sd.tl.evaluate` found.

    The first panel ranks genes by their Pearson correlation. With several evaluations, such as one for each size of
    regions, a second panel has their distributions side by side, with the median over genes. With `gene`, the last
    panel has predicted against measured expression of that gene in every region.

    Parameters
    ----------
    evaluation
        One evaluation, or several by name, drawn in that order.
    gene
        Gene to look at region by region; needs `sdata`, `table_key` and `predicted_key`, as they were given to
        :func:`pixnet_sd.tl.evaluate`.
    sdata, table_key, predicted_key
        Where that gene's values are.
    n_labels
        How many of the best and of the worst genes are named, when there is one evaluation.
    figsize, dpi, ax, show, save, return_fig
        As of :func:`pixnet_sd.pl.gene_map`.

    Returns
    -------
    Nothing if the figure is shown; the figure with `return_fig`; else the Axes, an array of shape (1, panels), or a
    single one.

    Raises
    ------
    PixNetError
        These are no evaluations, or `gene` is given without where its values are.
    ElementError, DataError
        As of :func:`pixnet_sd.tl.evaluate`; or the gene is not in both tables.
    """
    correlations = _named(evaluation)
    values = None if gene is None else _values(gene, sdata, table_key, predicted_key)
    n_panels = 1 + (len(correlations) > 1) + (values is not None)
    axes = axes_grid(ax, (1, n_panels), figsize=figsize, panel_in=_PANEL_IN, dpi=dpi)
    panels = list(axes.flat)
    _ranked(panels[0], correlations, n_labels)
    if len(correlations) > 1:
        _distributions(panels[1], correlations)
    if values is not None and gene is not None:
        _against(panels[-1], gene, *values)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


def _named(evaluation: pd.DataFrame | Mapping[str, pd.DataFrame]) -> dict[str, pd.Series]:
    """Sort the correlations of each evaluation, the highest first."""
    frames = {"": evaluation} if isinstance(evaluation, pd.DataFrame) else evaluation
    correlations = {name: frame["pcc"].dropna().sort_values(ascending=False) for name, frame in frames.items()}
    empty = [name for name, pcc in correlations.items() if pcc.empty]
    if empty:
        raise PixNetError(f"No gene of evaluation= {empty} has a correlation: its measured values do not vary.")
    return {str(name): pcc for name, pcc in correlations.items()}


def _values(
    gene: str, sdata: SpatialData | None, table_key: str | None, predicted_key: str | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if sdata is None or table_key is None or predicted_key is None:
        raise PixNetError(f"gene={gene!r} needs sdata=, table_key= and predicted_key=, as tl.evaluate was given them.")
    from pixnet_sd.tl import matched_values  # it needs torch, which no other plot does

    matched = matched_values(sdata, table_key=table_key, predicted_key=predicted_key, genes=[gene])
    predicted, measured = (np.concatenate(blocks)[:, 0] for blocks in zip(*matched.blocks(), strict=True))
    return measured, predicted


def _ranked(ax: Axes, correlations: Mapping[str, pd.Series], n_labels: int) -> None:
    for name, pcc in correlations.items():
        median = float(pcc.median())
        label = f"{name}: median {median:.2f}" if name else f"median {median:.2f}"
        style = ".-" if len(pcc) <= 60 else "-"
        (line,) = ax.plot(np.arange(1, len(pcc) + 1), pcc.to_numpy(), style, linewidth=1.5, markersize=5)
        ax.axhline(median, color=line.get_color(), linestyle="--", linewidth=1, label=label)
    if len(correlations) == 1:
        _name_genes(ax, next(iter(correlations.values())), n_labels)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="genes, ranked", ylabel="Pearson correlation over regions", xmargin=0.08)
    ax.legend(frameon=False, fontsize="small", loc="lower left")
    ax.spines[["top", "right"]].set_visible(False)


def _name_genes(ax: Axes, pcc: pd.Series, n_labels: int) -> None:
    """Name the best genes and the worst, one below the other."""
    n = min(n_labels, len(pcc) // 2)
    if not n:
        return
    best, worst = (
        "\n".join(f"{gene}  {value:.2f}" for gene, value in end.items()) for end in (pcc.iloc[:n], pcc.iloc[-n:])
    )
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    style: dict[str, Any] = {"fontsize": "small", "transform": ax.transAxes, "linespacing": 1.3, "bbox": box}
    ax.text(0.98, 0.98, f"best\n{best}\n\nworst\n{worst}", ha="right", va="top", **style)


def _distributions(ax: Axes, correlations: Mapping[str, pd.Series]) -> None:
    at = np.arange(len(correlations))
    style: dict[str, Any] = {"medianprops": {"color": "black"}, "boxprops": {"linewidth": 0.8}}
    ax.boxplot([pcc.to_numpy() for pcc in correlations.values()], positions=at, widths=0.6, showfliers=False, **style)
    rng = np.random.default_rng(0)  # points beside one another, the same in every picture
    for k, pcc in enumerate(correlations.values()):
        x = k + rng.uniform(-0.2, 0.2, len(pcc))
        ax.scatter(x, pcc, s=6, color=f"C{k % 10}", alpha=0.6, linewidths=0)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xticks=at, ylabel="Pearson correlation over regions", xlim=(-0.6, len(correlations) - 0.4))
    rotation, alignment = (0, "center") if len(correlations) <= 4 else (45, "right")
    ax.set_xticklabels(list(correlations), rotation=rotation, ha=alignment)
    ax.spines[["top", "right"]].set_visible(False)


def _against(ax: Axes, gene: str, measured: NDArray[np.float32], predicted: NDArray[np.float32]) -> None:
    if len(measured) > _MANY:
        drawn = ax.hexbin(measured, predicted, gridsize=40, bins="log", cmap="viridis", mincnt=1, linewidths=0)
        figure_of(ax).colorbar(drawn, ax=ax, label="regions")
    else:
        ax.scatter(measured, predicted, s=8, alpha=0.5, linewidths=0)
    low = float(min(measured.min(), predicted.min()))
    ax.axline((low, low), slope=1, color="0.4", linestyle="--", linewidth=1)
    varies = measured.std() > 0 and predicted.std() > 0
    title = f"{gene}, PCC {np.corrcoef(measured, predicted)[0, 1]:.2f}" if varies else gene
    ax.set(title=title, xlabel="measured, log-normalised", ylabel="predicted, log-normalised")
    ax.spines[["top", "right"]].set_visible(False)


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
    from pixnet_sd.model import PixNet

    trained = model if isinstance(model, PixNet) else PixNet.load(model)
    rows, best = trained.history, trained.record.training.get("best_epoch")
    wanted = [keys] if isinstance(keys, str) else list(keys or [key for key in _DEFAULT if key in rows])
    unknown = [key for key in wanted if key not in rows]
    if unknown or not wanted:
        missing = ", ".join(map(repr, unknown)) or "epochs"
        raise PixNetError(
            f"keys={wanted}: the model's history has no {missing}. It has {len(rows)} epochs, and of each "
            f"{', '.join(map(repr, rows.columns)) or 'nothing'}."
        )
    axes = axes_grid(ax, (1, len(wanted)), figsize=figsize, panel_in=_HISTORY_PANEL_IN, dpi=dpi)
    for panel, key in zip(axes.flat, wanted, strict=True):
        _draw(panel, rows[key], None if best is None else int(best))
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


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
