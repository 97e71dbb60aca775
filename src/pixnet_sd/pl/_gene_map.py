"""Colour limits, as scanpy takes them: numbers, or percentiles of what is drawn.

Measured expression as it is compared with a gene map: regions of a view, and their values.

Part of a gene map in memory: the pixels that a view shows, from the level that suits it.

H&E, measured and predicted expression side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from pixnet_sd.errors import ElementError, PixNetError
from pixnet_sd.geometry import Regions
from pixnet_sd.get import stored_key
from pixnet_sd.slide import Slide, open_slide, select_coordinate_system
from pixnet_sd.slide.elements import affine_matrix, bin_lattice
from pixnet_sd.slide.image import ImagePyramid
from pixnet_sd.slide.tables import (
    Measured,
    checked_blocks,
    log_normalise,
    measured,
    measured_regions,
    measured_tables,
    select_tables,
)
from pixnet_sd.store import recorded

from ._draw import (
    AxesLike,
    Drawn,
    Panels,
    View,
    add_scale_bar,
    axes_grid,
    coarsest_level,
    draw_raster,
    draw_regions,
    draw_slide,
    figure_of,
    finish,
    resolution,
    set_view,
    shifted,
    shown_px,
    view_of,
)

__all__ = ["Bound", "MeasuredView", "Raster", "colour_norm", "gene_map", "measured_view", "read_map", "table_to_draw"]

Bound = float | str | None
"""A number, a percentile such as ``"p99"``, or None for the default percentile."""


def colour_norm(panels: Sequence[NDArray[np.floating]], vmin: Bound, vmax: Bound) -> Normalize:
    """One scale for some panels: percentiles are taken of each, and the widest limits win.

    Parameters
    ----------
    panels
        Values; those that are not finite do not count.
    vmin, vmax
        Limits; None is ``"p1"`` and ``"p99"``.
    """
    finite = [values for panel in panels if len(values := panel[np.isfinite(panel)])]
    low = min((_limit(values, vmin, "p1") for values in finite), default=0.0)
    high = max((_limit(values, vmax, "p99") for values in finite), default=1.0)
    if finite and not low < high and vmax is None:  # all the same: a rare gene, in most bins of which there is nothing
        high = max(float(values.max()) for values in finite)
    return Normalize(low, high if low < high else low + 1.0)


def _limit(values: NDArray[np.floating], bound: Bound, default: str) -> float:
    bound = default if bound is None else bound
    if not isinstance(bound, str):
        return float(bound)
    return float(np.percentile(values, float(bound.removeprefix("p"))))


TOTAL = "total_counts"


@dataclass(frozen=True, eq=False)
class MeasuredView:
    """Regions that a view shows.

    Attributes
    ----------
    regions
        n regions, px of the image.
    values
        Shape (genes, n); NaN where a gene was not measured, or a region has no counts to normalise.
    what
        What the regions are, for a title.
    """

    regions: Regions
    values: NDArray[np.float32]
    what: str


def table_to_draw(sdata: SpatialData, slide: Slide, table_key: str | None) -> str | None:
    """The table that is named, the coarsest Visium HD bins, or the only table there is; None if there is none.

    Raises
    ------
    ElementError
        Several tables could be meant.
    """
    if table_key is not None:
        return table_key
    where = {"coordinate_system": slide.coordinate_system, "image_key": slide.image_key}
    return select_tables(sdata, **where)[-1] if measured_tables(sdata, **where) else None


def measured_view(
    sdata: SpatialData, slide: Slide, view: View, *, table_key: str, genes: Sequence[str], target_sum: float | None
) -> MeasuredView:
    """Measured expression in the regions that a view touches; counts of others are not read.

    Parameters
    ----------
    sdata
        The object.
    slide
        The slide, with the image's own pixels as working pixels.
    view
        What is shown.
    table_key
        Table with raw counts.
    genes
        Genes; ``total_counts`` is the sum over all of them.
    target_sum
        Values are ``log1p(target_sum * x / sum(x))``; None: counts per µm².

    Raises
    ------
    ElementError, DataError
        The table, its regions or its counts cannot be used.
    """
    (found,) = measured(sdata, slide, table_key=[table_key])
    shown = np.zeros(len(found), bool)
    shown[found.regions.touching(*view.bounds_in(np.diag([slide.mpp, slide.mpp, 1.0])))] = True
    found = found.take(shown)
    counts, total = _counts(found, genes)
    if target_sum is None:
        values = counts.T / (np.asarray(found.regions.area) * slide.mpp**2)
    else:
        values = np.where(total > 0, log_normalise(counts, total, target_sum).T, np.nan)
    values[[gene not in found.var_names and gene != TOTAL for gene in genes]] = np.nan
    bins = bin_lattice(sdata, found.element_key)
    what = f"{bins.size_um} µm bins" if bins else found.element_key
    return MeasuredView(found.regions, np.asarray(values, np.float32), what)


def _counts(found: Measured, genes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts (n, genes), 0 of genes that are not there, and totals (n,), in the order of the regions."""
    columns = found.var_names.get_indexer(pd.Index(genes))
    counts, total = np.zeros((len(found), len(genes))), np.zeros(len(found))
    known = np.flatnonzero(columns >= 0)
    for place, block, sums in checked_blocks(found.counts, found.var_names, found.what):
        total[place] = sums
        counts[np.ix_(np.arange(len(found))[place], known)] = sparse.csr_matrix(block)[:, columns[known]].toarray()
    counts[:, [gene == TOTAL for gene in genes]] = total[:, None]
    return counts, total


