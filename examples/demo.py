"""PixNet on a drawn slide: fit on its left part, predict all of it, score the right part, and draw a picture.

    make demo                                        # or: python examples/demo.py
    make demo DEMO_ARGS="--seed 1 --epochs 20"

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
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import get_table_keys

import pixnet_sd as ps

BIN_UM = 8
TABLE, SHAPES = "square_008um", "sample_square_008um"
PREDICTED = f"pixnet_{SHAPES}"
MPP = 0.5
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
    started = time.monotonic()
    with step("Drawing the slide"):
        slide = draw_slide(options)
    with step("Fitting"):
        model = fit(slide, options)
    with step("Predicting"):
        ps.tl.predict(slide, model, radius_um=BIN_UM)
        ps.tl.predict(slide, model, shapes_key=SHAPES)  # read back from the map: the network does not run again
    with step("Scoring"):
        scores = score(slide, options)
    with step("Drawing the picture"):
        picture = draw_picture(slide, scores, options)
    print(f"\nHeld-out part, bins of {BIN_UM} µm, Pearson correlation over bins, spatially varying genes:\n")
    print(scores.round(3).to_string())
    print(f"\n{where(options, picture)}\n\nAll of it took {time.monotonic() - started:.0f} s.")
    return verdict(float(scores.loc["mean", "truth"]), options.min_pcc)


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="PixNet on a drawn slide, scored against its known expression.")
    parser.add_argument("--size-um", type=float, default=1000.0, help="side of the slide in µm (default: 1000)")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default: 10)")
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
        tile_px=256,
        batch_size=4,
        lr=2e-3,
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
    part = SpatialData(shapes={SHAPES: slide.shapes[SHAPES]}, tables={TABLE: held_out.copy(), PREDICTED: slide[PREDICTED]})
    against_counts = ps.tl.evaluate(part, table_key=TABLE, predicted_key=PREDICTED).loc[genes, "pcc"]
    truth = true_bins(options).loc[held_out.obs_names, genes]
    against_truth = predicted_bins(slide).reindex(held_out.obs_names)[genes].corrwith(truth)
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
    return np.log1p(TARGET_SUM * expected.div(expected.sum(axis=1), axis=0))


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
    genes = [gene for gene in DRAWN if gene in scores.index]
    truth, predicted = true_map(options), gene_map(slide)
    figure = Figure(figsize=(4.1 * (len(genes) + 2), 9), layout="constrained")
    grid = figure.add_gridspec(2, len(genes) + 2)
    histology = figure.add_subplot(grid[:, :2])
    image = sd.get_pyramid_levels(slide.images["sample_full_image"], n=0)
    histology.imshow(image.transpose("y", "x", "c").values, extent=(0, options.size_um, options.size_um, 0))
    decorate(histology, "H&E", options)
    histology.text(options.cut_um / 2, -4, "trained on", ha="center", va="bottom", fontsize=11)
    for column, gene in enumerate(genes):
        limits = np.nanpercentile(truth.sel(c=gene), [1, 99.5])
        for row, (name, maps) in enumerate({"truth": truth, "prediction": predicted}.items()):
            axes = figure.add_subplot(grid[row, column + 2])
            axes.imshow(maps.sel(c=gene), extent=(0, options.size_um, options.size_um, 0), vmin=limits[0], vmax=limits[1])
            title = f"{gene}, {name}" + (f" (PCC {scores.loc[gene, 'truth']:.2f})" if row else "")
            decorate(axes, title, options)
    path = options.output / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def true_map(options: Options) -> Any:
    """Expected counts on the map's grid, normalised as the targets are; NaN off tissue."""
    expected = ps.datasets.sample_truth(size_um=options.size_um, mpp=MPP, seed=options.seed)
    total = expected.sum("c")
    return np.log1p(TARGET_SUM * expected / total.where(total > 0.1 * total.max()))


def gene_map(slide: SpatialData) -> Any:
    """The predicted gene map; NaN off tissue."""
    tissue = sd.get_pyramid_levels(slide.labels["pixnet_map_tissue"], n=0)
    return sd.get_pyramid_levels(slide.images["pixnet_map"], n=0).where(tissue > 0)


def decorate(axes: Axes, title: str, options: Options) -> None:
    """Title, scale bar, and the border of the held-out part."""
    size = options.size_um
    axes.set_title(title, fontsize=13, pad=18)
    axes.axvline(options.cut_um, color="black", linestyle="--", linewidth=1.2)
    axes.text((options.cut_um + size) / 2, -4, "held out", ha="center", va="bottom", fontsize=10)
    axes.set_axis_off()


if __name__ == "__main__":
    sys.exit(main())
