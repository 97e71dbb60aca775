"""The demo, on a slide so small that little is learnt: what it writes, what it holds out, and when it fails."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from matplotlib.figure import Figure
from PIL import Image
from tests.cli.conftest import printed

import pixnet_sd as ps
from pixnet_sd.cli import main

SMALL = ["--size-um=200", "--epochs=1", "--seed=0"]
TABLE, PREDICTED = "square_008um", "pixnet_sample_square_008um"


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[Path, str]:
    """Folder of a demo of which nothing is asked, and what it prints."""
    output = tmp_path_factory.mktemp("demo") / "output"
    return output, printed("demo", *SMALL, "--min-pcc=-1", f"--output={output}")


def x_um(table) -> np.ndarray:
    return table.obsm["spatial"][:, 0] * 0.5


def test_leaves_store_picture_and_a_model_of_the_left_part(shown):
    output, _ = shown
    slide, model = sd.read_zarr(output / "sample.zarr"), ps.PixNet.load(output / "model")
    assert {"pixnet_circles_8um", PREDICTED} <= set(slide.tables)
    assert "pixnet_map" in slide.images
    assert model.genes == list(slide.tables[TABLE].var_names)
    picture = np.asarray(Image.open(output / "demo.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500
    assert picture.std() > 20
    # on no bin right of 70 % of the slide, nor of a gap of 32 µm before
    (used,) = model.record.slides.values()
    left = {key: int((x_um(slide.tables[key]) < 108).sum()) for key in (TABLE, "square_016um")}
    assert used["training_regions"] == left


def test_scores_are_of_the_held_out_bins(shown):
    """As computed here: bins matched by id, genes by name, and 0 where a gene is predicted constant."""
    output, text = shown
    slide = sd.read_zarr(output / "sample.zarr")
    measured, predicted = slide.tables[TABLE], slide.tables[PREDICTED]
    names = pd.Series(measured.obs_names, index=measured.obs["location_id"])
    found = pd.DataFrame(predicted.X, names[predicted.obs["instance_id"]], predicted.var_names)
    truth = ps.datasets.sample_truth_bins(8, size_um=200, mpp=0.5, seed=0, library_size=False)
    truth = np.log1p(1e4 * truth.div(truth.sum(axis=1), axis=0))
    right = measured.obs_names[x_um(measured) >= 140], measured.var_names[measured.var["spatially_varying"]]
    expected = found.loc[right].corrwith(truth.loc[right]).fillna(0)
    expected["mean"] = expected.mean()
    rows = re.findall(r"^(\w+) +(?:NaN|-?0\.\d+) +(-?0\.\d+)$", text, re.MULTILINE)
    assert {gene: float(pcc) for gene, pcc in rows} == pytest.approx(expected.to_dict(), abs=2e-3)


def test_levels_are_of_the_same_bins_at_their_depth(shown):
    """Counts of the bins on tissue beside the share of the bin's counts that is expected of a gene."""
    output, text = shown
    slide = sd.read_zarr(output / "sample.zarr")
    measured, predicted = slide.tables[TABLE], slide.tables[PREDICTED]
    found = predicted[predicted.obs["on_tissue"]]
    counts = measured.to_df().set_axis(measured.obs["location_id"]).loc[found.obs["instance_id"]]
    shares = np.expm1(found.to_df()) / 1e4
    at_depth = shares.mul(counts.sum(axis=1).to_numpy(), axis=0)
    for gene in ("COL1A1", "MS4A1"):
        row = re.search(rf"^{gene} +(\d\S*) +(\d\S*) +(\d\S*) +\d\S* +\d\S* +\d\S*$", text, re.MULTILINE)
        assert row is not None
        means = counts[gene].mean(), at_depth[gene].mean()
        assert [float(each) for each in row.groups()] == pytest.approx([*means, means[1] / means[0]], abs=2e-3)


def test_fails_when_too_little_is_learnt(shown, tmp_path, capsys, monkeypatch):
    """Also when the correlation is no number, which is never at least anything."""
    output, _ = shown
    monkeypatch.setattr(ps.tl, "fit", lambda *_, **__: ps.PixNet.load(output / "model"))  # all as it was found before
    monkeypatch.setattr(ps.datasets, "sample", lambda **_: sd.read_zarr(output / "sample.zarr"))
    monkeypatch.setattr(ps.tl, "predict", lambda *_, **__: None)
    monkeypatch.setattr(ps.pl, "gene_map", lambda *_, **__: Figure())
    assert main(["demo", *SMALL, "--min-pcc=nan", f"--output={tmp_path}"]) == 1
    assert "FAILED" in capsys.readouterr().err
