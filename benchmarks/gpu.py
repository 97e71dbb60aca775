"""How much of the network's bare speed `predict` and `fit` keep, end to end, through the engine that they use.

    python benchmarks/gpu.py [--device cuda] [--small] [--encoder resnet18] [--json figures.json]

Everything is an array here: no SpatialData, zarr, anndata or pandas. What has to be importable besides `pixnet_sd`
itself: torch, torchvision and timm, numpy, scipy, lightning_fabric (with lightning_utilities), tqdm, safetensors and
huggingface_hub.

The slide is uncompressed in memory, so that reading a tile is a copy and decoding costs nothing: a store of JPEG or
Zstandard chunks adds its decoding to the threads that read ahead. It has bins of 2, 8 and 16 µm at 0.5 µm per working
pixel, on a lattice turned by 0.5°; targets are rows gathered from a table in memory, made when a tile asks for them.
Weights are random.

- forward: the network on tiles that are on the device already, halo included, without gradients.
- predict, results dropped: `engine.predict.Walk`, map of all genes and sums of all 2 µm bins; every value is copied to
  the host, and dropped there.
- predict, results kept: the same, each block and each window's sums copied once more, into memory of the sink.
- forward + backward: the network on a batch that is on the device already, backwards from the mean square of D.
- fit, batch on the device: the engine's step on one batch that is there already: with regions, loss and optimizer.
- fit: `engine.train.train`, its steps after the first ones: set-up falls out, and what was read ahead meanwhile is used
  up.

Bare and end to end alternate; figures are medians. A tile of `predict` counts its pixels without the halo.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pixnet_sd.engine import BLOCK_WRITERS, MeasuredRegions, TrainingSlide, Writer, fixed_shapes, make_fabric
from pixnet_sd.engine.predict import Lent, PredictPlan, Tiling, Walk, plan_regions, window_side
from pixnet_sd.engine.train import Run, Trainer, make_batch, plan_batches, train
from pixnet_sd.geometry import MAP_STRIDE, Grid, Lattice, RegionShare
from pixnet_sd.model import DecoderConfig, Network, build_encoder, receptive_radius_px
from pixnet_sd.params import TrainParams

MPP, BIN_UM, LATTICE_DEGREES = 0.5, (2, 8, 16), 0.5
KEPT_SHARE, TRAIN_GB = 0.7, 8.0
UNWANTED = {"anndata", "dask", "geopandas", "pandas", "shapely", "spatialdata", "squidpy", "xarray", "zarr"}


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    encoder: str
    widths: tuple[int, ...]
    hidden: tuple[int, ...]
    slide_px: int  # working pixels: a 26,000 px slide of 0.25 µm/px has 13,000
    n_genes: int
    predict_px: int
    predict_batch: int
    block_px: int
    train_px: int
    train_batch: int
    warm_up_steps: int
    steps: int
    repeats: int


FULL = Scale("resnet18", (64, 128, 256, 512), (128, 256, 512), 13_000, 250, 1024, 4, 256, 512, 8, 24, 64, 5)
SMALL = Scale("test_resnet", (8, 8, 8, 16), (16, 16, 16), 500, 12, 128, 2, 32, 128, 2, 2, 4, 2)


class Pixels:
    """Reads an uncompressed slide, white outside."""

    def __init__(self, side: int) -> None:
        patch = np.random.default_rng(0).integers(60, 230, (512, 512, 3), np.uint8)
        times = -(-side // 512)
        self.pixels = np.tile(patch, (times, times, 1))[:side, :side]

    def __call__(self, row0: int, row1: int, col0: int, col1: int) -> NDArray[np.uint8]:
        side = len(self.pixels)
        tile = np.full((row1 - row0, col1 - col0, 3), 255, np.uint8)
        top, bottom, left, right = (min(max(v, 0), side) for v in (row0, row1, col0, col1))
        tile[top - row0 : bottom - row0, left - col0 : right - col0] = self.pixels[top:bottom, left:right]
        return tile


@dataclass(frozen=True)
class GatheredTargets:
    """Targets of many regions as rows of a short table."""

    table: NDArray[np.float32]
    ids: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.table.shape[1]

    def __getitem__(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        return self.table.take(self.ids[index] % len(self.table), axis=0)

    def rows(self, index: NDArray[np.intp]) -> sparse.csr_matrix:
        return sparse.csr_matrix(self[index])

    def mean(self, axis: int) -> NDArray[np.float32]:
        return self.table.mean(axis)

    def subset(self, index: NDArray[np.intp]) -> GatheredTargets:
        return GatheredTargets(self.table, self.ids[index])


class Kept:
    """Copies blocks and sums into memory, over what it took some time before: the map of a slide has 10 GB."""

    def __init__(self, scale: Scale) -> None:
        self.ring = np.zeros((16, scale.n_genes, scale.block_px, scale.block_px), np.float32)
        self.sums = np.zeros((1, 0), np.float32)
        self.place = itertools.count()

    def write(self, values: NDArray[np.float32]) -> None:
        _, rows, cols = values.shape
        self.ring[next(self.place) % len(self.ring), :, :rows, :cols] = values

    def put(self, share: RegionShare) -> None:
        sums = share.sums
        if len(sums) > len(self.sums) or sums.shape[1:] != self.sums.shape[1:]:
            self.sums = np.zeros_like(sums)
        self.sums[: len(sums)] = sums


class Figure(NamedTuple):
    """One line of the result."""

    name: str
    tiles_per_s: float
    mpx_per_s: float
    share_of_bare: float | None
    peak_gb: float | None


def bins(scale: Scale, size_um: int) -> Lattice:
    """A turned lattice that fills most of the slide."""
    pitch, angle = size_um / MPP, np.deg2rad(LATTICE_DEGREES)
    cos, sin = np.cos(angle), np.sin(angle)
    n = int(0.97 * scale.slide_px / (pitch * (cos + sin)))
    row, col = (part.ravel() for part in np.mgrid[:n, :n])
    offset = 0.01 * scale.slide_px
    place = np.array([[cos, -sin, offset + sin * n * pitch], [sin, cos, offset], [0, 0, 1]])
    return Lattice(row, col, place @ np.diag([pitch, pitch, 1]))


def make_slide(scale: Scale) -> TrainingSlide:
    table = np.random.default_rng(1).gamma(1.0, 1.0, (4096, scale.n_genes)).astype(np.float32)
    lattices = [bins(scale, size) for size in BIN_UM]
    measured = tuple(
        MeasuredRegions(f"{size} µm", lattice, GatheredTargets(table, np.arange(len(lattice))))
        for size, lattice in zip(BIN_UM, lattices, strict=True)
    )
    return TrainingSlide("slide", Pixels(scale.slide_px), scale.slide_px, scale.slide_px, measured)


def make_network(scale: Scale) -> Network:
    torch.manual_seed(0)
    decoder = DecoderConfig(scale.widths, scale.hidden, 0.5)
    return Network(build_encoder(scale.encoder, None), decoder, scale.n_genes, "mean")


class Bench:
    """A slide, a network and a device."""

    def __init__(self, scale: Scale, fabric: Fabric, *, compile: bool) -> None:
        self.scale, self.fabric, self.compile = scale, fabric, compile
        self.gpu = fabric.device.type == "cuda"
        self.layout = torch.channels_last if self.gpu else torch.contiguous_format
        self.slide = make_slide(scale)

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.fabric.device)

    def alternate(self, runs: dict[str, Callable[[], float]]) -> tuple[dict[str, float], dict[str, float | None]]:
        """Median of the seconds that each run returns, after one to warm up, and the device's peak memory in GB."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        peak: dict[str, float | None] = dict.fromkeys(runs)
        for repeat in range(self.scale.repeats + 1):
            for name, run in runs.items():
                if self.gpu:
                    torch.cuda.reset_peak_memory_stats(self.fabric.device)
                elapsed = run()
                if repeat:
                    taken[name].append(elapsed)
                if repeat and self.gpu:
                    peak[name] = torch.cuda.max_memory_allocated(self.fabric.device) / 1e9
        return {name: median(values) for name, values in taken.items()}, peak

    def random_image(self, n_tiles: int, side: int) -> Tensor:
        return torch.randint(256, (n_tiles, 3, side, side), dtype=torch.uint8, device=self.fabric.device)

    def forward(self, network: Any, image: Tensor) -> Tensor:
        with self.fabric.autocast():
            return network(image.float().contiguous(memory_format=self.layout))

    def prepared(self) -> Network:
        return make_network(self.scale).to(self.fabric.device).to(memory_format=self.layout)

    def predict(self) -> list[Figure]:
        scale, network = self.scale, self.prepared()
        halo_px = receptive_radius_px(network)
        plan = self.plan(network, Tiling(scale.predict_px, halo_px, scale.predict_batch))
        n_tiles = self.walk(network, plan, None)
        bare_network = network.eval()
        image = self.random_image(scale.predict_batch, scale.predict_px + 2 * halo_px)

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(-(-n_tiles // scale.predict_batch)):
                self.forward(bare_network, image)

        taken, peak = self.alternate(
            {
                "forward": lambda: self.seconds(bare),
                "predict, results dropped": lambda: self.seconds(lambda: self.walk(network, plan, None)),
                "predict, results kept": lambda: self.seconds(lambda: self.walk(network, plan, Kept(scale))),
            }
        )
        print(
            f"map and 2 µm bins of {scale.slide_px:,}² working px: {taken['predict, results kept']:.1f} s", flush=True
        )
        done = -(-n_tiles // scale.predict_batch) * scale.predict_batch
        per_tile = {name: s / (done if name == "forward" else n_tiles) for name, s in taken.items()}
        return figures(per_tile, peak, scale.predict_px, "forward")

    def plan(self, network: Network, tiling: Tiling) -> PredictPlan:
        side = -(-self.scale.slide_px // MAP_STRIDE)
        started = time.perf_counter()
        regions, tissue = self.slide.measured[0].regions, np.ones((side, side), bool)
        window = window_side(tiling.tile_px, self.scale.block_px)
        region_plan = plan_regions(regions, Grid(side, side, MAP_STRIDE), tissue)
        print(f"plan of {len(regions):,} bins: {time.perf_counter() - started:.1f} s, in no figure", flush=True)
        head = network.head.select(np.arange(self.scale.n_genes))
        pooled = network.head.in_features < self.scale.n_genes  # as `predict` does
        return PredictPlan(region_plan, tiling, window, head, head, pooled)

    def walk(self, network: Network, plan: PredictPlan, kept: Kept | None) -> int:
        """Tiles run; results are handed to threads, as by `predict`."""
        side, unit = self.scale.slide_px // MAP_STRIDE, self.scale.block_px
        starts = range(0, side, unit)
        blocks = [(r, min(r + unit, side), c, min(c + unit, side)) for r, c in itertools.product(starts, starts)]
        visits = plan.visits(blocks, lambda _window: False)

        def take(lent: Lent[Any], put: Callable[[Any], None] | None) -> None:
            with lent() as values:
                if put is not None:
                    put(values)

        with (
            Walk(network, self.slide.read, plan, visits, self.fabric) as walk,
            Writer(BLOCK_WRITERS) as block_writer,
            Writer() as row_writer,
        ):
            for result in walk.results(show_progress_bar=False):
                for _, lent in result.blocks:
                    block_writer.submit(take, lent, None if kept is None else kept.write)
                if result.share is not None:
                    row_writer.submit(take, result.share, None if kept is None else kept.put)
        return walk.n_tiles

    def fit(self) -> list[Figure]:
        scale, steps = self.scale, self.scale.steps
        network = self.prepared()
        bare_network = torch.compile(network, dynamic=False) if self.compile else network
        image = self.random_image(scale.train_batch, scale.train_px)
        with tempfile.TemporaryDirectory() as folder:
            one_step = self.resident_step(network, self.run(Path(folder)))

            def bare() -> None:
                network.train()
                for _ in range(steps):
                    self.forward(bare_network, image).float().square().mean().backward()
                    network.zero_grad()

            taken, peak = self.alternate(
                {
                    "forward + backward": lambda: self.seconds(bare),
                    "fit, batch on the device": lambda: self.seconds(lambda: [one_step() for _ in range(steps)]),
                    "fit": lambda: self.train(network),
                }
            )
        per_tile = {name: s / (steps * scale.train_batch) for name, s in taken.items()}
        return figures(per_tile, peak, scale.train_px, "forward + backward")

    def run(self, folder: Path, max_steps: int | None = None) -> Run:
        scale = self.scale
        params = TrainParams(tile_px=scale.train_px, compile=self.compile, max_steps=max_steps, anneal=False)
        return Run([self.slide], [], params, folder, "benchmark", max_epochs=10**6, batch_size=scale.train_batch)

    def resident_step(self, network: Network, run: Run) -> Callable[[], Tensor]:
        """The engine's step on a batch that is on the device."""
        trainer = Trainer(network, run, self.fabric)
        plan = plan_batches(trainer.fixed_tiles, run.batch_size)[0]
        host = make_batch(plan, pin=self.gpu)
        batch = host.moved(trainer.features.copies.up) if self.gpu else host

        def step() -> Tensor:
            network.train()
            return trainer.step(batch, run.params.lr)

        return step

    def train(self, network: Network) -> float:
        """Seconds of the steps after the first ones, taken where a step ends."""
        first, last = self.scale.warm_up_steps, self.scale.warm_up_steps + self.scale.steps
        n_done, times = itertools.count(1), []

        def look(*_: Any) -> None:
            if next(n_done) in (first, last):
                self.wait()
                times.append(time.perf_counter())

        hook = register_optimizer_step_post_hook(look)
        try:
            with tempfile.TemporaryDirectory() as folder:  # a new one, or the run would go on from the last one's state
                train(network, self.run(Path(folder), last), self.fabric, show_progress_bar=False)
        finally:
            hook.remove()
        return times[1] - times[0]


def figures(per_tile: dict[str, float], peak: dict[str, float | None], tile_px: int, bare: str) -> list[Figure]:
    return [
        Figure(name, 1 / s, tile_px**2 / s / 1e6, None if name == bare else per_tile[bare] / s, peak[name])
        for name, s in per_tile.items()
    ]


def show(found: Sequence[Figure]) -> None:
    print("\n| | tiles/s | Mpx/s | of bare | peak GB on the device |\n|---|---:|---:|---:|---:|")
    for name, tiles, mpx, share, peak in found:
        share_text = "" if share is None else f"{share:.0%}"
        print(f"| {name} | {tiles:.2f} | {mpx:.3f} | {share_text} | {'' if peak is None else f'{peak:.2f}'} |")


def verdict(found: Sequence[Figure]) -> list[str]:
    """The targets, for a full run on a GPU."""
    by_name = {figure.name: figure for figure in found}
    lines = []
    for name in ("predict, results kept", "fit"):
        share = by_name[name].share_of_bare or 0.0
        lines.append(
            f"{'met' if share >= KEPT_SHARE else 'MISSED'}: {name} {share:.0%} of bare, {KEPT_SHARE:.0%} asked"
        )
    peak = by_name["fit"].peak_gb or float("inf")
    lines.append(f"{'met' if peak <= TRAIN_GB else 'MISSED'}: fit takes {peak:.2f} GB, {TRAIN_GB:.0f} allowed")
    return lines


def check_imports() -> None:
    found = sorted(UNWANTED & {name.split(".")[0] for name in sys.modules})
    if found:
        raise SystemExit(f"the engine and the model must not import {', '.join(found)}")


def describe(bench: Bench) -> str:
    device, scale = bench.fabric.device, bench.scale
    name = torch.cuda.get_device_name(device) if bench.gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return (
        f"{name}; torch {torch.__version__}, timm {timm.__version__}, {bench.fabric._precision.precision}, "
        f"compile={bench.compile}; {scale}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; no figure means much")
    parser.add_argument("--encoder", help="timm model (default: resnet18; a tiny one with --small)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, in bare and end to end alike")
    parser.add_argument("--only", choices=["predict", "fit"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    for field in ("slide_px", "steps", "warm_up_steps", "repeats", "predict_batch", "train_batch"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    sizes = {k: v for k, v in given.items() if k in Scale.__annotations__}
    bench = Bench(
        replace(SMALL if given["small"] else FULL, **sizes), make_fabric(given.get("device")), compile=given["compile"]
    )
    heading = describe(bench)
    print(heading, flush=True)
    found: list[Figure] = []
    with fixed_shapes(bench.fabric.device):
        for part in ("predict", "fit"):
            if given.get("only", part) == part:
                found += getattr(bench, part)()
    show(found)
    if bench.gpu and not given["small"] and "only" not in given:
        print("\n" + "\n".join(verdict(found)))
    if "json" in given:
        given["json"].write_text(json.dumps({"run": heading, "figures": [f._asdict() for f in found]}, indent=1))
    check_imports()


if __name__ == "__main__":
    main()
