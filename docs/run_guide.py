"""Run the Python code of the documentation's pages, each page from top to bottom, on small drawn slides.

    python docs/run_guide.py                         # all pages
    python docs/run_guide.py guide/cells index       # some

Each page has a folder of its own, with the stores and files that the pages speak of. `fit` is run with a tiny network
and few epochs where the page does not say otherwise: it is shown that the code runs, not that something is learnt. Code
below a line ``% not run: why`` is compiled only.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(?P<skip>% not run:[^\n]*\n)?```python\n(?P<code>.*?)```", re.DOTALL)
SMALL: dict[str, Any] = {
    "genes": 34,
    "max_epochs": 1,
    "device": "cpu",
    "show_progress_bar": False,
}
GROUPS: dict[str, dict[str, Any]] = {
    "model_params": {"encoder": "resnet10t", "encoder_weights": None, "decoder_width": 8},
    "train_params": {"tile_px": 128, "max_steps": 2},
}
INSTEAD = {
    "size_um=2000, n_genes=500": "size_um=200, n_genes=40",
    'max_epochs=100, train_params={"max_steps": 2000}': 'max_epochs=1, train_params={"max_steps": 2}',
    '"decoder_width": 128': '"decoder_width": 16',
    '"encoder": "convnext_tiny"': '"encoder": "test_convnext"',
    "fit(spots)": 'fit(spots, train_params={"tile_px": 256})',
}
"""What pages say, and what is run in its place."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the code of the documentation's pages.")
    parser.add_argument("pages", nargs="*", help="such as guide/cells; default: all with Python code")
    chosen = parser.parse_args().pages or sorted(pages_with_code())
    import matplotlib as mpl

    mpl.use("Agg")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        make_world(world)
        failed = [page for page in chosen if not run_page(page, world, Path(folder) / page.replace("/", "-"))]
    print(f"{len(chosen) - len(failed)} pages ran" + (f", failed: {', '.join(failed)}" if failed else ""))
    return len(failed)


def pages_with_code() -> list[str]:
    """Pages of this folder that have code to run, without their ending."""
    pages = [path.relative_to(DOCS) for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    return [str(page.with_suffix("")) for page in pages if any(run for run, _ in blocks(str(page.with_suffix(""))))]


def blocks(page: str) -> list[tuple[bool, str]]:
    """Whether to run, and code."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for said, instead in INSTEAD.items():
        text = text.replace(said, instead)
    return [(found["skip"] is None, found["code"]) for found in BLOCK.finditer(text)]


def make_world(folder: Path) -> None:
    """Everything that pages speak of: stores, Space Ranger folders, a model, weights, annotations."""
    import timm
    from safetensors.torch import save_file

    import pixnet_sd as ps

    folder.mkdir()
    os.chdir(folder)
    use_small_networks()
    ps.datasets.write_visium_hd("outs", size_um=200, dataset_id="slide")
    ps.datasets.write_visium("visium/outs", size_um=1000, dataset_id="")
    for seed, name in enumerate(("slide", "slide_2", "slide_3", "breast_hd")):
        ps.datasets.sample(size_um=200, dataset_id="slide", cells=True, seed=seed).write(f"{name}.zarr")
    write_images()
    ps.tl.fit(ps.io.open_store("slide.zarr"), checkpoint_dir="models/breast")
    encoder = timm.create_model("resnet10t", features_only=True)
    save_file({key: value.contiguous() for key, value in encoder.state_dict().items()}, "resnet18.safetensors")
    geometry = {"type": "Polygon", "coordinates": [[[100, 100], [300, 100], [300, 300], [100, 300], [100, 100]]]}
    feature = {"type": "Feature", "properties": {"name": "tumour"}, "geometry": geometry}
    Path("annotations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def write_images() -> None:
    """An H&E image as a TIFF file, and as a store with nothing else."""
    import spatialdata as sd
    import tifffile

    image = sd.get_pyramid_levels(sd.read_zarr("slide_2.zarr").images["slide_full_image"], n=0)
    tifffile.imwrite("slide.tif", image.transpose("y", "x", "c").values, photometric="rgb")
    parsed = sd.models.Image2DModel.parse(image.data, c_coords=("r", "g", "b"), scale_factors=[2])
    sd.SpatialData(images={"he": parsed}).write("he.zarr")


def use_small_networks() -> None:
    """Let `fit` take small settings where a page says nothing."""
    import pixnet_sd as ps

    fit = ps.tl.fit

    @functools.wraps(fit)
    def small(sdata: Any, **options: Any) -> Any:
        for name, params in GROUPS.items():
            given = options.get(name, {})
            options[name] = params | given if isinstance(given, dict) else given
        return fit(sdata, **{**SMALL, **options})

    ps.tl.fit = small


def run_page(page: str, world: Path, folder: Path) -> bool:
    """Run a page's blocks one after the other in one namespace; says how it went."""
    shutil.copytree(world, folder)
    os.chdir(folder)
    started, namespace = time.monotonic(), {"__name__": "__main__", **prepare(page)}
    for number, (run, code) in enumerate(blocks(page), start=1):
        try:
            tree = compile(ast.parse(code), f"{page}, block {number}", "exec")
            if run:
                exec(tree, namespace)
        except Exception:  # noqa: BLE001 - whatever the code of a page does
            traceback.print_exc()
            print(f"{page}, block {number}: FAILED\n{code}")
            return False
    print(f"{page}: {number} blocks, {time.monotonic() - started:.0f} s", flush=True)
    return True


def prepare(page: str) -> dict[str, Any]:
    """What a page speaks of without making it; and what it makes is not there yet."""
    import spatialdata as sd

    import pixnet_sd as ps

    if page == "visium_hd":
        shutil.rmtree("slide.zarr")
    if page == "objectives":
        return {"ps": ps, "sdata": ps.io.open_store("slide.zarr")}
    if page != "index":
        return {}
    return {"other_slide": sd.read_zarr("he.zarr")}


if __name__ == "__main__":
    sys.exit(main())