@dataclass(frozen=True, eq=False)
class Raster:
    """Pixels and where they are.

    Attributes
    ----------
    values
        (channels, rows, columns) float32; NaN where there is nothing.
    to_um
        Map of (x, y, 1) from pixels of `values` to µm, shape (3, 3).
    """

    values: NDArray[np.float32]
    to_um: NDArray[np.float64]


def read_map(tree: DataTree, tissue: Any, slide: Slide, view: View, *, scale: str | None = None) -> Raster:
    """Read what is shown of a gene map, without what lies off tissue.

    Parameters
    ----------
    tree
        Multiscale image, as `get.gene_map` gives it.
    tissue
        Labels element of its tissue (0: none); None: pixels that are 0 in all channels are off tissue.
    slide
        The slide that the map lies on.
    view
        What is shown.
    scale
        Level, ``"scale0"`` or ``"full"`` for the finest; default: the coarsest that is fine enough.

    Raises
    ------
    PixNetError
        There is no such level.
    """
    levels = list(get_pyramid_levels(tree))
    to_um = _um_from_image(slide) @ np.linalg.inv(slide.to_system) @ affine_matrix(tree, slide.coordinate_system)
    pitch = float(np.sqrt(abs(np.linalg.det(to_um[:2, :2]))))
    ratios = [_ratio(levels[0], level) for level in levels]
    k = coarsest_level([pitch * max(r) for r in ratios], view.um_per_px) if scale is None else _named(scale, levels)
    level, ratio = levels[k], ratios[k]
    from_level = to_um @ np.diag([ratio[1], ratio[0], 1.0])
    rows, cols = view.pixels_in(from_level, level.shape[1:])
    values = np.asarray(_computed(level.data[:, rows, cols]), dtype=np.float32)
    off = ~values.any(axis=0) if tissue is None else ~_tissue(tissue, ratio, rows, cols)
    return Raster(np.where(off, np.float32(np.nan), values), from_level @ shifted(cols.start, rows.start))


def _um_from_image(slide: Slide) -> NDArray[np.float64]:
    return np.diag([slide.mpp, slide.mpp, 1.0])


def _ratio(finest: DataArray, level: DataArray) -> tuple[float, float]:
    """Pixels of the finest level per pixel of another, (y, x)."""
    return finest.sizes["y"] / level.sizes["y"], finest.sizes["x"] / level.sizes["x"]


def _named(scale: str, levels: list[DataArray]) -> int:
    names = [f"scale{k}" for k in range(len(levels))]
    if scale == "full":
        return 0
    if scale not in names:
        raise PixNetError(f"scale={scale!r}: the map has {', '.join(map(repr, names))}; 'full' is the first of them.")
    return names.index(scale)


def _computed(block: Any) -> Any:
    """In threads, never through a distributed client that is open by chance."""
    return block.compute(scheduler="threads") if hasattr(block, "compute") else block


def _tissue(labels: Any, ratio: tuple[float, float], rows: slice, cols: slice) -> NDArray[np.bool_]:
    """Whether the centres of some pixels of a level of the map are on tissue."""
    levels = [labels] if isinstance(labels, DataArray) else list(get_pyramid_levels(labels))
    own = [_ratio(levels[0], level) for level in levels]
    k = coarsest_level([max(r) for r in own], max(ratio))
    row, col = (
        np.clip(((np.arange(s.start, s.stop) + 0.5) * r / mine).astype(np.int64), 0, size - 1)
        for s, r, mine, size in zip((rows, cols), ratio, own[k], levels[k].shape, strict=True)
    )
    if not len(row) or not len(col):
        return np.zeros((len(row), len(col)), bool)
    block = np.asarray(_computed(levels[k].data[row[0] : row[-1] + 1, col[0] : col[-1] + 1]))
    return block[np.ix_(row - row[0], col - col[0])] > 0


