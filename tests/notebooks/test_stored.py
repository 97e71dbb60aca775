"""What is stored of the notebooks is what a reader should see."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tests.notebooks.conftest import FOLDER, MACHINE, outputs, pictures, stored, text

NAMES = ["1_quickstart", "2_visium_hd", "3_he_only", "4_evaluate", "5_her2st"]
UNFIT = re.compile(rf"Warning|Traceback|\r|it/s|object at 0x|{MACHINE.pattern}")


def test_there_are_five() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs(name: str) -> None:
    """Run from top to bottom; no errors, warnings, progress bars or paths of the machine; pictures to the end."""
    notebook = stored(name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert [cell["source"] for cell in code if set(cell["metadata"]) - {"tags"}] == []
    assert [output for output in outputs(notebook) if output["output_type"] == "error"] == []
    assert [text(output) for output in outputs(notebook) if UNFIT.search(text(output))] == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 1_000_000
    found = [np.asarray(picture.convert("RGB")) for picture in pictures(notebook)]
    assert len(found) >= 2
    assert min(min(picture.shape[:2]) for picture in found) > 200
    assert len(np.unique(found[-1].reshape(-1, 3), axis=0)) > 100  # an image or a map, not a line drawing
