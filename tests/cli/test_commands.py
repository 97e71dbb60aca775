"""What each command prints and leaves."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel

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
    with (
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as stderr,
        mock.patch.object(sys, "argv", ["pixnet-sd", *arguments]),
    ):
        assert main() == 0
    logger.removeHandler(log)
    return stdout.getvalue(), log.stream.getvalue(), stderr.getvalue()


@pytest.fixture(scope="module")
def predicted(slide, fitted) -> str:
    """What `predict` prints."""
    with redirect_stdout(StringIO()) as stdout:
        assert main(["predict", str(slide), *PREDICT]) == 0
    return stdout.getvalue()


def test_fit(slide, fitted):
    """The folder on stdout, and a log that reads well in a file."""
    printed, log, shown = fitted
    assert (printed, shown) == (f"{slide.with_name('model')}\n", "")
    model = ps.PixNet.load(printed.strip())
    assert (model.record.training["seed"], len(model.genes)) == (1, 6)
    assert list(model.record.slides) == ["p1"]
    assert model.record.slides["p1"]["held_out_regions"][TABLE] > 0
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in log.splitlines()), log
    assert "1 of 1 epochs" in log
    assert "autosharding" not in log  # another library's warning


def test_paper(slide, tiny, tmp_path, capsys):
    """The paper's groups, but for what is given."""
    arguments = [*tiny, "--paper", "--lr=1e-3", "--no-record-model", f"--checkpoint-dir={tmp_path / 'paper'}"]
    assert main(["fit", f"x={slide}", *arguments]) == 0
    assert capsys.readouterr().out == ""
    record = ps.PixNet.load(tmp_path / "paper").record
    assert (record.aggregation, record.training["optimizer"], record.training["lr"]) == ("sum", "adam", 1e-3)
    assert list(record.slides) == ["x"]


def test_predict(slide, predicted, capsys):
    """What was written, and nothing of what other libraries print; nothing when it is there."""
    written = ["images/pixnet_map", "labels/pixnet_map_tissue", f"tables/pixnet_{BINS}"]
    assert predicted.splitlines() == written
    assert np.isfinite(sd.read_zarr(slide).tables[f"pixnet_{BINS}"].X).all()
    assert main(["predict", str(slide), *PREDICT]) == 0
    assert capsys.readouterr().out == ""


def test_evaluate(slide, predicted, capsys):
    output = slide.with_name("genes.csv")
    keys = [f"--table-key={TABLE}", f"--predicted-key=pixnet_{BINS}"]
    assert main(["evaluate", str(slide), *keys, f"--output={output}"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = ps.tl.evaluate(sd.read_zarr(slide), table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(expected.attrs, abs=1e-4)
    pd.testing.assert_frame_equal(pd.read_csv(output, index_col="gene"), expected, check_like=True, rtol=1e-5)
    assert main(["evaluate", str(slide), *keys, f"--output={slide}"]) == 1  # a folder
    assert "--output" in capsys.readouterr().err


def test_cross_validate(drawn, tmp_path, tiny, capsys):
    arguments = [f"one={drawn}", f"other={drawn}", *tiny, "--validation=none", f"--checkpoint-dir={tmp_path / 'cv'}"]
    assert main(["cross-validate", *arguments, f"--output={tmp_path / 'genes.csv'}"]) == 0
    summary = pd.read_csv(tmp_path / "cv" / "summary.csv")
    assert list(summary["how"]) == ["mean per slide", "pooled"]
    assert f"{summary['MSE'][0]:.4f}" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "genes.csv")["slide"]) == {"one", "other"}
    assert {path.name for path in (tmp_path / "cv").iterdir() if path.is_dir()} == {"one", "other"}


def info(capsys, path: Path, *options: str) -> list[str]:
    assert main(["info", str(path), *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_info_of_a_store(slide, predicted, capsys):
    lines = info(capsys, slide)
    expected = (
        "  sample_full_image: 200 x 200 px, 3 channels, uint8, 2 levels, in 'sample'",
        f"  {BINS}: 408 shapes, bins of 8 µm",
        f"  {TABLE}: 408 rows x 40 genes, measured, annotates '{BINS}', bins of 8 µm",
        f"  pixnet_{BINS}: 408 rows x 6 genes, predicted by pixnet_sd, annotates '{BINS}', bins of 8 µm",
        f"model: {slide.with_name('model')}",
        "slide image: 'sample_full_image' in coordinate system 'sample'",
        f"resolution: 1 µm per pixel, from the lattice pitch of the 8 µm bins '{BINS}'; 0.20 x 0.20 mm",
        "gene map of this model: 50 x 50 px of 4 µm, 6 channels",
    )
    assert [line for line in expected if line not in lines] == []


def test_info_of_a_checkpoint(slide, fitted, capsys):
    model = slide.with_name("model")
    lines = info(capsys, model)
    record = ps.PixNet.load(model).record
    pcc = np.array([p for p in record.held_out_pcc if p is not None])
    expected = (
        f"{model}: pixnet_sd checkpoint",
        f"  genes: 6: {', '.join(record.genes)}",
        "  objective: mse_pcc, aggregation: mean, target_sum: 10000",
        "  encoder: test_resnet, random weights",
        "  training slides: 1",
    )
    assert [line for line in expected if line not in lines] == []
    assert any(line.startswith("  held-out PCC: ") and line.endswith(f"mean {pcc.mean():.3f}") for line in lines)


def test_info_of_a_slide_without_a_resolution(tmp_path, capsys):
    pixels = np.full((3, 64, 64), 200, np.uint8)
    sdata = sd.SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))})
    sdata.attrs["pixnet_sd"] = {"model": "/gone"}
    sdata.write(tmp_path / "he.zarr")
    lines = info(capsys, tmp_path / "he.zarr")
    assert {"tables: none", "model: /gone (not there)"} <= set(lines)
    assert any(line.startswith("slide image: cannot be told.") for line in lines)
    text = "\n".join(info(capsys, tmp_path / "he.zarr", "--mpp=0.5"))
    assert "resolution: 0.5 µm per pixel, from the argument mpp" in text
    assert "gene map of a model with the defaults of fit: 16 x 16 px of 2 µm, 250 channels" in text
