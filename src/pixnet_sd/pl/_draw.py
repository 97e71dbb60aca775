"""Artists on axes in µm: the slide, rasters under any affine map, regions, a scale bar."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D
from matplotlib_scalebar.scalebar import ScaleBar
from numpy.typing import NDArray

from pixnet_sd.nn.lattice import Lattice
from pixnet_sd.nn.regions import Circles, Regions, ranges
from pixnet_sd.slide import Slide, read_picture

from ._view import View, shifted

__all__ = ["add_scale_bar", "draw_raster", "draw_regions", "draw_slide", "set_view"]

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
