"""Aggregation without the full-resolution map against Eq. 4-5 to the letter: time and memory, forward + backward.

    python benchmarks/aggregation.py

One tile, its feature map D, a linear head. Both ways give every region's sum of every gene, and the gradients with
respect to D and the head:

- fast: `Network.predict_regions` with the operator A.
- literal: apply the head at every pixel, resize to the tile, sum inside the masks. Of two ways to sum the quicker one
  runs: many small regions gather their pixels and add them up (dense masks of the bins take 20 times as long), few
  large ones are a product of a dense mask matrix and the map (gathering takes 6 times as long, and 5 GB).

A and the masks, which either way makes once from the regions' geometry, are timed by themselves ("prepare"). Times are
medians of alternating runs in this process. Memory is the peak resident size of a process of its own, preparation
included, above that when imports and inputs are there and both ways have run once at a small size. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pixnet_sd.geometry import Circles, Grid, Regions, squares
from pixnet_sd.model import DecoderConfig, Network, Operator, build_operator

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.model.literal import inside, resize

STRIDE, BIN_PX, RADIUS_PX, LATTICE_ANGLE = 4, 4.0, 50.0, 0.01


@dataclass(frozen=True)
class Problem:
    """A tile, its regions, and what the gradients start from."""

    tile_px: int
    regions: Regions
    features: Tensor  # D, (1, C, h, w)
    network: Network  # of which only the head is used
    upstream: Tensor  # (n, M)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.features, self.network.head.weight, self.network.head.bias]


class NoEncoder(nn.Module):
    """Features are given."""

    channels = (1, 1, 1, 1)


class Result(NamedTuple):
    values: Tensor
    gradients: Sequence[Tensor]


def flat_pixels(regions: Regions, k: int, tile_px: int) -> NDArray[np.int64]:
    """Flat indices of the tile's pixels whose centre is in region k, tested one by one within its box."""
    x0, y0, x1, y1 = np.clip(np.round(regions.bounds[k]) + np.array([-1, -1, 1, 1]), 0, tile_px).astype(int)
    row, col = np.mgrid[y0:y1, x0:x1]
    return (row * tile_px + col)[inside(regions, k, col + 0.5, row + 0.5)]


def make_regions(kind: str, tile_px: int, n: int) -> Regions:
    """n bins of a slightly turned lattice in the middle of the tile, or n circles of which some reach beyond it."""
    if kind == "circles":
        return Circles(np.random.default_rng(0).uniform(0, tile_px, (n, 2)), RADIUS_PX)
    side = round(n**0.5)
    at = (np.arange(side) - (side - 1) / 2) * BIN_PX
    turn = np.array([[np.cos(LATTICE_ANGLE), np.sin(LATTICE_ANGLE)], [-np.sin(LATTICE_ANGLE), np.cos(LATTICE_ANGLE)]])
    lattice = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
    return squares(lattice @ turn + tile_px / 2, BIN_PX, LATTICE_ANGLE)


def make_problem(kind: str, tile_px: int, n: int, channels: int, genes: int) -> Problem:
    regions, generator = make_regions(kind, tile_px, n), torch.Generator().manual_seed(0)
    low = tile_px // STRIDE
    return Problem(
        tile_px,
        regions,
        torch.randn(1, channels, low, low, generator=generator).requires_grad_(),
        Network(NoEncoder(), DecoderConfig((channels, 1, 1, 1), (1, 1, 1)), genes, "sum"),
        torch.randn(len(regions), genes, generator=generator),
    )


def make_operator(problem: Problem) -> Operator:
    """A."""
    height, width = problem.features.shape[-2:]
    return build_operator(problem.regions, Grid(height, width, STRIDE))


def make_masks(problem: Problem) -> Tensor | list[Tensor]:
    """Dense and flat masks (n, pixels) of circles, the flat pixels of each bin."""
    n = len(problem.regions)
    pixels = [torch.from_numpy(flat_pixels(problem.regions, k, problem.tile_px)) for k in range(n)]
    if not isinstance(problem.regions, Circles):
        return pixels
    masks = torch.zeros(n, problem.tile_px**2)
    for mask, listed in zip(masks, pixels, strict=True):
        mask[listed] = 1
    return masks


