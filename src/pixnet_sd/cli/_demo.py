"""PixNet on a drawn slide: fit on its left part, predict all of it, score the right part, and draw a picture.

The slide is drawn, so its true expression is known at every pixel. The network sees the expression of the left 70 % of
the slide only; everything printed is about bins of 8 µm in the right 30 %, in two ways: against the counts that were
"measured" there (Poisson draws), and against the truth, what lies in the tissue.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import spatialdata as sd
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData

import pixnet_sd as ps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._parser import Call

MILLION = 1e6
BIN_UM = 8
TABLE, SHAPES = "square_008um", "sample_square_008um"
PREDICTED = f"pixnet_{SHAPES}"
MPP = 0.5
TRAINING_SHARE = 0.7
GAP_UM = 32.0  # between the bins that train and those that score: neighbours would give one another away
DRAWN = ("COL1A1", "MKI67", "SCGB2A2", "MS4A1")  # of stroma, rims of tumour nests, glands, and swarms of immune cells


def demo(call: Call) -> int:
    """Run the demo; returns its exit status, which is 1 when the mean correlation with the truth is too low."""
    defaults = {name: flag.default for name, flag in call.command.flags.items() if not flag.own}
    options: dict[str, Any] = defaults | call.options
    folder, cut_um = Path(options["output"]).expanduser(), TRAINING_SHARE * options["size_um"]
    drawing = {"size_um": options["size_um"], "mpp": MPP, "seed": options["seed"]}
    started = time.monotonic()
    with step("Drawing the slide"):
        for old in (folder / "sample.zarr", folder / "model"):
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        ps.datasets.sample(bin_um=(8, 16), **drawing).write(folder / "sample.zarr")
        slide = sd.read_zarr(folder / "sample.zarr")  # from now on it lives on disk, as a real one would
    with step("Fitting"):
        model = fit(slide, cut_um - GAP_UM, options["epochs"], seed=options["seed"], checkpoint_dir=folder / "model")
    with step("Predicting"):
        ps.tl.predict(slide, model, radius_um=8)
        ps.tl.predict(slide, model, shapes_key=SHAPES)  # read back from the map: the network does not run again
    with step("Scoring"):
        truth = as_caught(
            ps.datasets.sample_truth_bins(BIN_UM, **drawing, library_size=False), slide.tables[TABLE], cut_um
        )
        scores = score(slide, truth, cut_um)
    with step("Drawing the picture"):
        draw_picture(slide, truth, cut_um).savefig(folder / "demo.png", dpi=100)
    print(
        f"""
Held-out part, bins of {BIN_UM} µm, Pearson correlation over bins, spatially varying genes:

{scores.round(3).to_string()}

Whole slide, counts in a bin of {BIN_UM} µm, mean over bins: measured, beside what is expected of as many counts in all;
and the truth, beside what is predicted from the image alone:

{levels(slide, truth).round(3).to_string()}

{folder / "sample.zarr"}: the slide with all results; spatialdata.read_zarr opens it
    images['pixnet_map']: the gene map, one channel a gene
    tables['pixnet_circles_8um'], shapes['pixnet_circles_8um_shapes']: circles of 8 µm radius
    tables['{PREDICTED}']: the bins of 8 µm
{folder / "model"}: the model; pixnet_sd.PixNet.load opens it
{folder / "demo.png"}: H&E, truth and prediction

