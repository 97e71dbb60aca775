"""Notebooks as they are stored, and a kernel that runs several, one after the other."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from PIL import Image

FOLDER = Path(__file__).parents[2] / "notebooks"
MACHINE = re.compile(r"(?<![\w.:/<])/(?:tmp|home|root|work|mnt|opt|private|usr|var|Users)/|\b[A-Z]:\\")


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


@pytest.fixture(scope="session")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pixnet_sd_render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """Starts with the first notebook: torch and spatialdata are loaded once for all of a file."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.fixture
def check_runs(render: ModuleType, kernel: AsyncKernelManager, tmp_path: Path) -> Callable[..., None]:
    """Run a notebook in an empty folder, with what takes long cut short; an error in a cell is raised."""

    def check(name: str, **options: Any) -> None:
        parameters = {"max_epochs": 1, "n_symmetries": 1}
        done = render.execute(FOLDER / f"{name}.ipynb", tmp_path, parameters, kernel=kernel, **options)
        render.clean(done, tmp_path)
        assert [text(output) for output in outputs(done) if MACHINE.search(text(output))] == []
        assert len(pictures(done)) == len(pictures(stored(name)))

    return check
