"""What each command prints and leaves."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from tests.cli.conftest import printed
from tests.slide.conftest import make_image

import pixnet_sd as ps
from pixnet_sd.cli import main

TABLE, BINS = "square_008um", "sample_square_008um"
PREDICT = [f"--shapes-key={BINS}", "--device=cpu", "--tile-px=256"]


@pytest.fixture(scope="module")
def slide(drawn, tmp_path_factory) -> Path:
    return Path(shutil.copytree(drawn, tmp_path_factory.mktemp("commands") / "p1.zarr"))


@pytest.fixture(scope="module")
def fitted(slide, tiny):
    """What `fit` prints, logs and shows, from a config file with one option overruled."""
    config = slide.with_name("run.toml")
    config.write_text(f'slides = "{slide}"\nvalidation = 0.25\n[fit]\nseed = 1\ncheckpoint_dir = "nowhere"\n')
    options = [option for option in tiny if "progress" not in option]
    arguments = ["fit", "--config", str(config), *options, "--checkpoint-dir", str(slide.with_name("model"))]
    logger, log = logging.getLogger("pixnet_sd"), logging.StreamHandler(StringIO())
    logger.addHandler(log)
    with redirect_stderr(StringIO()) as stderr, mock.patch.object(sys, "argv", ["pixnet-sd", *arguments]):
        out = printed()
    logger.removeHandler(log)
    return out, log.stream.getvalue(), stderr.getvalue()


@pytest.fixture(scope="module")
def predicted(slide, fitted) -> str:
    """What `predict` prints."""
    return printed("predict", slide, *PREDICT)


def test_fit(slide, fitted):
    """The folder on stdout, and a log that reads well in a file."""
    out, log, shown = fitted
    assert (out, shown) == (f"{slide.with_name('model')}\n", "")
    model = ps.PixNet.load(out.strip())
    assert (model.record.training["seed"], len(model.genes), list(model.record.slides)) == (1, 6, ["p1"])
    assert model.record.slides["p1"]["held_out_regions"][TABLE] > 0
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in log.splitlines()), log
    assert "1 of 1 epochs" in log
    assert "autosharding" not in log  # another library's warning


def test_paper(slide, tiny, tmp_path):
    """The paper's groups, but for what is given."""
    folder = tmp_path / "paper"
    options = ["--paper", "--lr=1e-3", "--no-record-model", f"--checkpoint-dir={folder}"]
    assert printed("fit", f"x={slide}", *tiny, *options) == ""
    record = ps.PixNet.load(folder).record
    assert (record.objective, record.aggregation) == ("mse_pcc", "sum")
    assert (record.training["optimizer"], record.training["lr"]) == ("adam", 1e-3)
    assert list(record.slides) == ["x"]


def test_predict(slide, predicted):
    """What was written, and nothing of what other libraries print; nothing when it is there."""
    assert predicted.splitlines() == ["images/pixnet_map", "labels/pixnet_map_tissue", f"tables/pixnet_{BINS}"]
    assert np.isfinite(sd.read_zarr(slide).tables[f"pixnet_{BINS}"].X).all()
    assert printed("predict", slide, *PREDICT) == ""


def test_evaluate(slide, predicted, capsys):
    output = slide.with_name("genes.csv")
    arguments = ["evaluate", str(slide), f"--table-key={TABLE}", f"--predicted-key=pixnet_{BINS}"]
    lines = printed(*arguments, f"--output={output}").splitlines()
    expected = ps.tl.evaluate(sd.read_zarr(slide), table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    shown = {name: float(value) for name, value in map(str.split, lines)}
    assert shown == pytest.approx(expected.attrs, abs=1e-4)
    pd.testing.assert_frame_equal(pd.read_csv(output, index_col="gene"), expected, check_like=True, rtol=1e-5)
    assert main([*arguments, f"--output={slide}"]) == 1  # a folder
    assert "--output" in capsys.readouterr().err


def test_cross_validate(drawn, tmp_path, tiny):
    folder, output = tmp_path / "cv", tmp_path / "genes.csv"
    options = ["--validation=none", f"--checkpoint-dir={folder}", f"--output={output}"]
    out = printed("cross-validate", f"one={drawn}", f"other={drawn}", *tiny, *options)
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary["how"]) == ["mean per slide", "pooled"]
    assert f"{summary['MSE'][0]:.4f}" in out
    assert set(pd.read_csv(output)["slide"]) == {"one", "other"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"one", "other"}


def test_info_of_a_store(slide, predicted):
    expected = {
        "  sample_full_image: 200 x 200 px, 3 channels, uint8, 2 levels, in 'sample'",
        f"  {BINS}: 408 shapes, bins of 8 µm",
        f"  {TABLE}: 408 rows x 40 genes, measured, annotates '{BINS}', bins of 8 µm",
        f"  pixnet_{BINS}: 408 rows x 6 genes, predicted by pixnet_sd, annotates '{BINS}', bins of 8 µm",
        f"model: {slide.with_name('model')}",
        "slide image: 'sample_full_image' in coordinate system 'sample'",
        f"resolution: 1 µm per pixel, from the lattice pitch of the 8 µm bins '{BINS}'; 0.20 x 0.20 mm",
        "gene map of this model: 50 x 50 px of 4 µm, 7 channels",
    }
    assert expected - set(printed("info", slide).splitlines()) == set()


def test_info_of_a_checkpoint(slide, fitted):
    model = slide.with_name("model")
    out, record = printed("info", model), ps.PixNet.load(model).record
    expected = {
        f"{model}: pixnet_sd checkpoint",
        f"  genes: 6: {', '.join(record.genes)}",
        "  objective: nb_pcc, aggregation: sum, target_sum: 10000",
        "  encoder: test_resnet, random weights",
        "  training slides: 1",
    }
    assert expected - set(out.splitlines()) == set()
    mean = np.mean([pcc for pcc in record.held_out_pcc if pcc is not None])
    assert re.search(rf"^  held-out PCC: .*mean {mean:.3f}$", out, re.MULTILINE)


def test_info_of_a_slide_without_a_resolution(tmp_path):
    sdata = sd.SpatialData(images={"he": make_image(64, 64)}, attrs={"pixnet_sd": {"model": "/gone"}})
    sdata.write(tmp_path / "he.zarr")
    out = printed("info", tmp_path / "he.zarr")
    assert {"tables: none", "model: /gone (not there)"} <= set(out.splitlines())
    assert "\nslide image: cannot be told." in out
    out = printed("info", tmp_path / "he.zarr", "--mpp=0.5")
    assert "resolution: 0.5 µm per pixel, from the argument mpp" in out
    assert "gene map of a model with the defaults of fit: 16 x 16 px of 2 µm, 251 channels" in out
