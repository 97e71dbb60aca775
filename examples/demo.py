"""PixNet on a drawn slide: fit on its left part, predict all of it, score the right part, and draw a picture.

    make demo                                        # or: python examples/demo.py
    make demo DEMO_ARGS="--seed 1 --epochs 40"

The slide is drawn, so its true expression is known at every pixel. The network sees the expression of the left 70 % of
the slide only; everything printed is about bins of 8 µm in the right 30 %, in two ways: against the counts that were
"measured" there (Poisson draws), and against the truth that they were drawn from. The exit status is 1 when the mean
Pearson correlation (PCC) with the truth stays below 0.6.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import spatialdata as sd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import get_table_keys
from xarray import DataArray

import pixnet_sd as ps

BIN_UM = 8
TABLE, SHAPES = "square_008um", "sample_square_008um"
PREDICTED = f"pixnet_{SHAPES}"
MPP = 0.5
WORKING_MPP = 1.0
MAP_UM = 4 * WORKING_MPP
TARGET_SUM = 1e4
TRAINING_SHARE = 0.7
GAP_UM = 32.0
"""Between the bins that train and those that score: neighbours would give one another away."""

DRAWN = ("COL1A1", "MKI67", "SCGB2A2", "MS4A1")
"""Genes of stroma, of the rim of tumour nests, of glands, and of immune cells where they swarm."""


@dataclass(frozen=True)
class Options:
    """What to do, from the command line."""

    size_um: float
    epochs: int
    seed: int
    min_pcc: float
    output: Path

    @property
    def cut_um(self) -> float:
        """Held out is what lies to the right of here."""
        return TRAINING_SHARE * self.size_um


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")  # of anndata, dozens of times
    started = time.monotonic()
    with step("Drawing the slide"):
        slide = draw_slide(options)
    with step("Fitting"):
        model = fit(slide, options)
    with step("Predicting"):
        ps.tl.predict(slide, model, radius_um=8)
        ps.tl.predict(slide, model, shapes_key=SHAPES)  # read back from the map: the network does not run again
    with step("Scoring"):
        scores = score(slide, options)
    with step("Drawing the picture"):
        picture = draw_picture(slide, scores, options)
    print(f"\nHeld-out part, bins of {BIN_UM} µm, Pearson correlation over bins, spatially varying genes:\n")
    print(scores.round(3).to_string())
    print(f"\n{where(options, picture)}\n\nAll of it took {time.monotonic() - started:.0f} s.")
    return verdict(scores["truth"]["mean"], options.min_pcc)


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="PixNet on a drawn slide, scored against its known expression.")
    parser.add_argument("--size-um", type=float, default=1000.0, help="side of the slide in µm (default: 1000)")
    parser.add_argument("--epochs", type=int, default=24, help="training epochs (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other tissue (default: 0)")
    parser.add_argument("--min-pcc", type=float, default=0.6, help="mean PCC below which to fail (default: 0.6)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: demo_output)")
    return Options(**vars(parser.parse_args(arguments)))


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"== {what} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"== {what}: {time.monotonic() - started:.0f} s", flush=True)


def draw_slide(options: Options) -> SpatialData:
    """Draw the slide, write it, and read it back: from now on it lives on disk, as a real one would."""
    store = options.output / "sample.zarr"
    for old in (store, options.output / "model"):
        shutil.rmtree(old, ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)
    ps.datasets.sample(size_um=options.size_um, mpp=MPP, bin_um=(8, 16), seed=options.seed).write(store)
    return sd.read_zarr(store)


def fit(slide: SpatialData, options: Options) -> ps.PixNet:
    """Train a small network from random weights on the bins left of the gap."""
    limit_um = options.cut_um - GAP_UM
    training = SpatialData(
        images=dict(slide.images),
        shapes=dict(slide.shapes),
        tables={key: table[x_um(table) < limit_um].copy() for key, table in slide.tables.items()},
    )
    return ps.tl.fit(
        training,
        genes=list(slide.tables[TABLE].var_names),
        encoder="resnet10t",
        encoder_weights=None,
        decoder_width=64,
        working_mpp=WORKING_MPP,
        tile_px=256,
        batch_size=2,
        lr=3e-3,
        max_epochs=options.epochs,
        validation=None,
        seed=options.seed,
        checkpoint_dir=options.output / "model",
    )


def score(slide: SpatialData, options: Options) -> pd.DataFrame:
    """Correlation of each spatially varying gene with counts and truth on the held-out part, and the means."""
    measured = slide.tables[TABLE]
    held_out = measured[x_um(measured) >= options.cut_um]
    genes = measured.var_names[measured.var["spatially_varying"]]
    part = SpatialData(
        shapes={SHAPES: slide.shapes[SHAPES]}, tables={TABLE: held_out.copy(), PREDICTED: slide[PREDICTED]}
    )
    against_counts = ps.tl.evaluate(part, table_key=TABLE, predicted_key=PREDICTED).loc[genes, "pcc"]
    truth = true_bins(options).loc[held_out.obs_names, genes]
    against_truth = predicted_bins(slide).loc[held_out.obs_names, genes].corrwith(truth).fillna(0)  # constant: 0
    scores = pd.DataFrame({"counts": against_counts, "truth": against_truth})
    scores.loc["mean"] = scores.mean()
    return scores


def predicted_bins(slide: SpatialData) -> pd.DataFrame:
    """Predicted expression, bins x genes, with the names that the bins have in the measured table."""
    measured, predicted = slide.tables[TABLE], slide.tables[PREDICTED]
    name_of = pd.Series(measured.obs_names, index=instances(measured))
    return pd.DataFrame(predicted.X, index=name_of[instances(predicted)], columns=predicted.var_names)


def instances(table: Any) -> NDArray[Any]:
    """Which regions of the element that it annotates the rows of a table are."""
    return np.asarray(table.obs[get_table_keys(table)[2]])


def true_bins(options: Options) -> pd.DataFrame:
    """Expected counts of the bins, normalised as measured counts are."""
    expected = ps.datasets.sample_truth_bins(BIN_UM, size_um=options.size_um, mpp=MPP, seed=options.seed)
    return normalise(expected.div(expected.sum(axis=1), axis=0))


def normalise(shares: Any) -> Any:
    """Each gene's share of the counts, log-normalised as the targets of the fit are."""
    return np.log1p(TARGET_SUM * shares)


