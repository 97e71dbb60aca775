"""PixNet on a drawn slide: fit on its left part, predict all of it, score the right part, and draw a picture.

The slide is drawn, so its true expression is known at every pixel. The network sees the expression of the left 70 % of
the slide only; everything printed is about bins of 8 µm in the right 30 %, in two ways: against the counts that were
"measured" there (Poisson draws), and against the truth that they were drawn from.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import spatialdata as sd
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import get_table_keys

import pixnet_sd as ps

__all__ = ["BIN_UM", "MAP_UM", "MPP", "Options", "demo", "normalise"]

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


@dataclass(frozen=True)
class Options:
    """What to do."""

    size_um: float
    epochs: int
    seed: int
    min_pcc: float
    output: Path

    @property
    def cut_um(self) -> float:
        """Held out is what lies to the right of here."""
        return TRAINING_SHARE * self.size_um


def demo(
    *,
    size_um: float = 1000.0,
    epochs: int = 24,
    seed: int = 0,
    min_pcc: float = 0.6,
    output: str | Path = "demo_output",
) -> int:
    """Draw a slide, fit on its left part, predict all of it, and score the right part against the known truth.

    Parameters
    ----------
    size_um
        Side of the slide in µm.
    epochs
        Training epochs.
    seed
        Another seed draws other tissue.
    min_pcc
        Mean correlation with the truth below which the demo fails.
    output
        Folder for the slide, the model and a picture; what an earlier demo left there is replaced.

    Returns
    -------
    Exit status: 0, or 1 when the mean correlation is too low.
    """
    options = Options(size_um=size_um, epochs=epochs, seed=seed, min_pcc=min_pcc, output=Path(output).expanduser())
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
        picture = draw(slide, scores, options)
    print(f"\nHeld-out part, bins of {BIN_UM} µm, Pearson correlation over bins, spatially varying genes:\n")
    print(scores.round(3).to_string())
    print(f"\n{where(options, picture)}\n\nAll of it took {time.monotonic() - started:.0f} s.")
    return verdict(scores["truth"]["mean"], options.min_pcc)


def draw(slide: SpatialData, scores: pd.DataFrame, options: Options) -> Path | None:
    """The picture, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return None
    from ._demo_picture import draw_picture

    return draw_picture(slide, scores, options)


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
        validation=None,
        max_epochs=options.epochs,
        batch_size=2,
        seed=options.seed,
        model_params={
            "encoder": "resnet10t",
            "encoder_weights": None,
            "decoder_width": 64,
            "working_mpp": WORKING_MPP,
        },
        train_params={"lr": 3e-3, "tile_px": 256},
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


def where(options: Options, picture: Path | None) -> str:
    """Say where things are."""
    store = options.output / "sample.zarr"
    drawn = "no picture was drawn: pip install 'pixnet_sd[plot]'" if picture is None else f"{picture}"
    return "\n".join(
        [
            f"{store}: the slide with all results; spatialdata.read_zarr opens it",
            "    images['pixnet_map']: the gene map, one channel a gene",
            "    tables['pixnet_circles_8um'], shapes['pixnet_circles_8um_shapes']: circles of 8 µm radius",
            f"    tables['{PREDICTED}']: the bins of 8 µm",
            f"{options.output / 'model'}: the model; pixnet_sd.PixNet.load opens it",
            drawn if picture is None else f"{drawn}: H&E, truth and prediction",
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
