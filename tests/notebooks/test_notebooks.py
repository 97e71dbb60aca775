"""Notebooks run, and what is stored of them is what a reader should see."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from PIL import Image

from pixnet_sd.datasets import write_visium_hd

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ["1_quickstart", "2_visium_hd", "3_he_only", "4_evaluate", "5_her2st"]
MACHINE = re.compile(r"(?<![\w.:/<])/(?:tmp|home|root|work|mnt|opt|private|usr|var|Users)/|\b[A-Z]:\\")
UNFIT = re.compile(rf"Warning|Traceback|\r|it/s|object at 0x|{MACHINE.pattern}")
QUICK = {"max_epochs": 1, "n_symmetries": 1, "size_um": 360}
COARSER, SIDE_UM = 2, 4200


def stored(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def text(output: Any) -> str:
    """All that is written in an output."""
    parts = [value for key, value in output.get("data", {}).items() if not key.startswith("image/")]
    return "".join("".join(part) for part in [*parts, output.get("text", "")])


def pictures(notebook: Any) -> list[Image.Image]:
    found = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode("".join(png)))) for png in found]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_outputs(path: Path) -> None:
    """Run from top to bottom; no errors, warnings, progress bars or paths of the machine; pictures to the end."""
    assert path.stem in NAMES
    notebook = stored(path.stem)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert [cell["source"] for cell in code if set(cell["metadata"]) - {"tags"}] == []
    assert [output for output in outputs(notebook) if output["output_type"] == "error"] == []
    assert [text(output) for output in outputs(notebook) if UNFIT.search(text(output))] == []
    assert path.stat().st_size <= 1_000_000
    found = pictures(notebook)
    assert len(found) >= 2
    assert min(min(picture.size) for picture in found) > 200
    assert len(found[-1].convert("RGB").getcolors(1 << 24)) > 100  # an image or a map, not a line drawing


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One kernel for all notebooks, one after the other: torch and spatialdata are loaded once."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


def her2st_part(section: Path, target: Path) -> None:
    """Write a corner of a section of `datasets.her2st` with a coarser image and fewer genes."""
    target.mkdir(parents=True)
    meta = json.loads((section / "meta.json").read_text())
    mpp = meta["um_per_px"] * COARSER
    side_px = int(SIDE_UM / mpp)
    with Image.open(section / "image.jpg") as image:
        image.draft("RGB", (image.width // COARSER, image.height // COARSER))  # only this is decoded
        image.crop((0, 0, side_px, side_px)).save(target / "image.jpg")
    meta |= {"image_width": side_px, "image_height": side_px, "um_per_px": mpp}
    (target / "meta.json").write_text(json.dumps(meta))
    spots = pd.read_csv(section / "spots.tsv", sep="\t", index_col="spot")
    spots[["pixel_x", "pixel_y"]] /= COARSER
    spots = spots[(spots[["pixel_x", "pixel_y"]] < side_px).all(axis=1)]
    spots.to_csv(target / "spots.tsv", sep="\t")
    counts = pd.read_csv(section / "counts.tsv.gz", sep="\t", index_col=0)
    genes = list(dict.fromkeys(["ERBB2", "COL1A1", "IGKC", *counts.columns[:400]]))
    counts.loc[counts.index.intersection(spots.index), genes].to_csv(target / "counts.tsv.gz", sep="\t")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, kernel: AsyncKernelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with what takes long cut short; an error in a cell is raised."""
    render = runpy.run_path(str(FOLDER / "render.py"))
    folder, parts = tmp_path / "run", tmp_path / "her2st"
    folder.mkdir()
    if name == "2_visium_hd":
        write_visium_hd(folder / "outs", size_um=320, n_genes=8)  # a folder that is there is taken
    if name == "5_her2st":
        if not render["HER2ST"].is_dir():
            pytest.skip(f"no her2st sections at {render['HER2ST']}")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a slide has more than Pillow expects
        for section in ("C2", "C3", "C4"):
            her2st_part(render["HER2ST"] / section, parts / section)
    done = render["execute"](FOLDER / f"{name}.ipynb", folder, QUICK, kernel=kernel, her2st=parts)
    render["clean"](done, folder)
    assert [text(output) for output in outputs(done) if MACHINE.search(text(output))] == []
    assert len(pictures(done)) == len(pictures(stored(name)))