All of it took {time.monotonic() - started:.0f} s."""
    )
    pcc, least = scores["truth"]["mean"], options["min_pcc"]
    if pcc >= least:  # not so of NaN
        print(f"Mean PCC with the truth on the held-out part: {pcc:.3f}, at least {least:g} as it should be.")
        return 0
    print(
        f"FAILED: mean PCC with the truth on the held-out part is {pcc:.3f}, below {least:g}. With the "
        "default size, epochs and seed something is broken; a smaller slide or fewer epochs learn less.",
        file=sys.stderr,
    )
    return 1


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is being done, and how long it took."""
    print(f"== {title} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)


def fit(slide: SpatialData, limit_um: float, epochs: int, **options: Any) -> ps.PixNet:
    """Train a small network from random weights on the bins left of a limit."""
    training = SpatialData(
        images=dict(slide.images),
        shapes=dict(slide.shapes),
        tables={key: table[x_um(table) < limit_um].copy() for key, table in slide.tables.items()},
    )
    return ps.tl.fit(
        training,
        genes=list(slide.tables[TABLE].var_names),
        validation=None,
        max_epochs=epochs,
        batch_size=2,
        model_params={"encoder": "resnet10t", "encoder_weights": None, "decoder_width": 64, "working_mpp": 1.0},
        train_params={"lr": 3e-3, "tile_px": 256},
        **options,
    )


def as_caught(truth: pd.DataFrame, measured: AnnData, cut_um: float) -> AnnData:
    """Make a table of the truth in place of what was measured, in millionths, since counts are whole numbers.

    Which share of what lies in the tissue was caught is not on its image: that of the training part is taken for all.
    """
    table = measured.copy()
    values = truth.loc[table.obs_names, table.var_names].to_numpy()
    known = x_um(table) < cut_um - GAP_UM
    table.X = np.rint(MILLION * values * (measured.X[known].sum() / values[known].sum()))
    return table


def levels(slide: SpatialData, truth: AnnData) -> pd.DataFrame:
    """Compare means over bins of the genes that are drawn, once at the depth of each bin and once at the slide's.

    How much of a bin is caught is drawn, and not on its image: counts are compared with what is expected of as many.
    """
    genes, table, measured = list(DRAWN), slide.tables[PREDICTED], slide.tables[TABLE]
    table = table[table.obs["on_tissue"]]
    rows = pd.Index(measured.obs["location_id"]).get_indexer(table.obs["instance_id"])
    table, rows = table[rows >= 0], rows[rows >= 0]
    expected = table.to_df("expected_counts")[genes]
    depth = np.asarray(measured.X.sum(axis=1)).ravel()[rows] / table.obs["expected_total_counts"]
    means = pd.DataFrame(
        {
            "measured": measured.to_df()[genes].iloc[rows].mean(),
            "at its depth": expected.mul(depth, axis=0).mean(),
            "truth": truth.to_df()[genes].iloc[rows].mean() / MILLION,
            "predicted": expected.mean(),
        }
    )
    means.insert(2, "ratio", means["at its depth"] / means["measured"])
    means["ratio to truth"] = means["predicted"] / means["truth"]
    return means.rename_axis(None)


def score(slide: SpatialData, truth: AnnData, cut_um: float) -> pd.DataFrame:
    """Correlate each spatially varying gene with counts and truth on the held-out part, and average."""
    scores = pd.DataFrame()
    for name, table in (("counts", slide.tables[TABLE]), ("truth", truth)):
        tables = {TABLE: table[x_um(table) >= cut_um].copy(), PREDICTED: slide.tables[PREDICTED]}
        right = SpatialData(shapes={SHAPES: slide.shapes[SHAPES]}, tables=tables)
        keys: Any = {"table_key": TABLE, "predicted_key": PREDICTED}
        pcc = ps.tl.evaluate(right, **keys, at_measured_depth=name == "counts")["pcc"]  # of the truth nothing is drawn
        scores[name] = pcc[table.var_names[table.var["spatially_varying"]]]
    scores.loc["mean"] = scores.mean()
    return scores.rename_axis(None)


def x_um(table: Any) -> NDArray[np.float64]:
    """Distance of each bin's centre from the slide's left border."""
    return np.asarray(table.obsm["spatial"][:, 0] * MPP)


def draw_picture(slide: SpatialData, truth: AnnData, cut_um: float) -> Figure:
    """Draw H&E beside truth and prediction of a few genes."""
    rest = {"images": dict(slide.images), "labels": dict(slide.labels), "shapes": dict(slide.shapes)}
    drawn = SpatialData(**rest, tables={TABLE: truth.copy()}, attrs=slide.attrs)
    drawn.tables[TABLE].X = truth.X / MILLION
    figure: Any = ps.pl.gene_map(drawn, DRAWN, table_key=TABLE, return_fig=True)
    for axes in figure.axes:
        if title := axes.get_title():
            axes.set_title(title.replace("measured", "truth"))
            axes.axvline(cut_um, color="black", linestyle="--")  # held out is what lies to the right
    return figure
