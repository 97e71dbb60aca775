"""How good a prediction is, gene by gene, how a training went, and what one will see, before it starts."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, NoNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError, PixNetError
from pixnet_sd.geometry import MAP_STRIDE
from pixnet_sd.params import ModelParams, ObjectiveName, TrainParams
from pixnet_sd.slide import tissue_mask
from pixnet_sd.slide.tables import checked_totals

from ._draw import (
    AxesLike,
    Drawn,
    View,
    add_scale_bar,
    axes_grid,
    draw_regions,
    draw_slide,
    figure_of,
    finish,
    scaled,
    set_view,
    view_of,
)

if TYPE_CHECKING:
    from pixnet_sd.engine import Tile, TrainingSlide
    from pixnet_sd.model import PixNet
    from pixnet_sd.tl import Source

_GENES_IN, _HISTORY_IN = (4.2, 3.6), (3.8, 3.0)
_MANY = 2000  # regions; more are counted in hexagons
_LABELS = {
    "loss": "training loss",
    "val_pcc": "held-out PCC, mean over genes",
    "val_mse": "held-out MSE",
    "lr": "learning rate",
    "seconds": "seconds per epoch",
}
_DEFAULT = ("loss", "val_pcc", "val_mse")

_SLIDE_IN, _LEGEND_IN = 5.0, 1.0
_COLOURS = {"training": "#0072b2", "held out": "#d55e00", "in neither": "#7f7f7f"}
_DASHES: dict[str, Literal["-", "--"]] = {"training": "-", "held out": "--"}
_TISSUE = "#009e73"
_TITLE_CHARACTERS = 60


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
    axes = axes_grid(ax, (1, n_panels), figsize=figsize, panel_in=_GENES_IN, dpi=dpi)
    _ranked(axes.flat[0], correlations, n_labels)
    if len(correlations) > 1:
        _distributions(axes.flat[1], correlations)
    if values is not None and gene is not None:
        _against(axes.flat[-1], gene, *values)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


def _named(evaluation: pd.DataFrame | Mapping[str, pd.DataFrame]) -> dict[str, pd.Series]:
    """Sort the correlations of each evaluation, the highest first."""
    frames = {"": evaluation} if isinstance(evaluation, pd.DataFrame) else evaluation
    correlations = {str(name): frame["pcc"].dropna().sort_values(ascending=False) for name, frame in frames.items()}
    if empty := [name for name, pcc in correlations.items() if pcc.empty]:
        raise PixNetError(f"No gene of evaluation= {empty} has a correlation: its measured values do not vary.")
    return correlations


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
    """Draw curves of correlations, and name the best and the worst genes of a single one."""
    for name, pcc in correlations.items():
        median, style = float(pcc.median()), ".-" if len(pcc) <= 60 else "-"
        label = f"{name}: median {median:.2f}" if name else f"median {median:.2f}"
        (line,) = ax.plot(np.arange(1, len(pcc) + 1), pcc.to_numpy(), style, linewidth=1.5, markersize=5)
        ax.axhline(median, color=line.get_color(), linestyle="--", linewidth=1, label=label)
        n = min(n_labels, len(pcc) // 2) if len(correlations) == 1 else 0
        if n:
            lines = [f"{gene}  {value:.2f}" for gene, value in pcc.items()]
            best, worst = "\n".join(lines[:n]), "\n".join(lines[-n:])
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            where: dict[str, Any] = {"ha": "right", "va": "top", "transform": ax.transAxes, "bbox": box}
            ax.text(0.98, 0.98, f"best\n{best}\n\nworst\n{worst}", fontsize="small", linespacing=1.3, **where)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="genes, ranked", ylabel="Pearson correlation over regions", xmargin=0.08)
    ax.legend(frameon=False, fontsize="small", loc="lower left")


def _distributions(ax: Axes, correlations: Mapping[str, pd.Series]) -> None:
    at, values = np.arange(len(correlations)), [pcc.to_numpy() for pcc in correlations.values()]
    style: dict[str, Any] = {"medianprops": {"color": "black"}, "boxprops": {"linewidth": 0.8}}
    ax.boxplot(values, positions=at, widths=0.6, showfliers=False, **style)
    rng = np.random.default_rng(0)  # points beside one another, the same in every picture
    for k, pcc in enumerate(values):
        ax.scatter(k + rng.uniform(-0.2, 0.2, len(pcc)), pcc, s=6, color=f"C{k % 10}", alpha=0.6, linewidths=0)
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xticks=at, ylabel="Pearson correlation over regions", xlim=(-0.6, len(correlations) - 0.4))
    rotation, alignment = (0, "center") if len(correlations) <= 4 else (45, "right")
    ax.set_xticklabels(list(correlations), rotation=rotation, ha=alignment)


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
    rows, best = trained.history, trained.record.training.get("best_epoch", -1)
    wanted = [keys] if isinstance(keys, str) else list(keys or [key for key in _DEFAULT if key in rows])
    unknown = [key for key in wanted if key not in rows]
    if unknown or not wanted:
        missing = ", ".join(map(repr, unknown)) or "epochs"
        raise PixNetError(
            f"keys={wanted}: the model's history has no {missing}. It has {len(rows)} epochs, and of each "
            f"{', '.join(map(repr, rows.columns)) or 'nothing'}."
        )
    axes = axes_grid(ax, (1, len(wanted)), figsize=figsize, panel_in=_HISTORY_IN, dpi=dpi)
    for panel, key in zip(axes.flat, wanted, strict=True):
        panel.plot(rows.index, rows[key], color="C0", marker="o" if len(rows) == 1 else None, linewidth=1.5)
        if best in rows.index:
            panel.axvline(best, color="0.4", linestyle="--", linewidth=1, label=f"kept: epoch {best}")
            panel.plot([best], [rows[key][best]], "o", color="C3", markersize=5, zorder=3)
            panel.legend(frameon=False, fontsize="small")
        panel.set(xlabel="epoch", ylabel=_LABELS.get(key, key))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.spines[["top", "right"]].set_visible(False)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


@checked()
def training_regions(  # noqa: PLR0913
    sdata: SpatialData | Mapping[str, SpatialData],
    *,
    image_key: str | None = None,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    objective: ObjectiveName = "nb_pcc",
    validation: float | Sequence[str] | None = 0.1,
    seed: int = 0,
    model_params: ModelParams | Mapping[str, Any] | None = None,
    train_params: TrainParams | Mapping[str, Any] | None = None,
    scalebar: bool = True,
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    ax: AxesLike = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw what :func:`pixnet_sd.tl.fit` would train on: give it the same arguments.

    The left panel of each slide has the image, the outline of the tissue that :func:`pixnet_sd.tl.predict` would fill,
    and the tiles that the network would see; the right panel the regions of the coarsest table: those trained on, those
    held out, and those in neither, because they reach into a held-out block. Titles say what was taken: the image, its
    resolution and where that is from, the coordinate system, and the table. Nothing is trained.

    Tiles for training are drawn as they are with a frozen encoder; otherwise they move at random every epoch.

    Parameters
    ----------
    sdata, image_key, table_key, coordinate_system, mpp, validation, seed, model_params, train_params
        As of :func:`pixnet_sd.tl.fit`.
    objective
        As of :func:`pixnet_sd.tl.fit`. Counts are read once, to leave out regions without any, as the logarithms of
        ``"mse_pcc"`` do.
    scalebar
        Whether to draw a scale bar.
    figsize, dpi, ax, show, save, return_fig
        As of :func:`pixnet_sd.pl.gene_map`; one row of two panels for each slide.

    Returns
    -------
    Nothing if the figure is shown; the figure with `return_fig`; else the Axes, an array of shape (slides, 2).

    Raises
    ------
    ElementError, ResolutionError, DataError, PixNetError
        What :func:`pixnet_sd.tl.fit` would raise.
    """
    from pixnet_sd.engine import training_tiles  # these need torch, which is loaded when they do
    from pixnet_sd.tl import open_sources, split_slides

    slides = {"slide": sdata} if isinstance(sdata, SpatialData) else dict(sdata)
    training = TrainParams.read(train_params)
    sources = open_sources(
        slides,
        image_key=image_key,
        table_key=table_key,
        coordinate_system=coordinate_system,
        mpp=mpp,
        allow_any_mpp=training.allow_any_mpp,
        working_mpp=ModelParams.read(model_params).working_mpp,
    )
    every = {name: _usable(source, objective) for name, source in sources.items()}
    plans = {}
    for name, source in sources.items():
        view = view_of(source.slide, None, ax=ax, panel_in=_SLIDE_IN, dpi=dpi, save=save)
        plans[name] = _Plan(source, every[name], {}, {}, tissue_mask(source.slide), view)
    for use, part in zip(_DASHES, split_slides(every, validation, seed), strict=True):
        for slide in (slide for slide in part if slide.measured):
            plan = plans[slide.name]
            # as a training with a frozen encoder, and every validation, has them
            plan.tiles[use] = training_tiles(slide, training.tile_px, once=use == "held out").tiles
            plan.parts[use] = slide
    sides = np.array([(plan.view.width, plan.view.height) for plan in plans.values()]).max(axis=0)
    width_in, height_in = _SLIDE_IN * sides / sides.max()
    panel_in = (width_in, height_in + _LEGEND_IN)
    axes = axes_grid(ax, (len(plans), 2), figsize=figsize, panel_in=panel_in, dpi=dpi)
    for row, (name, plan) in zip(axes, plans.items(), strict=True):
        _draw_tiles(row[0], plan, f"{name}: " if len(plans) > 1 else "")
        _draw_regions(row[1], plan)
        if scalebar:
            add_scale_bar(row[0], plan.view)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is known of a slide before it is trained on."""

    source: Source
    every: TrainingSlide
    parts: dict[str, TrainingSlide]  # those trained on and held out, by that name; either may be missing
    tiles: dict[str, list[Tile]]  # of each part
    tissue: NDArray[np.bool_]
    view: View


def _usable(source: Source, objective: str) -> TrainingSlide:
    """Keep the regions of a slide that have targets; the targets themselves are not made."""
    from pixnet_sd.engine import MeasuredRegions, TrainingSlide

    groups = []
    for table in source.tables:
        regions = table.regions
        if objective == "mse_pcc":
            total = checked_totals(table.counts, table.var_names, table.what)
            if not total.any():
                raise DataError(f"{table.what}: all {len(table)} regions on the image have no counts at all.")
            regions = regions.subset(np.flatnonzero(total > 0))
        groups.append(MeasuredRegions(table.table_key, regions, np.empty((len(regions), 0), np.float32)))
    return TrainingSlide(source.slide.name, source.slide.read, *source.slide.working_shape, tuple(groups))


def _draw_tiles(ax: Axes, plan: _Plan, title: str) -> None:
    slide, um = plan.source.slide, plan.source.slide.working_mpp
    draw_slide(ax, slide, plan.view)
    _outline(ax, plan.tissue, MAP_STRIDE * um)
    handles: list[Line2D | Patch] = [Line2D([], [], color=_TISSUE, label="tissue")]
    for use, tiles in plan.tiles.items():
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": _COLOURS[use], "linestyle": _DASHES[use]}
        boxes = [Rectangle((t.col0 * um, t.row0 * um), t.width * um, t.height * um) for t in tiles]
        ax.add_collection(PatchCollection(boxes, linewidth=1.2, **style), autolim=False)
        handles.append(Patch(label=f"{len(tiles)} tiles {use}, {tiles[0].width} x {tiles[0].height} px", **style))
    _entitle(ax, plan, f"{title}{slide.mpp:.3g} µm/px, seen at {um:.3g} µm/px\n", slide.taken(), handles)


def _entitle(ax: Axes, plan: _Plan, title: str, text: str, handles: Sequence[Line2D | Patch]) -> None:
    """Show the plan's view with a title, and text folded below, above and a legend below."""
    set_view(ax, plan.view, title + textwrap.fill(text, _TITLE_CHARACTERS))
    ax.title.set_fontsize("small")
    ax.legend(handles=list(handles), loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize="small")


