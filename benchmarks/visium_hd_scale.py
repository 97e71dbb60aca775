"""A Visium HD slide at two sizes: peak memory of `fit` and `predict`, and how much of the time is the engine's own.

    python benchmarks/visium_hd_scale.py --folder scratch

Draws a slide with 4 million 2 µm bins (`datasets.write_visium_hd`) and one of a quarter of its area, turns both into
stores (`io.convert_visium_hd`), and on each runs, in a process of its own:

- fit: `tl.fit` with a tiny network, for a fixed number of steps, on the 2, 8 and 16 µm bins;
- predict: `tl.predict` of the map of 250 genes at 2 µm and the table of all 2 µm bins;
- bare: the same network over the same tiles, its map included, and then zarr writing what `predict` wrote, array by
  array with the same chunks and codecs. Reading tiles and results is not timed. The bare run alternates with `predict`.

and on the larger one

- data: the time that a batch of the second epoch takes to be made (pixels, operators, targets), against the time of a
  step of the default ResNet18 network on the same batch. Nothing overlaps here; in `fit` it does.

Peak memory is the peak resident size of each process as the operating system accounts it, imports included. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from own_process import RESULT, in_own_process

SIZE_UM, MPP, N_GENES, PANEL = 4500.0, 0.25, 18_000, 250
STEPS, TILE_PX, BATCH = 12, 512, 2
FIT = {
    "genes": PANEL,
    "max_epochs": 1,
    "batch_size": BATCH,
    "model_params": {"encoder": "test_resnet", "encoder_weights": None, "decoder_width": 32},
    "train_params": {"tile_px": TILE_PX, "max_steps": STEPS},
    "device": "cpu",
    "show_progress_bar": False,
}
LIMIT_GB, GROWTH, OVERHEAD, DATA_SHARE = 4.0, 0.15, 1.3, 0.10


def main() -> int:
    options = parse()
    if options.stage:
        print(RESULT + json.dumps(STAGES[options.stage](options)))
        return 0
    rows = {}
    for name, size_um in (("quarter", options.size_um / 2), ("full", options.size_um)):
        rows[name] = run_size(options, name, size_um)
    report(rows)
    return 0 if verdicts(rows) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("visium_hd_scale"), help="for slides and results")
    parser.add_argument("--size-um", type=float, default=SIZE_UM, help="side of the larger slide")
    parser.add_argument("--mpp", type=float, default=MPP)
    parser.add_argument("--n-genes", type=int, default=N_GENES, help="genes in the tables")
    parser.add_argument("--repeats", type=int, default=3, help="runs of predict and bare, in turn")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_size(options: argparse.Namespace, name: str, size_um: float) -> dict[str, Any]:
    """All stages at one size."""
    folder = options.folder / f"{name}_{size_um:g}um_{options.mpp:g}mpp_{options.n_genes}genes"
    store = folder / "slide.zarr"
    found: dict[str, Any] = {}
    run = Stages(options, store, size_um)
    if not store.exists():
        shutil.rmtree(folder, ignore_errors=True)
        found["draw"] = run("draw")
        found["convert"] = run("convert")
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.rmtree(folder / "pixnet_sd_cache", ignore_errors=True)
    found["fit"] = run("fit")
    for _ in range(options.repeats):
        for stage in ("predict", "bare"):
            found.setdefault(stage, []).append(run(stage))
    if name == "full":
        found["data"] = run("data")
    return found


class Stages:
    """Runs stages in processes of their own and measures them."""

    def __init__(self, options: argparse.Namespace, store: Path, size_um: float) -> None:
        self.arguments = ["--store", str(store), "--size-um", str(size_um), "--mpp", str(options.mpp)]
        self.arguments += ["--n-genes", str(options.n_genes)]

    def __call__(self, stage: str) -> dict[str, Any]:
        started = time.monotonic()
        result = in_own_process([__file__, "--stage", stage, *self.arguments])
        result["wall_s"] = time.monotonic() - started
        print(f"  {stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()), flush=True)
        return result


def draw(options: argparse.Namespace) -> dict[str, float]:
    from pixnet_sd import datasets

    datasets.write_visium_hd(
        options.store.parent / "space_ranger",
        size_um=options.size_um,
        mpp=options.mpp,
        n_genes=options.n_genes,
        cells=False,
    )
    return {}


def convert(options: argparse.Namespace) -> dict[str, float]:
    import pixnet_sd as ps

    folder = options.store.parent / "space_ranger"
    ps.io.convert_visium_hd(folder, options.store, show_progress_bar=False)
    shutil.rmtree(folder)
    return {}


def fit(options: argparse.Namespace) -> dict[str, float]:
    import pixnet_sd as ps

    sdata = ps.io.open_store(options.store)
    started = time.monotonic()
    ps.tl.fit(sdata, checkpoint_dir=options.store.parent / "model", **FIT)
    return {"fit_s": time.monotonic() - started}


def predict(options: argparse.Namespace) -> dict[str, float]:
    import squidpy.experimental.im  # noqa: F401 - `predict` finds tissue with it, and it takes seconds to import

    import pixnet_sd as ps

    result = result_of(options.store)
    for leftover in (result, result.with_name(f".{result.name}.pixnet_sd")):  # else a run that was killed would go on
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(options.store, result, copy_function=os.link)  # without results; `predict` changes no file in place
    sdata = ps.io.open_store(result)
    run = ps.tl.predict  # what it needs is imported here, torch included
    started = time.monotonic()
    run(sdata, shapes_key=BINS, device="cpu", show_progress_bar=False)
    seconds = time.monotonic() - started
    return {"predict_s": seconds, "n_bins": n_rows(result), "image_px": sdata_px(sdata)}


BINS = "sample_square_002um"


def result_of(store: Path) -> Path:
    return store.with_name("result.zarr")


def n_rows(store: Path) -> int:
    import zarr

    return int(zarr.open_array(str(store / "tables" / f"pixnet_{BINS}" / "X"), mode="r").shape[0])


def sdata_px(sdata: Any) -> int:
    return int(sdata.images["sample_full_image"]["scale0"]["image"].shape[1])


def bare(options: argparse.Namespace) -> dict[str, float]:
    return {"network_s": bare_network(options), "write_s": bare_write(options)}


def bare_network(options: argparse.Namespace) -> float:
    """Seconds of the forward passes, and of the gene map from D, over the tiles that `predict` runs."""
    import torch

    import pixnet_sd as ps
    from pixnet_sd.slide import open_slide, tissue_mask

    sdata = ps.io.open_store(options.store)
    model = ps.PixNet.load(sdata.attrs["pixnet_sd"]["model"])
    slide = open_slide(sdata, working_mpp=model.record.working_mpp)
    tissue, step = tissue_mask(slide), 256
    halo, total = model.record.halo_px, 0.0
    with torch.inference_mode():
        for row in range(0, tissue.shape[0], step):
            for col in range(0, tissue.shape[1], step):
                if not tissue[row : row + step, col : col + step].any():
                    continue
                box = (row * 4 - halo, (row + step) * 4 + halo, col * 4 - halo, (col + step) * 4 + halo)
                image = torch.from_numpy(slide.read(*box)).permute(2, 0, 1)[None]
                started = time.perf_counter()
                d = model.network(image.float().contiguous())
                cut = halo // 4
                model.network.gene_map(d[:, :, cut : cut + step, cut : cut + step])
                total += time.perf_counter() - started
    return total


def bare_write(options: argparse.Namespace) -> float:
    """Seconds to write every array of the map and the table anew, with the same chunks and codecs."""
    import zarr

    target, result = options.store.parent / "bare.zarr", result_of(options.store)
    shutil.rmtree(target, ignore_errors=True)
    total = 0.0
    for path in arrays_of(result):
        source = zarr.open_array(str(path), mode="r")
        started = time.perf_counter()
        copy = zarr.create_array(
            str(target / path.relative_to(result)),
            shape=source.shape,
            chunks=source.chunks,
            shards=source.shards,
            dtype=source.dtype,
            compressors=source.compressors,
            fill_value=source.fill_value,
        )
        total += time.perf_counter() - started
        for place in boxes(source):
            block = source[place]
            started = time.perf_counter()
            copy[place] = block
            total += time.perf_counter() - started
    shutil.rmtree(target)
    return total


NUMBERS = ("float32", "float64", "int8", "int64")


def arrays_of(store: Path) -> Iterator[Path]:
    """Numeric arrays of the results: all levels of the map, and what the table has by region."""
    for element in (store / "images" / "pixnet_map", store / "tables" / f"pixnet_{BINS}"):
        for metadata in sorted(element.rglob("zarr.json")):
            content = json.loads(metadata.read_text())
            if content["node_type"] == "array" and content["shape"] and content["data_type"] in NUMBERS:
                yield metadata.parent


def boxes(array: Any) -> Iterator[tuple[slice, ...]]:
    """Boxes of whole chunks that `predict` writes in one call: all genes of a block of the map, 32 MB of a table."""
    steps = (array.shape[0], *array.chunks[1:]) if array.ndim == 3 else (array.chunks[0] * 8, *array.shape[1:])
    starts = [range(0, size, step) for size, step in zip(array.shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(corner, steps, array.shape, strict=True))


def data(options: argparse.Namespace) -> dict[str, float]:
    """Medians over some batches of the second epoch: making one, and a step of the default network on it."""
    import numpy as np

    from pixnet_sd.engine import make_fabric, training_tiles
    from pixnet_sd.engine.train import BatchLoss, make_batch, plan_batches
    from pixnet_sd.model import Network, build_encoder, make_objective
    from pixnet_sd.params import ModelParams
    from pixnet_sd.tl._fit import decoder_config

    slide, fabric = training_slide(options), make_fabric("cpu")
    objective = make_objective("mse_pcc", pcc_weight=0.5, target_sum=1e4)
    backbone = build_encoder("resnet18", None, frozen=False)
    network = Network(backbone, decoder_config(ModelParams()), PANEL, "mean").train()
    tiles = training_tiles(slide, TILE_PX)
    plans = plan_batches([tiles], BATCH, np.random.default_rng(0))[:8]
    made, stepped = [], []
    for epoch in (1, 2):
        for plan in plans:
            started = time.perf_counter()
            batch = make_batch(plan)
            made.append((epoch, time.perf_counter() - started))
            if epoch == 2 and len(stepped) < 4:
                started = time.perf_counter()
                loss = BatchLoss(network, objective, batch.operators, batch.targets, [0, 1, 2])
                loss.backward(network(batch.image.float()), fabric)
                stepped.append(time.perf_counter() - started)
    return {"data_s": median(s for epoch, s in made if epoch == 2), "step_s": median(stepped[1:])}


def training_slide(options: argparse.Namespace) -> Any:
    """The slide as `fit` trains on it, targets on disk."""
    import pixnet_sd as ps
    from pixnet_sd.tl import open_sources
    from pixnet_sd.tl._training_data import training_data

    sdata = ps.io.open_store(options.store)
    sources = open_sources(
        {"slide": sdata},
        image_key=None,
        table_key=None,
        coordinate_system=None,
        mpp=None,
        allow_any_mpp=False,
        working_mpp=0.5,
    )
    found = training_data(
        sources,
        genes=PANEL,
        target_sum=1e4,
        objective="mse_pcc",
        validation=0.1,
        seed=0,
        cache=options.store.parent / "pixnet_sd_cache",
    )
    return found.training[0]


STAGES = {"draw": draw, "convert": convert, "fit": fit, "predict": predict, "bare": bare, "data": data}


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Markdown for the README."""
    print("\n| | quarter | full | full / quarter |\n|---|---:|---:|---:|")
    for title, value in (
        ("2 µm bins, million", lambda r: r["predict"][0]["n_bins"] / 1e6),
        ("image, px a side", lambda r: r["predict"][0]["image_px"]),
        ("fit, peak GB", lambda r: r["fit"]["peak_gb"]),
        ("predict, peak GB", predict_peak),
        ("predict, s", lambda r: median(p["predict_s"] for p in r["predict"])),
        ("bare network, s", lambda r: median(b["network_s"] for b in r["bare"])),
        ("bare write, s", lambda r: median(b["write_s"] for b in r["bare"])),
        ("predict / (network + write)", overhead),
    ):
        low, high = (value(rows[name]) for name in ("quarter", "full"))
        print(f"| {title} | {low:.4g} | {high:.4g} | {high / low:.2f} |")
    found = rows["full"]["data"]
    print(f"\nbatch of the second epoch {found['data_s']:.3f} s, step of ResNet18 {found['step_s']:.2f} s")


