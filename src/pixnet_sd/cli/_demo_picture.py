"""The demo's picture: H&E beside truth and prediction of a few genes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import spatialdata as sd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from spatialdata import SpatialData
from xarray import DataArray

import pixnet_sd as ps

from ._demo import BIN_UM, MAP_UM, MPP, Options, normalise

__all__ = ["draw_picture"]

DRAWN = ("COL1A1", "MKI67", "SCGB2A2", "MS4A1")
"""Genes of stroma, of the rim of tumour nests, of glands, and of immune cells where they swarm."""


def draw_picture(slide: SpatialData, scores: pd.DataFrame, options: Options) -> Path:
    """Save H&E beside truth (top) and prediction (bottom) of a few genes."""
    maps = {"truth": true_map(options), "prediction": gene_map(slide)}
    figure = Figure(figsize=(24, 9.2), layout="constrained")
    grid = figure.add_gridspec(2, len(DRAWN) + 2)
    histology = figure.add_subplot(grid[:, :2])
    image = sd.get_pyramid_levels(slide.images["sample_full_image"], n=0)
    show(histology, image.transpose("y", "x", "c"), MPP, "H&E", options)
    add_scale_bar(histology, options.size_um)
    for column, gene in enumerate(DRAWN, start=2):
        axes = [figure.add_subplot(grid[row, column]) for row in range(2)]
        limits = tuple(np.nanpercentile(maps["truth"].sel(c=gene), [1, 99]))
        titles = (f"{gene}, truth", f"{gene}, prediction (PCC {scores['truth'][gene]:.2f})")
        for ax, title, source in zip(axes, titles, maps.values(), strict=True):
            drawn = show(ax, source.sel(c=gene), BIN_UM, title, options, limits)
        bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.8, aspect=30, pad=0.02)
        bar.set_label("log-normalised expression")
    figure.supxlabel(
        "Predictions are means of logarithms; the truth is the logarithm of a mean, which is higher where counts are "
        "few: compare patterns, not levels.",
        fontsize=13,
    )
    path = options.output / "demo.png"
    figure.savefig(path, dpi=100)
    return path


def true_map(options: Options) -> DataArray:
    """Expected counts of pixels as large as the bins, normalised as the targets are; NaN off tissue."""
    expected = ps.datasets.sample_truth(size_um=options.size_um, mpp=MPP, seed=options.seed, pitch_um=BIN_UM)
    total = expected.sum("c")
    return normalise(expected / total.where(total > 0.01 * total.max()))


def gene_map(slide: SpatialData) -> DataArray:
    """The predicted gene map, averaged to pixels as large as the bins; NaN off tissue."""
    predicted, tissue = (
        sd.get_pyramid_levels(element, n=0)
        for element in (slide.images["pixnet_map"], slide.labels["pixnet_map_tissue"])
    )
    side = round(BIN_UM / MAP_UM)
    return predicted.where(tissue.values > 0).coarsen(y=side, x=side, boundary="pad").mean()


def show(
    axes: Axes,
    pixels: DataArray,
    pitch_um: float,
    title: str,
    options: Options,
    limits: tuple[float | None, float | None] = (None, None),
) -> AxesImage:
    """Draw a picture of the whole slide and mark the held-out part."""
    size, cut = options.size_um, options.cut_um
    extent = (0.0, pixels.sizes["x"] * pitch_um, pixels.sizes["y"] * pitch_um, 0.0)
    drawn = axes.imshow(pixels.values, extent=extent, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set(xlim=(0, size), ylim=(size, 0))
    axes.set_title(title, fontsize=15)
    axes.axvline(cut, color="black", linestyle="--", linewidth=1.5)
    axes.text(0.99 * size, 0.99 * size, "held out", ha="right", va="bottom", fontsize=12)
    axes.set_axis_off()
    return drawn


def add_scale_bar(axes: Axes, size_um: float) -> None:
    """Draw a scale bar of a fifth of the slide or less."""
    length = max(value for value in (10, 20, 50, 100, 200, 500) if value <= size_um / 5)
    left, height = 0.02 * size_um, 0.975 * size_um
    axes.plot([left, left + length], [height, height], color="black", linewidth=5, solid_capstyle="butt")
    axes.text(left + length / 2, height - 0.01 * size_um, f"{length} µm", ha="center", va="bottom", fontsize=13)
