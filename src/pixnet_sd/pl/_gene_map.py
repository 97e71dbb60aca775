"""H&E, measured and predicted expression side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from pixnet_sd import get
from pixnet_sd._arguments import checked
from pixnet_sd._errors import ElementError, PixNetError
from pixnet_sd.get._gene_map import stored_key
from pixnet_sd.slide import (
    ImagePyramid,
    Slide,
    affine_matrix,
    measured_regions,
    open_slide,
    select_coordinate_system,
)
from pixnet_sd.store import recorded

from ._draw import add_scale_bar, draw_raster, draw_regions, draw_slide, set_view
from ._limits import Bound, colour_norm
from ._measured import MeasuredView, measured_view, table_to_draw
from ._output import AxesLike, Drawn, Panels, axes_grid, figure_of, finish, resolution, shown_px
from ._raster import Raster, read_map
from ._view import View, view_of

__all__ = ["gene_map"]

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
