"""Which part of a slide is drawn, and how finely.

Artists on axes in µm: the slide, rasters under any affine map, regions, a scale bar.

Figures: made or taken from the caller, then saved, shown or returned in scanpy's way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D
from matplotlib_scalebar.scalebar import ScaleBar
from numpy.typing import ArrayLike, NDArray

from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Circles, Lattice, Regions, ranges
from pixnet_sd.slide import Slide, read_picture

__all__ = [
    "AxesLike",
    "Drawn",
    "Panels",
    "View",
    "add_scale_bar",
    "axes_grid",
    "coarsest_level",
    "draw_raster",
    "draw_regions",
    "draw_slide",
    "figure_of",
    "finish",
    "resolution",
    "set_view",
    "shifted",
    "shown_px",
    "view_of",
]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """A box of a slide, in µm from the image's top left corner, x to the right and y down.

    Attributes
    ----------
    x0, y0, x1, y1
        The box.
    um_per_px
        What a pixel of the screen spans; nothing finer is worth reading.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    um_per_px: float

    @property
    def width(self) -> float:
        """µm."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """µm."""
        return self.y1 - self.y0

    def bounds_in(self, to_um: ArrayLike) -> tuple[float, float, float, float]:
        """Box around the view in other coordinates: x0, y0, x1, y1.

        Parameters
        ----------
        to_um
            Map of (x, y, 1) from these to µm, shape (3, 3).
        """
        corners = np.array([[self.x0, self.x1, self.x1, self.x0], [self.y0, self.y0, self.y1, self.y1], [1.0] * 4])
        x, y, _ = np.linalg.inv(np.asarray(to_um, np.float64)) @ corners
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    def pixels_in(self, to_um: ArrayLike, shape: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a raster of some shape that the view touches; `to_um` as in `bounds_in`."""
        x0, y0, x1, y1 = self.bounds_in(to_um)
        rows, cols = (
            slice(min(max(math.floor(low + 1e-6), 0), size), max(min(math.ceil(high - 1e-6), size), 0))
            for low, high, size in ((y0, y1, shape[0]), (x0, x1, shape[1]))
        )
        return rows, cols


def view_of(slide: Slide, crop_um: Sequence[float] | None, shown_px: float, *, what: str = "the slide image") -> View:
    """The part of a slide that is asked for, clipped to the image.

    Parameters
    ----------
    slide
        The slide.
    crop_um
        x0, y0, x1, y1 in µm from the image's top left corner; None: all of it.
    shown_px
        Screen pixels along the longer side.
    what
        Name of the image, for messages.

    Raises
    ------
    PixNetError
        The crop misses the image.
    """
    width, height = slide.width_px * slide.mpp, slide.height_px * slide.mpp
    x0, y0, x1, y1 = (0.0, 0.0, width, height) if crop_um is None else crop_um
    left, top, right, bottom = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    if left >= right or top >= bottom:
        raise PixNetError(
            f"crop_um={tuple(crop_um or ())} misses {what}, which spans x 0 to {width:g} and y 0 to {height:g} µm."
        )
    return View(left, top, right, bottom, max(right - left, bottom - top) / shown_px)


def coarsest_level(pitches_um: Sequence[float], um_per_px: float) -> int:
    """Of levels, finest first, the coarsest that is no coarser than the screen; the finest if all are."""
    fine_enough = [k for k, pitch in enumerate(pitches_um) if pitch <= um_per_px * (1 + 1e-3)]
    return fine_enough[-1] if fine_enough else 0