def x_um(table: Any) -> NDArray[np.float64]:
    """Distance of each bin's centre from the slide's left border."""
    return np.asarray(table.obsm["spatial"][:, 0] * MPP)


def where(options: Options, picture: Path) -> str:
    """Say where things are."""
    store = options.output / "sample.zarr"
    return "\n".join(
        [
            f"{store}: the slide with all results; spatialdata.read_zarr opens it",
            "    images['pixnet_map']: the gene map, one channel a gene",
            "    tables['pixnet_circles_8um'], shapes['pixnet_circles_8um_shapes']: circles of 8 µm radius",
            f"    tables['{PREDICTED}']: the bins of 8 µm",
            f"{options.output / 'model'}: the model; pixnet_sd.PixNet.load opens it",
            f"{picture}: H&E, truth and prediction",
        ]
    )


def verdict(pcc: float, min_pcc: float) -> int:
    """Exit status; a correlation that is not a number fails."""
    if pcc >= min_pcc:
        print(f"Mean PCC with the truth on the held-out part: {pcc:.3f}, at least {min_pcc:g} as it should be.")
        return 0
    print(
        f"FAILED: mean PCC with the truth on the held-out part is {pcc:.3f}, below {min_pcc:g}. With the default size, "
        "epochs and seed that means that something is broken; a smaller slide or fewer epochs learn less.",
        file=sys.stderr,
    )
    return 1


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


if __name__ == "__main__":
    sys.exit(main())
