"""A model of the whole transcriptome on real tumour sections: fit, factors of the map, one gene of it; peak memory.

    python benchmarks/whole_transcriptome.py --data ../shared/data/her2st

Trained on two sections for an epoch (memory does not depend on how many), on every gene that both measured: the
most that there is here, as ``genes="all"`` leaves out genes of fewer than 10 counts. A third section is predicted with
``write="factors"``.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import spatialdata as sd
from her2st import MODEL, PIXNET, TRAIN, packaged_weights

import pixnet_sd as ps

GENES, GIB = 15_000, 6.0
TRAINING, TEST = ("C3", "C4"), "C2"


def main(arguments: list[str] | None = None) -> tuple[int, float]:
    """Run it; genes and peak GiB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sections")
    parser.add_argument("--objective", default="mse_pcc", choices=("nb_pcc", "mse_pcc"))
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder, started = Path(temporary), time.monotonic()
        stores = {}
        for name, sdata in ps.datasets.her2st(options.data).items():
            stores[name] = folder / f"{name}.zarr"
            sdata.write(stores[name])
        slides = {name: sd.read_zarr(stores[name]) for name in TRAINING}
        genes = [set(table.var_names) for sdata in slides.values() for table in sdata.tables.values()]
        settings = PIXNET | {"max_epochs": options.epochs, "objective": options.objective}
        model = ps.tl.fit(
            slides,
            genes=sorted(set.intersection(*genes)),
            model_params=MODEL | {"encoder_weights": packaged_weights(folder)},
            train_params=TRAIN | {"tile_px": 1536},
            checkpoint_dir=folder / "model",
            **settings,
        )
        fitted = time.monotonic()
        sdata = sd.read_zarr(stores[TEST])
        ps.tl.predict(sdata, model, write="factors")
        predicted = time.monotonic()
        gene = ps.get.gene_map(sdata, "ERBB2")["scale0"]["image"].values
        print(f"fit {fitted - started:.0f} s, factors {predicted - fitted:.0f} s", flush=True)
        print(f"ERBB2: {gene.shape[1]} x {gene.shape[2]} px, {np.ptp(gene):.2f} from lowest to highest")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    n_genes = len(model.genes)
    print(f"{'met' if n_genes >= GENES else 'NOT MET'}: {n_genes} genes (at least {GENES})")
    print(f"{'met' if peak <= GIB else 'NOT MET'}: {peak:.2f} GiB at the peak (at most {GIB:g})")
    return n_genes, peak


if __name__ == "__main__":
    main()