def _outline(ax: Axes, mask: NDArray[np.bool_], pitch_um: float) -> None:
    """Draw the border of the tissue; a margin of glass closes it along the border of the image."""
    every = max(1, max(mask.shape) // 1000)
    thin = np.pad(mask[::every, ::every], 1).astype(np.float32)
    at = [((np.arange(size) - 1) * every + 0.5) * pitch_um for size in thin.shape]
    ax.contour(at[1], at[0], thin, levels=[0.5], colors=[_TISSUE], linewidths=1.5)


def _draw_regions(ax: Axes, plan: _Plan) -> None:
    draw_slide(ax, plan.source.slide, plan.view).set_alpha(0.45)
    to_um = scaled(plan.source.slide.working_mpp)
    coarsest = min(plan.every.measured, key=lambda group: len(group.regions)).size_name
    for use, part in (("in neither", plan.every), *plan.parts.items()):
        for group in (m for m in part.measured if m.size_name == coarsest):
            style: dict[str, Any] = {"cmap": ListedColormap([_COLOURS[use]]), "norm": NoNorm()}
            draw_regions(ax, group.regions, np.zeros(len(group.regions)), to_um, plan.view, **style)
    (element,) = (table.element_key for table in plan.source.tables if table.table_key == coarsest)
    # how many regions of each table are trained on, held out, and neither
    counts = {use: Counter({m.size_name: len(m.regions) for m in part.measured}) for use, part in plan.parts.items()}
    every = Counter({m.size_name: len(m.regions) for m in plan.every.measured})
    counts["in neither"] = every - sum(counts.values(), Counter())
    labels = {use: ", ".join(f"{n:,} ({name})" for name, n in sizes.items() if n) for use, sizes in counts.items()}
    handles = [Patch(color=_COLOURS[use], label=f"{use}: {text}") for use, text in labels.items() if text]
    _entitle(ax, plan, "", f"regions {element!r} of table {coarsest!r}", handles)