Panel = Literal["image", "measured", "predicted"]

_PANELS: tuple[Panel, ...] = ("image", "measured", "predicted")
_PANEL_IN = 3.6
_TITLE_IN = 0.35
_BAR_IN = 0.3
_TARGET_SUM = 1e4


@checked()
def gene_map(
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
    """Draw the H&E image, measured and predicted expression side by side, one row a gene.

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
    note: dict[str, Any] = recorded(sdata, "maps", key) or {}
    slide = _slide(sdata, note, key)
    view = view_of(slide, crop_um, shown_px(ax, _PANEL_IN, resolution(dpi, save)))
    table = table_to_draw(sdata, slide, table_key) if panels is None or "measured" in panels else None
    shown = _panels(panels, table)
    source = _Source(slide, view, alpha, cmap)
    if "predicted" in shown:
        tissue = sdata.labels.get(f"{key}_tissue")
        source.predicted = read_map(tree, tissue, slide, view, scale=scale)
    if table is not None and "measured" in shown:
        target_sum = float(note.get("target_sum", _TARGET_SUM)) if _is_log(note) else None
        source.measured = measured_view(sdata, slide, view, table_key=table, genes=names, target_sum=target_sum)
    shared = not _is_sum(note) if shared_limits is None else shared_limits
    limits = [(_bound(vmin, k, len(names)), _bound(vmax, k, len(names))) for k in range(len(names))]
    norms = [source.norms(shown, k, *both, shared=shared) for k, both in enumerate(limits)]
    axes = axes_grid(ax, (len(names), len(shown)), figsize=figsize, panel_in=_panel_in(view, colorbar_loc), dpi=dpi)
    for k, (gene, row) in enumerate(zip(names, axes, strict=True)):
        drawn = source.draw(row, shown, gene, k, norms[k])
        if scalebar:
            add_scale_bar(row[0], view)
        if colorbar_loc is not None:
            _colour_bars(drawn, shared, _units(note))
    return finish(axes, is_new=ax is None, show=show, save=save, return_fig=return_fig)


class Coloured(NamedTuple):
    """A panel with colours, and the artist that has them."""

    panel: Panel
    ax: Axes
    artist: Any


@dataclass
class _Source:
    """What is drawn, and how."""

    slide: Slide
    view: View
    alpha: float
    cmap: str | Colormap
    predicted: Raster | None = None
    measured: MeasuredView | None = None

    def norms(
        self, shown: Sequence[Panel], k: int, vmin: Bound, vmax: Bound, *, shared: bool
    ) -> dict[Panel, Normalize]:
        """Colour limits of gene k in each panel."""
        values = {panel: self._values(panel, k) for panel in shown if panel != "image"}
        if shared:
            return dict.fromkeys(values, colour_norm(list(values.values()), vmin, vmax))
        return {panel: colour_norm([each], vmin, vmax) for panel, each in values.items()}

    def draw(
        self, row: Panels, shown: Sequence[Panel], gene: str, k: int, norms: dict[Panel, Normalize]
    ) -> list[Coloured]:
        """Draw gene k's panels; returns those with colours, and what is coloured."""
        drawn: list[Coloured] = []
        for ax, panel in zip(row, shown, strict=True):
            if panel == "image" or self.alpha < 1:
                draw_slide(ax, self.slide, self.view)
            if panel != "image":
                artist = self._draw_values(ax, panel, self._values(panel, k), norms[panel])
                drawn += [] if artist is None else [Coloured(panel, ax, artist)]
            set_view(ax, self.view, self._title(panel, gene))
        return drawn

    def _values(self, panel: Panel, k: int) -> NDArray[np.float32]:
        source = self.predicted if panel == "predicted" else self.measured
        return np.empty(0, np.float32) if source is None else source.values[k]

    def _draw_values(self, ax: Axes, panel: Panel, values: NDArray[np.float32], norm: Normalize) -> Any:
        style: dict[str, Any] = {"cmap": self.cmap, "norm": norm, "alpha": self.alpha}
        if not np.isfinite(values).any():
            where = "not measured" if panel == "measured" else "no tissue"
            ax.text(0.5, 0.5, where, transform=ax.transAxes, ha="center", va="center", color="grey")
            return None
        if panel == "predicted" and self.predicted is not None:
            return draw_raster(ax, values, self.predicted.to_um, **style)
        assert self.measured is not None
        to_um = np.diag([self.slide.mpp, self.slide.mpp, 1.0])
        return draw_regions(ax, self.measured.regions, values, to_um, self.view, **style)

    def _title(self, panel: Panel, gene: str) -> str:
        if panel == "measured" and self.measured is not None:
            return f"{gene}, measured ({self.measured.what})"
        return "H&E" if panel == "image" else f"{gene}, predicted"


def _slide(sdata: SpatialData, note: dict[str, Any], map_key: str) -> Slide:
    """The slide that a map was predicted from, with its image's own pixels; found anew if nothing is noted."""
    if not note:
        slide = open_slide(sdata)
        return replace(slide, working_mpp=slide.mpp)
    image_key = note["image"]
    if image_key not in sdata.images:
        raise ElementError(
            f"Image {image_key!r}, from which {map_key!r} was predicted, is not in this object. Add it, or predict "
            "again from the image that is there."
        )
    system = _system(sdata, image_key, map_key, note["coordinate_system"])
    pyramid = ImagePyramid.of(sdata.images[image_key], image_key)
    return Slide(
        name="",
        image_key=image_key,
        coordinate_system=system,
        mpp=float(note["mpp"]),
        mpp_rule=str(note.get("mpp_rule", "")),
        working_mpp=float(note["mpp"]),
        height_px=pyramid.shape[0],
        width_px=pyramid.shape[1],
        to_system=affine_matrix(sdata.images[image_key], system),
        pyramid=pyramid,
    )


def _system(sdata: SpatialData, image_key: str, map_key: str, noted: str) -> str:
    """The coordinate system of a prediction, or, where it was renamed since, the one in which everything meets."""
    shared = [
        {*get_transformation(sdata.images[key], get_all=True)} for key in (image_key, map_key) if key in sdata.images
    ]
    there = set.intersection(*shared)
    if noted in there:
        return noted
    try:
        if not there:
            raise ElementError(f"Image {image_key!r} and {map_key!r} share none.")
        found = select_coordinate_system(sdata, image_key=image_key, region_keys=measured_regions(sdata))
        return found if found in there else min(there)
    except ElementError as error:
        raise ElementError(
            f"Coordinate system {noted!r}, in which {map_key!r} was predicted, is not there any more: {error} Rename "
            "it back with sdata.rename_coordinate_systems, or predict again with overwrite=True and coordinate_system=."
        ) from error


def _panels(panels: Sequence[Panel] | None, table: str | None) -> list[Panel]:
    if panels is None:
        return [panel for panel in _PANELS if panel != "measured" or table is not None]
    wanted: list[Panel] = [panels] if isinstance(panels, str) else list(panels)  # type: ignore[list-item]
    if "measured" in wanted and table is None:
        raise ElementError("There is no table with measured expression: leave 'measured' out of panels=.")
    return wanted


def _bound(bound: Bound | Sequence[Bound], k: int, n: int) -> Bound:
    """The limit of gene k."""
    if bound is None or isinstance(bound, str | int | float):
        return bound
    if len(bound) != n:
        raise PixNetError(f"vmin or vmax has {len(bound)} limits, and there are {n} genes: give one for each.")
    return bound[k]


def _panel_in(view: View, colorbar_loc: str | None) -> tuple[float, float]:
    """Width and height of a panel, inches, with its share of colour bar and title."""
    longer = max(view.width, view.height)
    bar = _BAR_IN if colorbar_loc is not None else 0.0
    return max(_PANEL_IN * view.width / longer, 1.8) + bar, max(_PANEL_IN * view.height / longer, 1.2) + _TITLE_IN


def _is_log(note: dict[str, Any]) -> bool:
    return note.get("objective", "mse_pcc") == "mse_pcc"


def _is_sum(note: dict[str, Any]) -> bool:
    """Whether what was measured is a sum over the map's pixels, of logarithms."""
    return _is_log(note) and note.get("aggregation") == "sum"


def _units(note: dict[str, Any]) -> dict[str, str]:
    """What colours mean, by panel."""
    measured = "log-normalised expression" if _is_log(note) else "counts per µm²"
    return {"measured": measured, "predicted": f"{measured}, share of a pixel" if _is_sum(note) else measured}


def _colour_bars(drawn: Sequence[Coloured], shared: bool, units: dict[str, str]) -> None:
    """One bar for a row, or one for each panel."""
    groups = [drawn] if shared and drawn else [[each] for each in drawn]
    for group in groups:
        axes = [each.ax for each in group]
        bar = figure_of(axes[0]).colorbar(group[-1].artist, ax=axes, location="right", shrink=0.9, pad=0.02)
        bar.set_label(units[group[-1].panel], size="small")
        bar.ax.tick_params(labelsize="small")
        if bar.solids is not None:
            bar.solids.set_alpha(1)
