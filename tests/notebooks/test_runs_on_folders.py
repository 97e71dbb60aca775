"""Notebooks that read folders run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from PIL import Image

COARSER = 2
SHOWN = ["ERBB2", "COL1A1", "IGKC"]


def write_coarser(section: Path, target: Path) -> None:
    """Write a section of `datasets.her2st` with a coarser image and fewer genes."""
    target.mkdir(parents=True)
    meta = json.loads((section / "meta.json").read_text())
    with Image.open(section / "image.jpg") as image:
        image.draft("RGB", (image.width // COARSER, image.height // COARSER))  # only this is decoded
        image.save(target / "image.jpg")
        meta |= {"image_width": image.width, "image_height": image.height, "um_per_px": meta["um_per_px"] * COARSER}
    (target / "meta.json").write_text(json.dumps(meta))
    spots = pd.read_csv(section / "spots.tsv", sep="\t")
    spots[["pixel_x", "pixel_y"]] /= COARSER
    spots.to_csv(target / "spots.tsv", sep="\t", index=False)
    counts = pd.read_csv(section / "counts.tsv.gz", sep="\t", index_col=0)
    counts[list(dict.fromkeys([*SHOWN, *counts.columns[:400]]))].to_csv(target / "counts.tsv.gz", sep="\t")


@pytest.mark.slow
def test_visium_hd(check_runs: Callable[..., None]) -> None:
    check_runs("2_visium_hd")


@pytest.mark.slow
def test_her2st(
    check_runs: Callable[..., None],
    render: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not render.HER2ST.is_dir():
        pytest.skip(f"no her2st sections at {render.HER2ST}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a slide has more than Pillow expects
    coarse = tmp_path_factory.mktemp("her2st")
    for name in ("C2", "C3", "C4"):
        write_coarser(render.HER2ST / name, coarse / name)
    check_runs("5_her2st", her2st=coarse)
