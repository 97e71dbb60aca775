"""H&E, measured and predicted expression side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData, get_pyramid_levels
from spatialdata.transformations import get_transformation
from xarray import DataArray, DataTree

from pixnet_sd import get
from pixnet_sd._arguments import checked
from pixnet_sd._notes import memory_note
from pixnet_sd.errors import ElementError, PixNetError
from pixnet_sd.get import stored_key
from pixnet_sd.slide import Slide, open_slide, select_coordinate_system, slide_at
from pixnet_sd.slide.elements import affine_matrix, bin_lattice
from pixnet_sd.slide.tables import (
    Measured,
    checked_blocks,
    log_normalise,
    measured,
    measured_regions,
    measured_tables,
    select_tables,
)

from ._draw import (
    AxesLike,
    Drawn,
    View,
    add_scale_bar,
    axes_grid,
    draw_raster,
    draw_regions,
    draw_slide,
    figure_of,
    finish,
    scaled,
    set_view,
    view_of,
)

Bound = float | str | None  # a number, a percentile such as ``"p99"``, or None for the default percentile
Panel = Literal["image", "measured", "predicted"]

_TOTAL = "total_counts"
_PANELS: tuple[Panel, ...] = ("image", "measured", "predicted")
_PANEL_IN, _TITLE_IN, _BAR_IN = 3.6, 0.55, 0.3
_TARGET_SUM = 1e4


@checked()
def gene_map(  # noqa: PLR0913
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    key_added: str = "pixnet",
    table_key: str | None = None,
    panels: Sequence[Panel] | None = None,
    crop_um: Sequence[float] | None = None,
    scale: str | None = None,
    alpha: float = 1.0,
    cmap: str | Colormap = "viridis",
    vmin: Bound | Sequence[Bound] = None,
    vmax: Bound | Sequence[Bound] = None,
    shared_limits: bool | None = None,
    scalebar: bool = True,
    colorbar_loc: Literal["right"] | None = "right",
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    ax: AxesLike = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Drawn:
    """Draw the H&E image, measured and predicted expression side by side, on one scale, one row a gene.

    Titles have the mean and the range of what is shown.

    Only what is shown is read: the channels of these genes, inside the crop, from the coarsest level of the map that
    has a pixel for every one on the screen. Axes are in µm from the image's top left corner.

    Parameters
    ----------
    sdata
        Object with a gene map of :func:`pixnet_sd.tl.predict`.
    genes
        One gene or several; of a model of counts ``total_counts`` too.
    key_added
        First part of the map's name.
    table_key
        Table with raw counts, drawn as "measured"; default: the coarsest Visium HD bins, or the only table that
        annotates regions. Values are log-normalised as the model's targets were, or counts per µm² for a model of
        counts.
    panels
        Which of ``"image"``, ``"measured"`` and ``"predicted"``, in which order; default: all that are there.
    crop_um
        ``(x0, y0, x1, y1)`` in µm from the image's top left corner; default: the whole slide.
    scale
        Level of the map, ``"scale0"`` or ``"full"`` for the finest; default: as fine as the screen.
    alpha
        Opacity of expression; below 1 the H&E image is drawn beneath.
    cmap
        Colour map.
    vmin, vmax
        Colour limits: numbers or percentiles (``"p99"``), or one for each gene; default: ``"p1"`` and ``"p99"``.
    shared_limits
        Whether measured and predicted have the same limits; default: yes, unless the model's regions are sums of
        logarithms (``aggregation="sum"``), which are on another scale than its map.
    scalebar
        Whether to draw a scale bar, on the first panel of each row.
    colorbar_loc
        ``"right"``, or None for no colour bars.
    figsize, dpi
        Of a new figure, inches and dots per inch.
    ax
        Axes to draw on, as many as there are panels.
    show
        Show the figure; default: unless `ax` or `return_fig` is given.
    save
        File to write the figure to; its ending says in which format.
    return_fig
        Return the figure, and do not show it.

    Returns
    -------
    Nothing if the figure is shown; the figure with `return_fig`; else the Axes, an array of shape (genes, panels), or a
    single one.

    Raises
    ------
    ElementError
        There is no gene map, its image is gone, or the table cannot be told.
    DataError
        The map lacks a gene, or counts cannot be used.
    PixNetError
        The crop misses the image, or an argument cannot be understood.
    """
    names = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    tree, key = get.gene_map(sdata, names, key_added=key_added), stored_key(sdata, names, key_added)
    note: dict[str, Any] = memory_note(sdata, "maps", key) or {}
    slide = _slide(sdata, note, key)
    view = view_of(slide, crop_um, ax=ax, panel_in=_PANEL_IN, dpi=dpi, save=save)
    asked: Any = _PANELS if panels is None else [panels] if isinstance(panels, str) else panels
    table = _table_to_draw(sdata, slide, table_key) if "measured" in asked else None
    if panels is not None and "measured" in asked and table is None:
        raise ElementError("There is no table with measured expression: leave 'measured' out of panels=.")
    shown = [panel for panel in asked if panel != "measured" or table is not None]
    layers: dict[Panel, _Layer] = {}
    if "predicted" in shown:
        layers["predicted"] = _predicted(tree, sdata.labels.get(f"{key}_tissue"), slide, view, scale, note)
    if "measured" in shown and table is not None:
        layers["measured"] = _measured(sdata, slide, view, table, names, note)
    shared = not _is_sum(note) if shared_limits is None else shared_limits
    bounds = zip(_bounds(vmin, len(names)), _bounds(vmax, len(names)), strict=True)
    norms = [_norms(layers, k, low, high, shared=shared) for k, (low, high) in enumerate(bounds)]
    inches, bar_in = _PANEL_IN / max(view.width, view.height), 0.0 if colorbar_loc is None else _BAR_IN
    panel_in = max(inches * view.width, 1.8) + bar_in, max(inches * view.height, 1.2) + _TITLE_IN
    axes = axes_grid(ax, (len(names), len(shown)), figsize=figsize, panel_in=panel_in, dpi=dpi)
    for k, (gene, row) in enumerate(zip(names, axes, strict=True)):
        coloured: list[tuple[Axes, Any, str]] = []
        for panel_ax, panel in zip(row, shown, strict=True):
            layer = layers.get(panel)
            if layer is None or alpha < 1:
                draw_slide(panel_ax, slide, view)
            if layer is not None:
                artist = layer.draw_gene(panel_ax, k, cmap=cmap, norm=norms[k][panel], alpha=alpha)
                coloured += [] if artist is None else [(panel_ax, artist, layer.units)]
            set_view(panel_ax, view, "H&E" if layer is None else f"{gene}, {layer.name}\n{layer.level(k)}".strip())
        if scalebar:
            add_scale_bar(row[0], view)
        if colorbar_loc is not None:
            _colour_bars(coloured, shared=shared)
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Expression that one kind of panel shows."""

    values: NDArray[np.float32]  # first axis: genes; NaN where there is none
    draw: Callable[..., Any]  # takes Axes, the values of a gene and ``cmap``, ``norm`` and ``alpha``
    name: str
    absent: str  # written in place of a gene without values
    units: str

    def level(self, k: int) -> str:
        """Say the mean of gene k and its range, which tell of levels more than colours do."""
        values = self.values[k][np.isfinite(self.values[k])]
        if not len(values):
            return ""
        return "mean {:.2g}, 1-99 %: {:.2g} to {:.2g}".format(values.mean(), *np.percentile(values, [1, 99]))

    def draw_gene(self, ax: Axes, k: int, **style: Any) -> Any:
        """Draw gene k; returns the artist that has colours, if any."""
        if np.isfinite(self.values[k]).any():
            return self.draw(ax, self.values[k], **style)
        ax.text(0.5, 0.5, self.absent, transform=ax.transAxes, ha="center", va="center", color="grey")
        return None


