"""`pl.gene_map` of one gene from a map of many: seconds, and the share of the map's bytes that is read.

    python benchmarks/plots.py --folder scratch

Writes a slide of 12,000 x 12,000 px at 0.5 µm with a gene map of 250 channels at 2 µm, 3,000 x 3,000 px of noise, which
hardly compresses, and a table of 16 µm bins with counts of the same genes: about 12 GB in `folder`, used again by the
next run. Then draws one gene, each time from an object that was opened anew: the whole slide with its measured bins,
the same without, and a crop of 500 µm at the map's finest level. It is rendered and saved as PNG within the time.

Bytes are counted where Zarr gets them from its store, those of the map alone, against the size of the map's files.
Times are medians after one drawing that is not counted (it imports what it needs); the files are in the system's cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import spatialdata as sd
from anndata import AnnData
from matplotlib import pyplot as plt
from scipy import sparse
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity
from zarr.storage import LocalStore

import pixnet_sd as ps
from pixnet_sd.store import Transaction
from pixnet_sd.store.gene_map import GeneMapWriter, image_transforms, map_layout, tissue_labels

MPP, MAP_UM, BIN_UM = 0.5, 2.0, 16
MAP_KEY = "pixnet_map"
MOST_S, MOST_SHARE = 1.5, 0.05


class Figures(NamedTuple):
    """Of one kind of picture."""

    seconds: float
    cpu: float
    read: int
    of: int

    @property
    def share(self) -> float:
        return self.read / self.of


def main(arguments: Sequence[str] | None = None) -> dict[str, Figures]:
    options = parse(arguments)
    mpl.use("Agg")
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")
    store = options.folder / f"plots_{options.map_px}_{options.genes}.zarr"
    if not (store / "images" / MAP_KEY).exists():
        write_slide(store, options.map_px, options.genes)
    middle = options.map_px * MAP_UM / 2
    half = min(250.0, middle)
    gene = gene_names(options.genes)[options.genes // 2]
    pictures: dict[str, dict[str, Any]] = {
        "H&E, measured, predicted": {},
        "H&E, predicted": {"panels": ["image", "predicted"]},
        "crop of 500 µm, finest level": {"crop_um": [middle - half] * 2 + [middle + half] * 2, "scale": "full"},
    }
    found = {name: measure(store, gene, options.repeats, arguments) for name, arguments in pictures.items()}
    print("| one gene | s | s of CPU | MB read | share of the map |\n|---|---:|---:|---:|---:|")
    for name, figures in found.items():
        print(
            f"| {name} | {figures.seconds:.2f} | {figures.cpu:.2f} | {figures.read / 1e6:.1f} | {figures.share:.2%} |"
        )
    print("\n" + "\n".join(verdicts(found)))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("scratch"), help="where the slide goes (default: scratch)")
    parser.add_argument("--map-px", type=int, default=3000, help="side of the map (default: 3000)")
    parser.add_argument("--genes", type=int, default=250, help="channels of the map (default: 250)")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(arguments)


def gene_names(n: int) -> list[str]:
    return [f"GENE{k}" for k in range(n)]


def write_slide(store: Path, map_px: int, n_genes: int) -> None:
    """An image, bins with counts, and the map."""
    store.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    objects(map_px, n_genes).write(store, overwrite=True)
    write_map(sd.read_zarr(store), map_px, n_genes)
    print(f"{store} written in {time.monotonic() - started:.0f} s", flush=True)


def objects(map_px: int, n_genes: int) -> sd.SpatialData:
    rng, px = np.random.default_rng(0), round(map_px * MAP_UM / MPP)
    pixels = np.tile(rng.integers(0, 256, (3, 500, 500), dtype=np.uint8), (1, -(-px // 500), -(-px // 500)))
    image = Image2DModel.parse(
        pixels[:, :px, :px],
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2, 2, 2, 2],
        chunks=(3, 1024, 1024),
        transformations={"slide": Identity()},
    )
    side = max(2, int(map_px * MAP_UM / BIN_UM))
    row, col = (index.ravel() for index in np.indices((side, side)))
    pitch = BIN_UM / MPP
    centres = np.stack([col + 0.5, row + 0.5], axis=1) * pitch
    key = f"slide_square_{BIN_UM:03d}um"
    shapes = ShapesModel.parse(centres, geometry=0, radius=pitch / 2, transformations={"slide": Identity()})
    counts = sparse.random(len(row), n_genes, 0.2, "csr", np.float32, rng, lambda n: rng.integers(1, 9, n))
    obs = pd.DataFrame({"array_row": row, "array_col": col, "region": key, "id": np.arange(len(row))})
    obs["region"] = obs["region"].astype("category")
    obs.index = obs.index.astype(str)
    table = AnnData(counts, obs=obs, var=pd.DataFrame(index=gene_names(n_genes)))
    table = TableModel.parse(table, region=key, region_key="region", instance_key="id")
    return sd.SpatialData(images={"slide_full_image": image}, shapes={key: shapes}, tables={"square": table})


def write_map(sdata: sd.SpatialData, map_px: int, n_genes: int) -> None:
    rng, pitch = np.random.default_rng(1), MAP_UM / MPP
    layout, transforms = map_layout(n_genes, (map_px, map_px)), image_transforms(sdata, "slide_full_image")
    noise = rng.random((n_genes, layout.block_px, layout.block_px), dtype=np.float32)
    with Transaction(sdata, {MAP_KEY: "images", f"{MAP_KEY}_tissue": "labels"}) as out:
        writer = GeneMapWriter(
            out,
            key=MAP_KEY,
            channels=gene_names(n_genes),
            layout=layout,
            transforms=transforms,
            pitch_image_px=pitch,
            fingerprint="noise",
        )
        for block in writer.pending:
            row0, row1, col0, col1 = block
            writer.write(block, noise[:, : row1 - row0, : col1 - col0])
        tissue = tissue_labels(np.ones((map_px, map_px), bool), pitch, transforms)
        note = {"image": "slide_full_image", "coordinate_system": "slide", "mpp": MPP, "objective": "mse_pcc"}
        elements = {MAP_KEY: writer.element(), f"{MAP_KEY}_tissue": tissue}
        out.commit(elements, provenance={"maps": {MAP_KEY: note}})


def measure(store: Path, gene: str, repeats: int, arguments: dict[str, Any]) -> Figures:
    """Draw a picture some times."""
    seconds, cpu, read = [], [], []
    for repeat in range(repeats + 1):
        sdata = sd.read_zarr(store)
        with counted() as count, tempfile.TemporaryDirectory() as folder:
            started, cpu_started = time.perf_counter(), time.process_time()
            ps.pl.gene_map(sdata, gene, save=Path(folder) / "map.png", show=False, **arguments)
            elapsed, cpu_elapsed = time.perf_counter() - started, time.process_time() - cpu_started
        plt.close("all")
        if repeat:
            seconds.append(elapsed)
            cpu.append(cpu_elapsed)
            read.append(count[0])
    files = (file for file in (store / "images" / MAP_KEY).rglob("*") if file.is_file())
    return Figures(median(seconds), median(cpu), max(read), sum(file.stat().st_size for file in files))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of the map that Zarr gets from its stores, in the one entry of a list."""
    count, get = [0], LocalStore.get

    async def counting(self: LocalStore, key: str, *arguments: Any, **options: Any) -> Any:
        found = await get(self, key, *arguments, **options)
        if found is not None and MAP_KEY in (self.root / key).parts:
            count[0] += len(found)
        return found

    LocalStore.get = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        LocalStore.get = get  # type: ignore[method-assign]


def verdicts(found: dict[str, Figures]) -> list[str]:
    slowest = max(figures.seconds for figures in found.values())
    most = max(figures.share for figures in found.values())
    return [
        f"{'met' if slowest <= MOST_S else 'MISSED'}: one gene in {slowest:.2f} s, {MOST_S:g} allowed",
        f"{'met' if most <= MOST_SHARE else 'MISSED'}: {most:.2%} of the map's bytes read, {MOST_SHARE:.0%} allowed",
    ]


if __name__ == "__main__":
    figures = main()
    sys.exit(any(line.startswith("MISSED") for line in verdicts(figures)))