def fast(problem: Problem, operator: Operator) -> Result:
    values = problem.network.predict_regions(problem.features, operator)
    return Result(values.detach(), torch.autograd.grad(values, problem.leaves, problem.upstream))


def literal(problem: Problem, masks: Tensor | Sequence[Tensor]) -> Result:
    full = resize(problem.network.gene_map(problem.features)[0], STRIDE).flatten(1)
    if isinstance(masks, Tensor):
        values = masks @ full.T
    else:
        lengths = torch.tensor([len(pixels) for pixels in masks]).expand(len(full), -1).contiguous()
        values = torch.segment_reduce(full[:, torch.cat(list(masks))], "sum", lengths=lengths, axis=1).T
    return Result(values.detach(), torch.autograd.grad(values, problem.leaves, problem.upstream))


WAYS: dict[str, tuple[Callable[[Problem], Any], Callable[[Problem, Any], Result]]] = {
    "fast": (make_operator, fast),
    "literal": (make_masks, literal),
}


def seconds(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - start, result


def off_by(result: Result, reference: Result) -> float:
    """Largest difference of values and gradients, each relative to the largest of its kind."""
    pairs = zip((result.values, *result.gradients), (reference.values, *reference.gradients), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM, the peak since the last reset, of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) / 1024


def peak_mb(way: str, kind: str, arguments: argparse.Namespace) -> float:
    """Peak of one run above what was there before, in this process."""
    prepare, run = WAYS[way]
    small = make_problem(kind, 64, 16, 4, 3)
    run(small, prepare(small))
    problem = make_problem(kind, arguments.tile_px, getattr(arguments, kind), arguments.channels, arguments.genes)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the run would use what the imports left, for free
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak: ru_maxrss still has that of the imports
    before = resident_mb("VmRSS")
    run(problem, prepare(problem))
    return resident_mb("VmHWM") - before


def measure_peak(way: str, kind: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way, kind]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def compare(kind: str, arguments: argparse.Namespace) -> None:
    """Print a kind's rows of the table."""
    n = getattr(arguments, kind)
    memory = {way: measure_peak(way, kind) for way in WAYS}
    problem = make_problem(kind, arguments.tile_px, n, arguments.channels, arguments.genes)
    prepared = {way: seconds(prepare, problem) for way, (prepare, _) in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats + 1):
        results = {}
        for way, (_, run) in WAYS.items():
            elapsed, results[way] = seconds(run, problem, prepared[way][1])
            if repeat:  # the first is a warm-up
                times[way].append(elapsed)
    elapsed_of = {way: median(values) for way, values in times.items()}
    for way in WAYS:
        print(f"| {n:,} {kind} | {way} | {prepared[way][0]:.3f} | {elapsed_of[way]:.4f} | {memory[way]:.0f} | |")
    print(
        f"| {n:,} {kind} | **literal / fast** | | **{elapsed_of['literal'] / elapsed_of['fast']:.0f}** "
        f"| **{memory['literal'] / memory['fast']:.0f}** | {off_by(results['fast'], results['literal']):.0e} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile-px", type=int, default=512)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--bins", type=int, default=4096, help="bins of 2 µm (4 px), a square number")
    parser.add_argument("--circles", type=int, default=300, help="circles of radius 50 px")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--peak-of", nargs=2, metavar=("WAY", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(json.dumps(peak_mb(*arguments.peak_of, arguments)))
        return
    print(
        f"{arguments.tile_px}² px, {arguments.channels} channels, {arguments.genes} genes, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}\n\n"
        "| regions | way | s, prepare | s, forward + backward | peak MB | largest relative difference |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    for kind in ("bins", "circles"):
        compare(kind, arguments)


if __name__ == "__main__":
    main()