def _is_log(note: dict[str, Any]) -> bool:
    return note.get("objective", "mse_pcc") == "mse_pcc"


def _is_sum(note: dict[str, Any]) -> bool:
    """Tell whether measured values are sums over the map's pixels, of logarithms."""
    return _is_log(note) and note.get("aggregation") == "sum"


def _units(note: dict[str, Any]) -> str:
    return "log-normalised expression" if _is_log(note) else "counts per µm²"


def _measured(
    sdata: SpatialData, slide: Slide, view: View, table_key: str, genes: Sequence[str], note: dict[str, Any]
) -> _Layer:
    """Read measured expression, as `gene_map` says, in the regions that a view touches; others are not read."""
    (table,) = measured(sdata, slide, table_key=[table_key])
    shown = np.zeros(len(table), bool)
    shown[table.regions.touching(*view.bounds_in(scaled(slide.mpp)))] = True
    table = table.take(shown)
    counts, total = _counts(table, genes)
    if _is_log(note):
        target_sum = float(note.get("target_sum", _TARGET_SUM))
        values = np.where(total > 0, log_normalise(counts, total, target_sum).T, np.nan)
    else:
        values = counts.T / (np.asarray(table.regions.area) * slide.mpp**2)
    values[[gene not in table.var_names and gene != _TOTAL for gene in genes]] = np.nan
    bins = bin_lattice(sdata, table.element_key)
    name = f"measured ({f'{bins.size_um} µm bins' if bins else table.element_key})"

    def draw(ax: Axes, values: NDArray[np.float32], **style: Any) -> Any:
        return draw_regions(ax, table.regions, values, scaled(slide.mpp), view, **style)

    return _Layer(np.asarray(values, np.float32), draw, name, "not measured", _units(note))


