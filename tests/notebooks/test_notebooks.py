"""Notebooks: they run, and what is stored of them is what a reader should see."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.:/<])/(?:tmp|home|root|work|mnt|opt|private|usr|var|Users)/|\b[A-Z]:\\")
MOST_BYTES = 1_000_000

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pixnet_sd_render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def text(output: Any) -> str:
    """All that is written in an output."""
    parts = [value for key, value in output.get("data", {}).items() if not key.startswith("image/")]
    return "".join("".join(part) for part in [*parts, output.get("text", "")])


def pictures(notebook: Any) -> list[Image.Image]:
    found = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode("".join(png)))) for png in found]


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["1_quickstart", "2_visium_hd", "3_he_only", "4_evaluate", "5_her2st"]


@pytest.mark.slow
@every
def test_runs(path: Path, render: ModuleType, tmp_path: Path) -> None:
    """From an empty folder, with what takes long cut short; an error in a cell is raised."""
    if path.stem == "5_her2st" and not render.HER2ST.is_dir():
        pytest.skip(f"no her2st sections at {render.HER2ST}")
    done = render.execute(path, tmp_path, {"max_epochs": 1, "n_symmetries": 1})
    render.clean(done, tmp_path)
    assert [text(output) for output in outputs(done) if MACHINE.search(text(output))] == []
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert len(pictures(done)) == len(pictures(stored))


@every
def test_was_run_from_top_to_bottom(path: Path) -> None:
    code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert [cell["source"] for cell in code if set(cell["metadata"]) - {"tags"}] == []


@every
def test_outputs_are_fit_to_be_seen(path: Path) -> None:
    """No errors, warnings, progress bars or paths of the machine that made them."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert [output for output in outputs(stored) if output["output_type"] == "error"] == []
    unfit = re.compile(rf"Warning|Traceback|\r|it/s|object at 0x|{MACHINE.pattern}")
    assert [text(output) for output in outputs(stored) if unfit.search(text(output))] == []
    assert path.stat().st_size <= MOST_BYTES


@every
def test_ends_in_pictures(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    found = [np.asarray(picture.convert("RGB")) for picture in pictures(stored)]
    assert len(found) >= 2
    assert min(min(picture.shape[:2]) for picture in found) > 200
    last = found[-1].reshape(-1, 3)
    assert len(np.unique(last, axis=0)) > 100  # an image or a map, in up to 256 colours, not a line drawing
