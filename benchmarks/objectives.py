"""What a model of counts costs beside one of logarithms: seconds per epoch, seconds to predict, peak memory.

    python benchmarks/objectives.py --folder scratch

On a drawn slide (`datasets.sample`), each run in a process of its own, the two objectives in turn:

- bins: 250 genes on 2, 8 and 16 µm bins, the default network.
- kept: the same with a tiny encoder, as if its features were kept, so that decoder and objective are all of a step.
- spots: the same on 55 and 100 µm squares.

A whole transcriptome is `whole_transcriptome.py`, on real sections: a drawn slide has few counts of most genes.

An epoch is the median over those after the first. Peak memory is the peak resident size of the
process as the operating system accounts it, imports included. Linux only. Ratios are of medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from own_process import RESULT, in_own_process

OBJECTIVES = ("nb_pcc", "mse_pcc")
KEPT: dict[str, Any] = {"encoder": "test_resnet", "freeze_encoder": True}
CASES: dict[str, dict[str, Any]] = {
    "bins": {"bin_um": (2, 8, 16), "model": {}, "epochs": 2},
    "kept": {"bin_um": (2, 8, 16), "model": KEPT, "epochs": 4},
    "spots": {"bin_um": (16,), "model": KEPT, "epochs": 4, "spots_um": (55, 100)},
}
N_GENES, MOST = 250, 1.1
FIGURES = {"epoch_s": "s an epoch", "predict_s": "s to predict", "peak_gb": "peak GB"}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run all cases; the ratios of each figure, counts over logarithms."""
    options = parse(arguments)
    if options.objective:
        print(RESULT + json.dumps(run(options)))
        return {}
    print("| | | counts | logarithms | ratio |\n|---|---|---:|---:|---:|")
    ratios = {}
    for case in options.cases:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in OBJECTIVES}
        for _ in range(options.repeats):
            for name in OBJECTIVES:
                found[name].append(measured(options, case, name))
        medians = {name: {key: median(run[key] for run in runs) for key in FIGURES} for name, runs in found.items()}
        counts, logs = (medians[name] for name in OBJECTIVES)
        ratios[case] = {key: counts[key] / logs[key] for key in FIGURES}
        for key, title in FIGURES.items():
            print(f"| {case} | {title} | {counts[key]:.3g} | {logs[key]:.3g} | {ratios[case][key]:.2f} |", flush=True)
    for case, each in ratios.items():
        for key, ratio in each.items():
            print(f"{'met' if ratio <= MOST else 'NOT MET'}: {case}, {FIGURES[key]}: {ratio:.2f} (at most {MOST:g})")
    return ratios


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("objectives"), help="for checkpoints")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--size-um", type=float, default=1000.0, help="side of the slide")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--objective", choices=OBJECTIVES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace, case: str, objective: str) -> dict[str, float]:
    """One run in a process of its own."""
    asked = ["--cases", case, "--objective", objective, "--size-um", str(options.size_um)]
    return in_own_process([__file__, *asked, "--folder", str(options.folder)])


def run(options: argparse.Namespace) -> dict[str, float]:
    """Fit and predict the only case of the options."""
    import pixnet_sd as ps

    (name,) = options.cases
    case = CASES[name]
    sdata = ps.datasets.sample(size_um=options.size_um, bin_um=case["bin_um"], n_genes=N_GENES)
    tables = list(sdata.tables)
    if "spots_um" in case:
        tables = [add_squares(sdata, side_um) for side_um in case["spots_um"]]
    model = ps.tl.fit(
        sdata,
        table_key=tables,
        genes=N_GENES,
        validation=None,
        max_epochs=case["epochs"],
        objective=options.objective,
        model_params={"encoder_weights": None, **case["model"]},
        checkpoint_dir=options.folder / f"{name}_{options.objective}_{os.getpid()}",
        device="cpu",
        show_progress_bar=False,
    )
    started = time.monotonic()
    params = {"allow_poor_model": True}
    ps.tl.predict(sdata, model, bin_um=8, device="cpu", show_progress_bar=False, predict_params=params)
    predicted = time.monotonic() - started
    return {"epoch_s": median(row["seconds"] for row in model.record.history[1:]), "predict_s": predicted}


def add_squares(sdata: Any, side_um: int) -> str:
    """Add squares of another size with the sums of the 16 µm bins whose centres they hold; name of the table."""
    import anndata as ad
    import geopandas as gpd
    import numpy as np
    from scipy import sparse
    from shapely import box
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import get_transformation

    table, bins = sdata.tables["square_016um"], sdata.shapes["sample_square_016um"]
    centres = bins.geometry.loc[table.obs["location_id"]].centroid
    xy = np.stack([centres.x, centres.y], axis=1)
    pitch = side_um / 16 * np.median(np.sqrt(bins.geometry.area))
    places, square = np.unique(np.floor(xy / pitch).astype(int), axis=0, return_inverse=True)
    sums = sparse.csr_matrix((np.ones(len(xy)), (square.ravel(), np.arange(len(xy)))), (len(places), len(xy)))
    geometry = [box(*(place * pitch), *((place + 1) * pitch)) for place in places]
    key, transforms = f"squares_{side_um}um", get_transformation(bins, get_all=True)
    sdata.shapes[key] = ShapesModel.parse(gpd.GeoDataFrame(geometry=geometry), transformations=transforms)
    counts = ad.AnnData(sparse.csr_matrix(sums @ table.X), var=table.var[[]])
    counts.obs["region"], counts.obs["square"] = key, np.arange(len(places))
    counts.obs["region"] = counts.obs["region"].astype("category")
    sdata.tables[f"{key}_counts"] = TableModel.parse(counts, region=key, region_key="region", instance_key="square")
    return f"{key}_counts"


if __name__ == "__main__":
    main()
