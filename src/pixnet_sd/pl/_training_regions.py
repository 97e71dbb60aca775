"""What a training will see, to be looked at before it starts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, NoNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import MAP_STRIDE
from pixnet_sd.params import ModelParams, ObjectiveName, TrainParams
from pixnet_sd.slide import Slide, tissue_mask
from pixnet_sd.slide.tables import Measured, checked_totals

from ._draw import (
    AxesLike,
    Drawn,
    View,
    add_scale_bar,
    axes_grid,
    draw_regions,
    draw_slide,
    finish,
    scaled,
    set_view,
    view_of,
)

if TYPE_CHECKING:
    from pixnet_sd.engine import MeasuredRegions, Tile, TrainingSlide
    from pixnet_sd.tl import Source, Validation

_PANEL_IN = 5.0
_LEGEND_IN = 1.0
_COLOURS = {"training": "#0072b2", "held out": "#d55e00", "in neither": "#7f7f7f"}
_DASHES: dict[str, Literal["-", "--"]] = {"training": "-", "held out": "--"}
_TISSUE = "#009e73"
_PALE = 0.45
_TITLE_CHARACTERS = 60


@checked()
def training_regions(  # noqa: PLR0913
    sdata: SpatialData | Mapping[str, SpatialData],
    *,
    image_key: str | None = None,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    objective: ObjectiveName = "mse_pcc",
    validation: Validation = 0.1,
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
    parts = _parts(*split_slides(every, validation, seed))
    plans = {
        name: _Plan(
            source.slide,
            {table.table_key: table.element_key for table in source.tables},
            every[name],
            parts[name],
            # Tiles as a training with a frozen encoder, and every validation, has them.
            {
                use: training_tiles(part, training.tile_px, once=use == "held out").tiles
                for use, part in parts[name].items()
            },
            tissue_mask(source.slide),
            view_of(source.slide, None, ax=ax, panel_in=_PANEL_IN, dpi=dpi, save=save),
        )
        for name, source in sources.items()
    }
    panel_in = _panel_in([plan.view for plan in plans.values()])
    axes = axes_grid(ax, (len(plans), 2), figsize=figsize, panel_in=panel_in, dpi=dpi)
    for row, (name, plan) in zip(axes, plans.items(), strict=True):
        _draw_tiles(row[0], plan, f"{name}: " if len(plans) > 1 else "")
        _draw_regions(row[1], plan)
        if scalebar:
            add_scale_bar(row[0], plan.view)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


Parts = dict[str, "TrainingSlide"]
"""The parts of one slide that are trained on and held out, by that name; either may be missing."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is known of a slide before it is trained on; `elements` are those that its tables annotate."""

    slide: Slide
    elements: dict[str, str]
    every: TrainingSlide
    parts: Parts
    tiles: dict[str, list[Tile]]
    tissue: NDArray[np.bool_]
    view: View


def _usable(source: Source, objective: str) -> TrainingSlide:
    """Keep the regions of a slide that have targets; the targets themselves are not made."""
    from pixnet_sd.engine import TrainingSlide

    height, width = source.slide.working_shape
    groups = tuple(_group(table, objective) for table in source.tables)
    return TrainingSlide(source.slide.name, source.slide.read, height, width, groups)


def _group(table: Measured, objective: str) -> MeasuredRegions:
    from pixnet_sd.engine import MeasuredRegions

    regions = table.regions
    if objective == "mse_pcc":
        total = checked_totals(table.counts, table.var_names, table.what)
        if not total.any():
            raise DataError(f"{table.what}: all {len(table)} regions on the image have no counts at all.")
        regions = regions.subset(np.flatnonzero(total > 0))
    return MeasuredRegions(table.table_key, regions, np.empty((len(regions), 0), np.float32))


def _parts(training: Sequence[TrainingSlide], held_out: Sequence[TrainingSlide]) -> dict[str, Parts]:
    parts: dict[str, Parts] = {slide.name: {} for slide in (*training, *held_out)}
    for use, slides in (("training", training), ("held out", held_out)):
        for slide in slides:
            if slide.measured:
                parts[slide.name][use] = slide
    return parts