def _counts(table: Measured, genes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read counts (n, genes), 0 of genes that are not there, and totals (n,), in the order of the regions."""
    columns = table.var_names.get_indexer(pd.Index(genes))
    counts, total = np.zeros((len(table), len(genes))), np.zeros(len(table))
    known = np.flatnonzero(columns >= 0)
    for place, block, sums in checked_blocks(table.counts, table.var_names, table.what):
        total[place] = sums
        counts[np.ix_(np.arange(len(table))[place], known)] = sparse.csr_matrix(block)[:, columns[known]].toarray()
    counts[:, [gene == _TOTAL for gene in genes]] = total[:, None]
    return counts, total


def _predicted(
    tree: DataTree, tissue: Any, slide: Slide, view: View, scale: str | None, note: dict[str, Any]
) -> _Layer:
    """Read what is shown of a gene map, from the coarsest level that is fine enough, without what lies off tissue.

    `tissue` is the labels element of its tissue (0: none); with None, pixels that are 0 in all channels are off tissue.
    """
    levels = list(get_pyramid_levels(tree))
    to_um = scaled(slide.mpp) @ np.linalg.inv(slide.to_system) @ affine_matrix(tree, slide.coordinate_system)
    pitch = float(np.sqrt(abs(np.linalg.det(to_um[:2, :2]))))
    names = [f"scale{k}" for k in range(len(levels))]
    if scale not in (None, "full", *names):
        raise PixNetError(f"scale={scale!r}: the map has {', '.join(map(repr, names))}; 'full' is the first of them.")
    # the coarsest that is no coarser than the screen, or the finest
    fine_enough = max((k for k in range(len(levels)) if pitch * 2**k <= view.um_per_px * (1 + 1e-3)), default=0)
    k = fine_enough if scale is None else 0 if scale == "full" else names.index(scale)
    from_level = to_um @ scaled(2.0**k)
    rows, cols = view.pixels_in(from_level, levels[k].shape[1:])
    values = _computed(levels[k].data[:, rows, cols]).astype(np.float32, copy=False)
    off = ~values.any(axis=0) if tissue is None else ~_on_tissue(tissue, k, rows, cols)
    draw = partial(draw_raster, to_um=from_level @ scaled(1, cols.start, rows.start))
    units = f"{_units(note)}, share of a pixel" if _is_sum(note) else _units(note)
    return _Layer(np.where(off, np.float32(np.nan), values), draw, "predicted", "no tissue", units)


def _computed(block: Any) -> NDArray[Any]:
    """Compute in threads, never through a distributed client that is open by chance."""
    return np.asarray(block.compute(scheduler="threads") if hasattr(block, "compute") else block)


def _on_tissue(labels: Any, k: int, rows: slice, cols: slice) -> NDArray[np.bool_]:
    """Tell whether the centres of pixels of level k of the map are on tissue, whose levels start at the same pixels."""
    levels = [labels] if isinstance(labels, DataArray) else list(get_pyramid_levels(labels))
    step = 2 ** max(k + 1 - len(levels), 0)  # pixels of the level that is read per pixel of the map's
    centres = tuple(slice(s.start * step + step // 2, s.stop * step, step) for s in (rows, cols))
    mask = _computed(levels[min(k, len(levels) - 1)].data[centres]) > 0
    lacking = [(0, max(s.stop - s.start - n, 0)) for s, n in zip((rows, cols), mask.shape, strict=True)]
    return np.pad(mask, lacking)  # the map may be filled up to whole blocks further out than its tissue


def _slide(sdata: SpatialData, note: dict[str, Any], map_key: str) -> Slide:
    """Open the slide that a map was predicted from, with its image's own pixels; find it anew if nothing is noted."""
    if not note:
        slide = open_slide(sdata)
        return slide.at(slide.mpp)
    image_key = note["image"]
    if image_key not in sdata.images:
        raise ElementError(
            f"Image {image_key!r}, from which {map_key!r} was predicted, is not in this object. Add it, or predict "
            "again from the image that is there."
        )
    system, mpp = _system(sdata, image_key, map_key, note["coordinate_system"]), float(note["mpp"])
    return slide_at(sdata, image_key=image_key, coordinate_system=system, mpp=mpp, working_mpp=mpp)


def _system(sdata: SpatialData, image_key: str, map_key: str, noted: str) -> str:
    """Find the coordinate system of a prediction, or, where it was renamed since, that in which everything meets."""
    systems = [get_transformation(sdata.images[key], get_all=True) for key in (image_key, map_key)]
    common = {*systems[0]} & {*systems[1]}
    if noted in common:
        return noted
    try:
        if not common:
            raise ElementError(f"Image {image_key!r} and {map_key!r} share none.")
        system = select_coordinate_system(sdata, image_key=image_key, region_keys=measured_regions(sdata))
        return system if system in common else min(common)
    except ElementError as error:
        raise ElementError(
            f"Coordinate system {noted!r}, in which {map_key!r} was predicted, is not there any more: {error} Rename "
            "it back with sdata.rename_coordinate_systems, or predict again with overwrite=True and coordinate_system=."
        ) from error


def _table_to_draw(sdata: SpatialData, slide: Slide, table_key: str | None) -> str | None:
    """Choose the table that is named, the coarsest Visium HD bins, or the only table there is; None without any."""
    if table_key is not None:
        return table_key
    where = {"coordinate_system": slide.coordinate_system, "image_key": slide.image_key}
    return select_tables(sdata, **where)[-1] if measured_tables(sdata, **where) else None


def _bounds(bound: Bound | Sequence[Bound], n: int) -> Sequence[Bound]:
    """Return the limit of each of n genes."""
    if bound is None or isinstance(bound, str | int | float):
        return [bound] * n
    if len(bound) != n:
        raise PixNetError(f"vmin or vmax has {len(bound)} limits, and there are {n} genes: give one for each.")
    return bound


def _norms(layers: Mapping[Panel, _Layer], k: int, vmin: Bound, vmax: Bound, *, shared: bool) -> dict[Panel, Normalize]:
    """Make the colour scale of gene k in each panel, as scanpy takes limits.

    Percentiles are taken of each panel, and where panels share a scale the widest limits win.
    """
    if not shared and len(layers) > 1:
        return {panel: _norms({panel: own}, k, vmin, vmax, shared=True)[panel] for panel, own in layers.items()}
    finite = [values for own in layers.values() if len(values := own.values[k][np.isfinite(own.values[k])])]
    low = min((_limit(values, vmin, "p1") for values in finite), default=0.0)
    high = max((_limit(values, vmax, "p99") for values in finite), default=1.0)
    if finite and not low < high and vmax is None:  # all the same: a rare gene, in most bins of which there is nothing
        high = max(float(values.max()) for values in finite)
    return dict.fromkeys(layers, Normalize(low, high if low < high else low + 1.0))


def _limit(values: NDArray[np.floating], bound: Bound, default: str) -> float:
    bound = default if bound is None else bound
    return float(np.percentile(values, float(bound.removeprefix("p"))) if isinstance(bound, str) else bound)


def _colour_bars(coloured: Sequence[tuple[Axes, Any, str]], *, shared: bool) -> None:
    """Add one bar for a row, or one for each panel, given with its artist and what the colours mean."""
    for group in [coloured] if shared and coloured else [[each] for each in coloured]:
        axes, (_, artist, units) = [ax for ax, *_ in group], group[-1]
        bar = figure_of(axes[0]).colorbar(artist, ax=axes, location="right", shrink=0.9, pad=0.02)
        bar.set_label(units, size="small")
        bar.ax.tick_params(labelsize="small")
        if bar.solids is not None:
            bar.solids.set_alpha(1)
