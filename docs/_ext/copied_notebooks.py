"""The repository's notebooks as pages: copied into the documentation's folder, out of which Sphinx reads nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
SOURCE, TARGET = DOCS.parent / "notebooks", DOCS / "notebooks"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", copy_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def copy_notebooks(*_: object) -> None:
    """Bring the copies up to date; `copy2` keeps the time, so that only changed notebooks are read again."""
    wanted = {path.name: path for path in SOURCE.glob("*.ipynb")}
    TARGET.mkdir(exist_ok=True)
    for old in TARGET.glob("*.ipynb"):
        if old.name not in wanted:
            old.unlink()
    for name, path in wanted.items():
        shutil.copy2(path, TARGET / name)
