"""What all plots share: figures, views of a slide in µm, and artists on axes in µm.

Figures are made or taken from the caller, then saved, shown or returned in scanpy's way.
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
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D
from matplotlib_scalebar.scalebar import ScaleBar
from numpy.typing import NDArray

from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Circles, Float, Lattice, Regions, ranges
from pixnet_sd.slide import Slide, read_picture

Panels = np.ndarray[Any, Any]  # Axes, in rows and columns
AxesLike = Axes | Sequence[Axes] | Panels | None  # what ``ax=`` takes: one Axes, or as many as there are panels
Drawn = Figure | Axes | Panels | None  # what a plot returns
Size = tuple[float, float]  # width and height, inches

_MOST_PX = 2**16  # of a side of the raster that matplotlib draws on


def axes_grid(
    ax: AxesLike, shape: tuple[int, int], *, figsize: Size | None, panel_in: Size, dpi: float | None
) -> Panels:
    """Arrange the caller's Axes, or those of a new figure of panels of `panel_in` inches, in rows and columns."""
    if ax is None:
        size = figsize or (shape[1] * panel_in[0], shape[0] * panel_in[1])
        given = float(plt.rcParams["figure.dpi"]) if dpi is None else dpi
        if max(size) * given >= _MOST_PX:
            raise PixNetError(
                f"figsize=({size[0]:g}, {size[1]:g}) at dpi={given:g}: a side would have {max(size) * given:,.0f} "
                f"pixels, and {_MOST_PX:,} is the most. Give a smaller one, or fewer panels."
            )
        figure = plt.figure(figsize=size, dpi=dpi, layout="constrained")
        return np.asarray(figure.subplots(*shape, squeeze=False), dtype=object)
    axes = np.asarray(ax, dtype=object)
    if axes.size != shape[0] * shape[1]:
        raise PixNetError(
            f"ax= has {axes.size} Axes, and {shape[0] * shape[1]} panels are drawn ({shape[0]} x {shape[1]}). Give "
            "as many, or leave ax= out."
        )
    return axes.reshape(shape)


def figure_of(ax: Axes) -> Figure:
    """Return the figure that a panel is in, the outermost of nested ones."""
    figure: Any = ax.get_figure(root=True)
    return figure


def finish(axes: Panels, *, is_new: bool, show: bool | None, save: str | Path | None, return_fig: bool) -> Drawn:
    """Save, show and return, as `pl.gene_map` says; only a figure that is new is shown unasked."""
    figure = figure_of(axes.flat[0])
    if save is not None:
        figure.savefig(save)  # the layout leaves no margin to cut off
    if return_fig:
        return figure
    if show or (show is None and is_new):
        plt.show()
        return None
    return axes.flat[0] if axes.size == 1 else axes


