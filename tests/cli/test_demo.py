"""The demo, on a slide so small that little is learnt: what it writes, what it holds out, and when it fails."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from matplotlib.figure import Figure
from PIL import Image

import pixnet_sd as ps
from pixnet_sd.cli import main

SMALL = ["--size-um=200", "--epochs=1", "--seed=0"]
TABLE, PREDICTED = "square_008um", "pixnet_sample_square_008um"


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo") / "output"


@pytest.fixture(scope="module")
def printed(output) -> str:
    """What a demo of which nothing is asked prints."""
    with redirect_stdout(StringIO()) as stdout:
        assert main(["demo", *SMALL, "--min-pcc=-1", f"--output={output}"]) == 0
    return stdout.getvalue()


def x_um(table) -> np.ndarray:
    return table.obsm["spatial"][:, 0] * 0.5


def test_leaves_store_picture_and_a_model_of_the_left_part(output, printed):
    slide = sd.read_zarr(output / "sample.zarr")
    assert {"pixnet_circles_8um", PREDICTED} <= set(slide.tables)
    assert "pixnet_map" in slide.images
    assert ps.PixNet.load(output / "model").genes == list(slide.tables[TABLE].var_names)
    picture = np.asarray(Image.open(output / "demo.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500
    assert picture.std() > 20
    # on no bin right of 70 % of the slide, nor of a gap of 32 µm before
    (used,) = ps.PixNet.load(output / "model").record.slides.values()
    left = {key: int((x_um(slide.tables[key]) < 108).sum()) for key in used["training_regions"]}
    assert used["training_regions"] == left
    assert set(left) == {TABLE, "square_016um"}


def test_scores_are_of_the_held_out_bins(output, printed):
    """As computed here: bins matched by id, genes by name, and 0 where a gene is predicted constant."""
    slide = sd.read_zarr(output / "sample.zarr")
    measured, predicted = slide.tables[TABLE], slide.tables[PREDICTED]
    names = dict(zip(measured.obs["location_id"], measured.obs_names, strict=True))
    rows = [names[key] for key in predicted.obs["instance_id"]]
    right = measured.obs_names[x_um(measured) >= 140]
    genes = measured.var_names[measured.var["spatially_varying"]]
    truth = ps.datasets.sample_truth_bins(8, size_um=200, mpp=0.5, seed=0)
    truth = np.log1p(1e4 * truth.div(truth.sum(axis=1), axis=0))
    found = pd.DataFrame(predicted.X, index=rows, columns=predicted.var_names)
    for gene in genes:
        x, y = found.loc[right, gene].to_numpy(), truth.loc[right, gene].to_numpy()
        expected = 0.0 if x.std() == 0 else np.corrcoef(x, y)[0, 1]
        row = re.search(rf"^{gene} +(\S+) +(\S+)$", printed, re.MULTILINE)
        assert float(row[2]) == pytest.approx(expected, abs=2e-3)


def test_fails_when_too_little_is_learnt(output, printed, tmp_path, capsys, monkeypatch):
    """Also when the correlation is no number, which is never at least anything."""
    monkeypatch.setattr(ps.tl, "fit", lambda *_, **__: ps.PixNet.load(output / "model"))  # all as it was found before
    monkeypatch.setattr(ps.datasets, "sample", lambda **_: sd.read_zarr(output / "sample.zarr"))
    monkeypatch.setattr(ps.tl, "predict", lambda *_, **__: None)
    monkeypatch.setattr(ps.pl, "gene_map", lambda *_, **__: Figure())
    assert main(["demo", *SMALL, "--min-pcc=nan", f"--output={tmp_path}"]) == 1
    assert "FAILED" in capsys.readouterr().err