def _panel_in(views: Sequence[View]) -> tuple[float, float]:
    width, height = max(view.width for view in views), max(view.height for view in views)
    return _PANEL_IN * width / max(width, height), _PANEL_IN * height / max(width, height) + _LEGEND_IN


def _draw_tiles(ax: Axes, plan: _Plan, title: str) -> None:
    slide = plan.slide
    draw_slide(ax, slide, plan.view)
    _outline(ax, plan.tissue, MAP_STRIDE * slide.working_mpp)
    handles: list[Line2D | Patch] = [Line2D([], [], color=_TISSUE, label="tissue")]
    um = slide.working_mpp
    for use, tiles in plan.tiles.items():
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": _COLOURS[use], "linestyle": _DASHES[use]}
        boxes = [Rectangle((t.col0 * um, t.row0 * um), t.width * um, t.height * um) for t in tiles]
        ax.add_collection(PatchCollection(boxes, linewidth=1.2, **style), autolim=False)
        handles.append(Patch(label=f"{len(tiles)} tiles {use}, {tiles[0].width} x {tiles[0].height} px", **style))
    taken = f"{title}{slide.mpp:.3g} µm/px, seen at {slide.working_mpp:.3g} µm/px"
    _entitle(ax, plan, f"{taken}\n{_folded(slide.taken())}", handles)


def _folded(text: str) -> str:
    return textwrap.fill(text, _TITLE_CHARACTERS)


def _entitle(ax: Axes, plan: _Plan, title: str, handles: Sequence[Line2D | Patch]) -> None:
    """Show the plan's view with a title above and a legend below."""
    set_view(ax, plan.view, title)
    ax.title.set_fontsize("small")
    ax.legend(handles=list(handles), loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize="small")


def _outline(ax: Axes, mask: NDArray[np.bool_], pitch_um: float) -> None:
    """Draw the border of the tissue; a margin of glass closes it along the border of the image."""
    every = max(1, max(mask.shape) // 1000)
    thin = np.pad(mask[::every, ::every], 1).astype(np.float32)
    at = [((np.arange(size) - 1) * every + 0.5) * pitch_um for size in thin.shape]
    ax.contour(at[1], at[0], thin, levels=[0.5], colors=[_TISSUE], linewidths=1.5)


def _draw_regions(ax: Axes, plan: _Plan) -> None:
    draw_slide(ax, plan.slide, plan.view).set_alpha(_PALE)
    to_um = scaled(plan.slide.working_mpp)
    coarsest = min(plan.every.measured, key=lambda group: len(group.regions)).size_name
    for use, part in (("in neither", plan.every), *plan.parts.items()):
        for group in (m for m in part.measured if m.size_name == coarsest):
            style: dict[str, Any] = {"cmap": ListedColormap([_COLOURS[use]]), "norm": NoNorm()}
            draw_regions(ax, group.regions, np.zeros(len(group.regions)), to_um, plan.view, **style)
    title = _folded(f"regions {plan.elements[coarsest]!r} of table {coarsest!r}")
    handles = [Patch(color=_COLOURS[use], label=text) for use, text in _counts(plan.every, plan.parts).items()]
    _entitle(ax, plan, title, handles)


def _counts(every: TrainingSlide, parts: Parts) -> dict[str, str]:
    """Tell how many regions of each table are trained on, held out, and neither."""
    left = {m.size_name: len(m.regions) for m in every.measured}
    counts: dict[str, dict[str, int]] = {}
    for use in ("training", "held out"):
        groups = parts[use].measured if use in parts else ()
        counts[use] = {m.size_name: len(m.regions) for m in groups}
        left = {name: n - counts[use].get(name, 0) for name, n in left.items()}
    counts["in neither"] = left
    return {
        use: f"{use}: " + ", ".join(f"{n:,} ({name})" for name, n in sizes.items() if n)
        for use, sizes in counts.items()
        if any(sizes.values())
    }