@dataclass(frozen=True)
class View:
    """A box of a slide, in µm from the image's top left corner, x to the right and y down.

    `um_per_px` is what a pixel of the screen spans; nothing finer is worth reading.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    um_per_px: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    def bounds_in(self, to_um: Float) -> tuple[float, float, float, float]:
        """Return x0, y0, x1, y1 around the view in coordinates (x, y, 1) that a 3 × 3 matrix maps to µm."""
        corners = np.array([[self.x0, self.x1, self.x1, self.x0], [self.y0, self.y0, self.y1, self.y1], [1.0] * 4])
        x, y, _ = np.linalg.inv(to_um) @ corners
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    def pixels_in(self, to_um: Float, shape: tuple[int, int]) -> tuple[slice, slice]:
        """Return rows and columns of a raster of some shape that the view touches; `to_um` as in `bounds_in`."""
        x0, y0, x1, y1 = self.bounds_in(to_um)
        rows, cols = (
            slice(min(max(math.floor(low + 1e-6), 0), size), max(min(math.ceil(high - 1e-6), size), 0))
            for low, high, size in ((y0, y1, shape[0]), (x0, x1, shape[1]))
        )
        return rows, cols


def view_of(
    slide: Slide, crop_um: Sequence[float] | None, *, ax: AxesLike, panel_in: float, dpi: float | None, save: Any
) -> View:
    """Clip what is asked for, x0, y0, x1, y1 in µm or all, to the slide's image, in the pixels of its panel.

    A panel of a new figure has `panel_in` inches along its longer side, at the resolution of the file if one is made.
    """
    width, height = slide.width_px * slide.mpp, slide.height_px * slide.mpp
    x0, y0, x1, y1 = (0.0, 0.0, width, height) if crop_um is None else crop_um
    left, top, right, bottom = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    if left >= right or top >= bottom:
        raise PixNetError(
            f"crop_um={tuple(crop_um or ())} misses the slide image, which spans x 0 to {width:g} and y 0 to "
            f"{height:g} µm."
        )
    if ax is None:
        on_file: Any = plt.rcParams["savefig.dpi"]
        resolutions = [float(plt.rcParams["figure.dpi"]), *([] if save is None or on_file == "figure" else [on_file])]
        shown_px = panel_in * (max(resolutions) if dpi is None else dpi)
    else:
        box = np.asarray(ax, dtype=object).flat[0].get_window_extent()
        shown_px = float(max(box.width, box.height, 1.0))
    return View(left, top, right, bottom, max(right - left, bottom - top) / shown_px)


def scaled(factor: float, x: float = 0.0, y: float = 0.0) -> Float:
    """Make the map of (x, y, 1) that scales points, then moves them."""
    return np.array([[factor, 0.0, x], [0.0, factor, y], [0.0, 0.0, 1.0]])


def set_view(ax: Axes, view: View, title: str = "") -> None:
    """Show the view and nothing else, y down."""
    ax.set(xlim=(view.x0, view.x1), ylim=(view.y1, view.y0), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title)
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)


def add_scale_bar(ax: Axes, view: View) -> None:
    """Add a bar of 1, 2 or 5 times a power of ten µm, at most a quarter of the view."""
    most = view.width / 4
    power = 10.0 ** math.floor(math.log10(most))
    length = next(factor for factor in (5, 2, 1) if factor * power <= most * (1 + 1e-9)) * power
    style = {"location": "lower left", "border_pad": 0.6, "box_alpha": 0.75, "width_fraction": 0.012}
    length = int(length) if length >= 1 else length
    ax.add_artist(ScaleBar(1, "um", fixed_value=length, fixed_units="um", font_properties={"size": "small"}, **style))


def draw_slide(ax: Axes, slide: Slide, view: View) -> AxesImage:
    """Draw the H&E image, read at the resolution of the screen, or its own where that is coarser."""
    coarse = slide.at(max(view.um_per_px, slide.mpp))
    to_um = scaled(coarse.working_mpp)
    rows, cols = view.pixels_in(to_um, coarse.working_shape)
    picture = read_picture(coarse, rows.start, rows.stop, cols.start, cols.stop)
    return draw_raster(ax, picture, to_um @ scaled(1, cols.start, rows.start), interpolation="antialiased")


def draw_raster(ax: Axes, values: NDArray[Any], to_um: Float, **style: Any) -> AxesImage:
    """Draw an image, (rows, columns) or (rows, columns, 3), whose pixels a 3 × 3 matrix maps to µm; NaN is left out."""
    height, width = values.shape[:2]
    style = {"interpolation": "nearest", "origin": "upper"} | style
    place = Affine2D(to_um) + ax.transData
    return ax.imshow(values, extent=(0, width, height, 0), transform=place, aspect="equal", **style)


def draw_regions(
    ax: Axes, regions: Regions, values: NDArray[np.floating], to_um: Float, view: View, **style: Any
) -> AxesImage | EllipseCollection:
    """Draw regions in the colours of their values: bins of a lattice as an image, circles as circles, others as pixels.

    A 3 × 3 matrix maps the regions' pixels to µm; NaN is left out; `style` has ``cmap``, ``norm`` and ``alpha``.
    """
    if isinstance(regions, Lattice) and regions.radius is None:
        return draw_raster(ax, *_lattice_image(regions, values, to_um, view), **style)
    plain = regions.plain() if isinstance(regions, Lattice) else regions
    if not isinstance(plain, Circles):
        return draw_raster(ax, *_filled(plain, values, to_um, view), **style)
    keep, circles = np.isfinite(values), plain.transform(to_um)
    diameter, centre_xy = 2 * circles.radius[keep], circles.centre_xy[keep]
    style |= {"array": np.asarray(values[keep], np.float64), "linewidths": 0, "offset_transform": ax.transData}
    drawn = EllipseCollection(diameter, diameter, np.zeros(len(diameter)), units="xy", offsets=centre_xy, **style)
    ax.add_collection(drawn, autolim=False)
    return drawn


def _lattice_image(
    lattice: Lattice, values: NDArray[np.floating], to_um: Float, view: View
) -> tuple[NDArray[np.float32], Float]:
    """Make one pixel a bin, the mean of a square of bins where these are finer than the screen, and its map to µm."""
    if not len(lattice):
        return np.full((1, 1), np.nan, np.float32), to_um
    row0, col0 = int(lattice.row.min()), int(lattice.col.min())
    pitch_um = lattice.pitch * math.sqrt(abs(np.linalg.det(to_um[:2, :2])))
    side = max(1, int(view.um_per_px / pitch_um + 1e-6))
    row, col = (lattice.row - row0) // side, (lattice.col - col0) // side
    height, width = int(row.max()) + 1, int(col.max()) + 1
    finite, pixel = np.isfinite(values), row.astype(np.int64) * width + col
    n = np.bincount(pixel[finite], minlength=height * width)
    total = np.bincount(pixel[finite], values[finite], height * width)
    mean = np.divide(total, n, out=np.full(height * width, np.nan), where=n > 0)
    return mean.reshape(height, width).astype(np.float32), to_um @ lattice.to_grid @ scaled(side, col0, row0)


def _filled(
    regions: Regions, values: NDArray[np.floating], to_um: Float, view: View
) -> tuple[NDArray[np.float32], Float]:
    """Fill outlines on the pixels of the screen; also return the map of these to µm."""
    pixel_um = scaled(view.um_per_px, view.x0, view.y0)
    height, width = (math.ceil(side / view.um_per_px - 1e-6) for side in (view.height, view.width))
    spans = regions.transform(np.linalg.inv(pixel_um) @ to_um).spans(0, height, 0, width)
    pixel, run = ranges(spans.row * width + spans.start, spans.stop - spans.start)
    image = np.full(height * width, np.nan, np.float32)
    image[pixel] = values[spans.region[run]]
    return image.reshape(height, width), pixel_um