def predict_peak(row: dict[str, Any]) -> float:
    return max(p["peak_gb"] for p in row["predict"])


def overhead(row: dict[str, Any]) -> float:
    """Median over the pairs of runs."""
    pairs = zip(row["predict"], row["bare"], strict=True)
    return median(p["predict_s"] / (b["network_s"] + b["write_s"]) for p, b in pairs)


def verdicts(rows: dict[str, dict[str, Any]]) -> bool:
    """Each aim with its figure; True when all are met."""
    quarter, full = rows["quarter"], rows["full"]
    found = full["data"]
    aims = [
        ("2 µm bins, million", full["predict"][0]["n_bins"] / 1e6, ">=", 4.0),
        ("image side, px", full["predict"][0]["image_px"], ">=", 16_000),
        ("fit, peak GB", full["fit"]["peak_gb"], "<=", LIMIT_GB),
        ("predict, peak GB", predict_peak(full), "<=", LIMIT_GB),
        ("fit, growth", full["fit"]["peak_gb"] / quarter["fit"]["peak_gb"] - 1, "<=", GROWTH),
        ("predict, growth", predict_peak(full) / predict_peak(quarter) - 1, "<=", GROWTH),
        ("predict / (network + write)", overhead(full), "<=", OVERHEAD),
        ("data / step", found["data_s"] / found["step_s"], "<=", DATA_SHARE),
    ]
    met = []
    for name, value, sign, aim in aims:
        met.append(value >= aim if sign == ">=" else value <= aim)
        print(f"{'met   ' if met[-1] else 'MISSED'} {name}: {value:.4g} {sign} {aim:g}")
    return all(met)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
