"""A gene map kept as its factors: bytes beside the map of all genes, time to one gene of it, and equality.

    python benchmarks/factors.py

A slide of 12,000 x 12,000 px (drawn tissue, repeated), so 3,000 x 3,000 map pixels; C = 32 channels, M = 250 genes. The
network has random weights, which changes none of the figures but how well its floats compress. Both forms are written
by `tl.predict`; a gene is then read in a process of its own, from the opened store to the array in memory. The first
reading of a process also imports what reading needs; it is printed, and the limit is for the gene after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import dask.array as da
import numpy as np
import spatialdata as sd
import torch
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity

import pixnet_sd as ps
from pixnet_sd.model import Network

BYTES, SECONDS, DIFFERENCE = 1.1, 1.5, 1e-5

READ = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, spatialdata as sd, pixnet_sd as ps
ps.get.gene_map
sdata = sd.read_zarr(sys.argv[1])
found = []
for gene in sys.argv[3:]:
    started = time.perf_counter()
    ps.get.gene_map(sdata, gene, key_added=sys.argv[2])["scale0"]["image"].data.compute()
    found.append(time.perf_counter() - started)
print(json.dumps(found))
"""


def slide(folder: Path, side_px: int) -> sd.SpatialData:
    """A store with an image of that side."""
    drawn = ps.datasets.sample(size_um=min(side_px, 1500), mpp=1.0, bin_um=(16,))
    tile = drawn.images["sample_full_image"]["scale0"]["image"].data
    times = -(-side_px // tile.shape[1])
    image = da.tile(tile, (1, times, times))[:, :side_px, :side_px].rechunk((3, 2048, 2048))
    parsed = Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={"": Identity()})
    sdata = sd.SpatialData.init_from_elements({"image": parsed})
    sdata.write(folder / "slide.zarr")
    return sd.read_zarr(folder / "slide.zarr")


def model(folder: Path, n_channels: int, n_genes: int) -> ps.PixNet:
    """A small network with as many channels and genes as asked for."""
    torch.manual_seed(0)
    small = ps.datasets.sample(size_um=200, mpp=1.0, bin_um=(16,))
    options = {
        "checkpoint_dir": folder / "model",
        "genes": 5,
        "validation": None,
        "device": "cpu",
        "train_params": {"max_steps": 2},
        "show_progress_bar": False,
    }
    params = ps.ModelParams(encoder="test_resnet", encoder_weights=None, decoder_width=n_channels, working_mpp=1.0)
    fitted = ps.tl.fit(small, objective="mse_pcc", model_params=params, **options)
    genes = [f"gene {k}" for k in range(n_genes)]
    network = Network(fitted.network.encoder, fitted.record.decoder, n_genes, "mean")
    return ps.PixNet(network, replace(fitted.record, genes=genes, held_out_pcc=[], weights_sha256="random"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def seconds(store: Path, key: str, genes: tuple[str, str]) -> list[float]:
    """To one gene at full resolution, the first of a process and the next."""
    found = subprocess.run(
        [sys.executable, "-c", READ, str(store), key, *genes], check=True, capture_output=True, text=True
    )
    return [float(each) for each in json.loads(found.stdout.splitlines()[-1])]


def difference(sdata: sd.SpatialData, genes: list[str]) -> float:
    """Largest difference between both forms, relative to a gene's range, over all levels."""
    forms = [ps.get.gene_map(sdata, genes, key_added=key) for key in ("factors", "full")]
    worst = 0.0
    for level in forms[0]:
        found, expected = (form[level]["image"].values for form in forms)
        spread = np.ptp(expected, axis=(1, 2), keepdims=True)
        worst = max(worst, float((np.abs(found - expected) / spread).max()))
    return worst


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the benchmark and print its verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side-px", type=int, default=12_000)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        sdata = slide(Path(folder), options.side_px)
        network = model(Path(folder), options.channels, options.genes)
        settings = {"mpp": 1.0, "device": "cpu", "show_progress_bar": False}
        store = Path(str(sdata.path))
        for key, kept in (("full", "map"), ("factors", "factors")):
            started = time.monotonic()
            ps.tl.predict(sdata, network, write=kept, key_added=key, **settings)
            print(f"predict, write={kept!r}: {time.monotonic() - started:.0f} s", flush=True)
        bytes_ = {"full": size(store / "images" / "full_map"), "factors": size(store / "images" / "factors_factors")}
        bytes_["factors"] += size(store / "tables" / "factors_factors_head")
        times = {
            key: np.array([seconds(store, key, ("gene 3", "gene 7")) for _ in range(options.repeats)]) for key in bytes_
        }
        found = {
            "bytes, relative to C/M": bytes_["factors"] / bytes_["full"] / (options.channels / options.genes),
            "s to one gene": float(np.median(times["factors"][:, 1])),
            "largest difference": difference(sdata, ["gene 0", "gene 7"]),
        }
    print(f"{bytes_['full'] / 1e9:.2f} GB of genes, {bytes_['factors'] / 1e9:.2f} GB of factors")
    for key, each in times.items():
        print(f"{key}: first gene of a process, s: {np.round(each[:, 0], 2)}; next: {np.round(each[:, 1], 2)}")
    for (what, value), limit in zip(found.items(), (BYTES, SECONDS, DIFFERENCE), strict=True):
        print(f"{'met' if value <= limit else 'NOT MET'}: {what}: {value:.3g} (at most {limit:g})")
    return found


if __name__ == "__main__":
    main()
