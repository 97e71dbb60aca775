"""Draw docs/_static/overview.png, the picture of the landing page, from what `make demo` has left.

    make demo
    python docs/make_overview.py                     # --demo demo_output

The demo's model was trained on the counts of the left part of a drawn slide. Here it predicts the slide again, drawn
with its cells; the right part is tissue whose counts it has not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import spatialdata as sd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import pixnet_sd as ps

GENE, SIZE_UM, MPP, BIN_UM, CUT_UM = "COL1A1", 1000.0, 0.5, 8, 700.0
CROP_UM = (760.0, 940.0, 420.0, 600.0)
"""Left, right, top and bottom of what is shown of the cells, in the part that was not trained on."""
HE, TABLE, CELLS = "sample_full_image", "square_008um", "sample_cell_segmentations"
PICTURE = Path(__file__).parent / "_static" / "overview.png"
STYLE = {"ha": "center", "va": "center", "fontsize": 15}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the picture of the landing page.")
    parser.add_argument("--demo", type=Path, default=Path("demo_output"), help="what `make demo` has left")
    demo = parser.parse_args().demo
    slide = ps.datasets.sample(size_um=SIZE_UM, mpp=MPP, bin_um=(BIN_UM, 16), cells=True)
    ps.tl.predict(slide, demo / "model", shapes_key=CELLS)
    figure = draw(slide)
    figure.savefig(PICTURE, dpi=110)
    with Image.open(PICTURE) as drawn:  # 128 colours are enough, and a quarter of the bytes
        drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


def draw(slide: sd.SpatialData) -> Figure:
    """H&E and measured bins, an arrow, the predicted map, and predicted cells."""
    figure = Figure(figsize=(14, 4.1))
    grid = figure.add_gridspec(
        1, 5, width_ratios=(1, 1, 0.32, 1, 1), left=0.01, right=0.99, top=0.84, bottom=0.09, wspace=0.06
    )
    he, measured, arrow, predicted, cells = (figure.add_subplot(grid[k]) for k in range(5))
    colours = {"cmap": "viridis", "vmin": 0.0, "vmax": upper_limit(slide)}
    show(he, pixels(slide.images[HE]).transpose("y", "x", "c").values, "H&E")
    show(measured, measured_bins(slide), f"{GENE}, measured", **colours)
    measured.axvspan(CUT_UM, SIZE_UM, color="0.93")
    measured.text((CUT_UM + SIZE_UM) / 2, SIZE_UM / 2, "not\nmeasured", fontsize=12, ha="center", va="center")
    show(predicted, gene_map(slide), f"{GENE}, predicted", **colours)
    mark(predicted)
    draw_cells(cells, slide, colours)
    draw_arrow(arrow)
    label(figure, (he, measured), "goes in")
    label(figure, (predicted, cells), "comes out")
    scale_bar(he, 200.0)
    return figure


def upper_limit(slide: sd.SpatialData) -> float:
    """Of the colours: what few pixels of the map reach."""
    return float(np.nanpercentile(gene_map(slide), 99.5))


def pixels(element: Any) -> Any:
    """The finest level."""
    return sd.get_pyramid_levels(element, n=0)


def measured_bins(slide: sd.SpatialData) -> np.ndarray:
    """Log-normalised counts on the lattice of the bins left of the cut, NaN elsewhere."""
    table = slide.tables[TABLE]
    side = round(SIZE_UM / BIN_UM)
    share = np.asarray(table[:, GENE].X.todense()).ravel() / np.asarray(table.X.sum(axis=1)).ravel()
    picture = np.full((side, side), np.nan)
    col, row = (table.obsm["spatial"] * MPP / BIN_UM).astype(int).clip(0, side - 1).T
    left = col * BIN_UM < CUT_UM
    picture[row[left], col[left]] = np.log1p(1e4 * share)[left]
    return picture


def gene_map(slide: sd.SpatialData) -> np.ndarray:
    """The predicted map of the gene, NaN off tissue."""
    found = pixels(slide.images["pixnet_map"]).sel(c=GENE)
    return found.where(pixels(slide.labels["pixnet_map_tissue"]).values > 0).values


def show(axes: Axes, picture: np.ndarray, title: str, **colours: Any) -> None:
    """The whole slide, in micrometres."""
    axes.imshow(picture, extent=(0, SIZE_UM, SIZE_UM, 0), interpolation="nearest", **colours)
    axes.set(xlim=(0, SIZE_UM), ylim=(SIZE_UM, 0))
    axes.set_title(title, fontsize=13)
    axes.set_axis_off()


def mark(axes: Axes) -> None:
    """Where the measured part ends, and where the cells are."""
    left, right, top, bottom = CROP_UM
    axes.axvline(CUT_UM, color="0.35", linestyle="--", linewidth=1.2)
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="black", linewidth=1.5))


def draw_cells(axes: Axes, slide: sd.SpatialData, colours: dict[str, Any]) -> None:
    """Outlines of cells over H&E, filled by the predicted gene."""
    table = slide.tables[f"pixnet_{CELLS}"]
    left, right, top, bottom = CROP_UM
    show(axes, pixels(slide.images[HE]).transpose("y", "x", "c").values, f"{GENE}, predicted in cells")
    outlines = slide.shapes[CELLS].geometry.loc[table.obs["instance_id"]]
    corners = [np.asarray(polygon.exterior.coords) * MPP for polygon in outlines]
    drawn = PolyCollection(corners, cmap=colours["cmap"], edgecolor="black", linewidth=0.6, alpha=0.9)
    drawn.set_array(np.asarray(table[:, GENE].X).ravel())
    drawn.set_clim(colours["vmin"], colours["vmax"])
    axes.add_collection(drawn)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    scale_bar(axes, 50.0)


def draw_arrow(axes: Axes) -> None:
    axes.set_axis_off()
    axes.annotate("", (1.0, 0.5), (0.0, 0.5), arrowprops={"arrowstyle": "-|>", "linewidth": 3, "color": "0.3"})
    axes.text(0.5, 0.59, "fit", **STYLE)
    axes.text(0.5, 0.41, "predict", **STYLE)


def label(figure: Figure, axes: tuple[Axes, Axes], text: str) -> None:
    """A heading over two axes."""
    boxes = [ax.get_position() for ax in axes]
    figure.text((boxes[0].x0 + boxes[1].x1) / 2, 0.95, text, fontweight="bold", **STYLE)


def scale_bar(axes: Axes, length_um: float) -> None:
    """Below the picture, in its data's units."""
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    height = abs(np.subtract(*axes.get_ylim()))
    y = bottom + 0.035 * height
    axes.plot([left, left + length_um], [y, y], color="black", linewidth=3, clip_on=False, solid_capstyle="butt")
    axes.text(left + 1.1 * length_um, y, f"{length_um:g} µm", fontsize=11, va="center", clip_on=False)


if __name__ == "__main__":
    main()
