"""Notebooks that read folders run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from PIL import Image

from pixnet_sd.datasets import write_visium_hd

COARSER, SIDE_UM = 2, 4200
SHOWN = ["ERBB2", "COL1A1", "IGKC"]


def write_part(section: Path, target: Path) -> None:
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
    genes = list(dict.fromkeys([*SHOWN, *counts.columns[:400]]))
    counts.loc[counts.index.intersection(spots.index), genes].to_csv(target / "counts.tsv.gz", sep="\t")


@pytest.mark.slow
def test_visium_hd(check_runs: Callable[..., None], tmp_path: Path) -> None:
    write_visium_hd(tmp_path / "outs", size_um=320, n_genes=8)  # a folder that is there is taken
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
    parts = tmp_path_factory.mktemp("her2st")
    for name in ("C2", "C3", "C4"):
        write_part(render.HER2ST / name, parts / name)
    check_runs("5_her2st", her2st=parts)