def shifted(x: float, y: float) -> Matrix:
    """Map of (x, y, 1) that moves points."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


_BAR_SHARE = 0.25


def draw_slide(ax: Axes, slide: Slide, view: View) -> AxesImage:
    """The H&E image, read at the resolution of the screen, or its own where that is coarser."""
    coarse = slide.at(max(view.um_per_px, slide.mpp))
    to_um = np.diag([coarse.working_mpp, coarse.working_mpp, 1.0])
    rows, cols = view.pixels_in(to_um, coarse.working_shape)
    picture = read_picture(coarse, rows.start, rows.stop, cols.start, cols.stop)
    return draw_raster(ax, picture, to_um @ shifted(cols.start, rows.start), interpolation="antialiased")


def draw_raster(ax: Axes, values: NDArray[Any], to_um: NDArray[np.float64], **style: Any) -> AxesImage:
    """An image whose pixels lie on the slide under an affine map.

    Parameters
    ----------
    ax
        Axes in µm.
    values
        (rows, columns) or (rows, columns, 3); NaN is left out.
    to_um
        Map of (x, y, 1) from its pixels to µm, shape (3, 3).
    style
        For `Axes.imshow`.
    """
    height, width = values.shape[:2]
    style = {"interpolation": "nearest", "origin": "upper"} | style
    place = Affine2D(to_um) + ax.transData
    return ax.imshow(values, extent=(0, width, height, 0), transform=place, aspect="equal", **style)


def draw_regions(
    ax: Axes,
    regions: Regions,
    values: NDArray[np.floating],
    to_um: NDArray[np.float64],
    view: View,
    *,
    cmap: str | Colormap,
    norm: Normalize,
    alpha: float = 1.0,
) -> AxesImage | EllipseCollection:
    """Regions in the colours of their values: bins of a lattice as an image, circles as circles, others as pixels.

    Parameters
    ----------
    ax
        Axes in µm.
    regions
        n regions.
    values
        Shape (n,); NaN is left out.
    to_um
        Map of (x, y, 1) from the regions' pixels to µm, shape (3, 3).
    view
        What is shown.
    cmap, norm, alpha
        Colours.
    """
    style: dict[str, Any] = {"cmap": cmap, "norm": norm, "alpha": alpha}
    if isinstance(regions, Lattice) and regions.radius is None:
        image, matrix = _lattice_image(regions, values, to_um, view)
        return draw_raster(ax, image, matrix, **style)
    plain = regions.plain() if isinstance(regions, Lattice) else regions
    if isinstance(plain, Circles):
        return _draw_circles(ax, plain.transform(to_um), values, **style)
    image, matrix = _pixels(plain, values, to_um, view)
    return draw_raster(ax, image, matrix, **style)


def _lattice_image(
    lattice: Lattice, values: NDArray[np.floating], to_um: NDArray[np.float64], view: View
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """One pixel a bin, or a square of bins where these are finer than the screen, and its map to µm."""
    if not len(lattice):
        return np.full((1, 1), np.nan, np.float32), np.asarray(to_um)
    row0, col0 = int(lattice.row.min()), int(lattice.col.min())
    pitch_um = lattice.pitch * math.sqrt(abs(np.linalg.det(to_um[:2, :2])))
    side = max(1, int(view.um_per_px / pitch_um + 1e-6))
    row, col = (lattice.row - row0) // side, (lattice.col - col0) // side
    shape = (int(row.max()) + 1, int(col.max()) + 1)
    image = _means(row.astype(np.int64) * shape[1] + col, values, shape)
    return image, to_um @ lattice.to_grid @ shifted(col0, row0) @ np.diag([side, side, 1.0])


def _means(flat: NDArray[np.int64], values: NDArray[np.floating], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Mean of the finite values that fall on each pixel; NaN where none does."""
    finite = np.isfinite(values)
    n, size = np.bincount(flat[finite], minlength=shape[0] * shape[1]), shape[0] * shape[1]
    total = np.bincount(flat[finite], values[finite], size)
    return np.divide(total, n, out=np.full(size, np.nan), where=n > 0).reshape(shape).astype(np.float32)


def _draw_circles(ax: Axes, circles: Circles, values: NDArray[np.floating], **style: Any) -> EllipseCollection:
    keep = np.isfinite(values)
    diameter = 2 * circles.radius[keep]
    drawn = EllipseCollection(
        diameter,
        diameter,
        np.zeros(len(diameter)),
        units="xy",
        offsets=circles.centre_xy[keep],
        offset_transform=ax.transData,
        array=np.asarray(values[keep], np.float64),
        linewidths=0,
        **style,
    )
    ax.add_collection(drawn, autolim=False)
    return drawn


def _pixels(
    regions: Regions, values: NDArray[np.floating], to_um: NDArray[np.float64], view: View
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Outlines filled on the pixels of the screen, and the map of these to µm."""
    pixel_um = np.diag([view.um_per_px, view.um_per_px, 1.0])
    pixel_um[:2, 2] = view.x0, view.y0
    height, width = (math.ceil(side / view.um_per_px - 1e-6) for side in (view.height, view.width))
    spans = regions.transform(np.linalg.inv(pixel_um) @ to_um).spans(0, height, 0, width)
    pixel, run = ranges(spans.row * width + spans.start, spans.stop - spans.start)
    image = np.full(height * width, np.nan, np.float32)
    image[pixel] = values[spans.region[run]]
    return image.reshape(height, width), pixel_um


def set_view(ax: Axes, view: View, title: str = "") -> None:
    """Show the view and nothing else, y down."""
    ax.set(xlim=(view.x0, view.x1), ylim=(view.y1, view.y0), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title)
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)


def add_scale_bar(ax: Axes, view: View) -> ScaleBar:
    """A bar of 1, 2 or 5 times a power of ten µm, at most a quarter of the view."""
    bar = ScaleBar(
        1,
        "um",
        fixed_value=_nice_length(_BAR_SHARE * view.width),
        fixed_units="um",
        location="lower left",
        border_pad=0.6,
        box_alpha=0.75,
        width_fraction=0.012,
        font_properties={"size": "small"},
    )
    ax.add_artist(bar)
    return bar


def _nice_length(most: float) -> float:
    power = 10.0 ** math.floor(math.log10(most))
    length = next(factor for factor in (5, 2, 1) if factor * power <= most * (1 + 1e-9)) * power
    return int(length) if length >= 1 else length


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
