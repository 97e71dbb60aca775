"""Each subcommand as a process: what it prints, what it leaves, and what it says of bad input."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd

import pixnet_sd as ps

TABLE, BINS = "square_008um", "sample_square_008um"


@pytest.fixture(scope="module")
def slide(drawn: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(drawn, tmp_path_factory.mktemp("processes") / "p1.zarr"))


@pytest.fixture(scope="module")
def fitted(slide, pixnet_sd, tiny):
    """`fit`, from a config file with one option overruled."""
    config = slide.with_name("run.toml")
    config.write_text(f'slides = "{slide}"\nvalidation = 0.25\n[fit]\nseed = 1\ncheckpoint_dir = "nowhere"\n')
    return pixnet_sd("fit", "--config", config, *tiny, "--checkpoint-dir", slide.with_name("model"))


@pytest.fixture(scope="module")
def predicted(slide, fitted, pixnet_sd):
    return pixnet_sd("predict", slide, f"--shapes-key={BINS}", "--device=cpu", "--tile-px=256")


def test_fit(slide, fitted):
    """The folder on stdout, and a log that reads well in a file on stderr."""
    assert fitted.stdout == f"{slide.with_name('model')}\n"
    model = ps.PixNet.load(fitted.stdout.strip())
    assert (model.record.training["seed"], len(model.genes)) == (1, 6)
    assert list(model.record.slides) == ["p1"]
    assert model.record.slides["p1"]["held_out_regions"][TABLE] > 0
    lines = fitted.stderr.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines), fitted.stderr
    assert any("1 of 1 epochs" in line for line in lines)
    assert "\r" not in fitted.stderr
    assert "autosharding" not in fitted.stderr  # another library's warning


def test_predict(slide, predicted):
    """What was written, and nothing of what other libraries print."""
    written = ["images/pixnet_map", "labels/pixnet_map_tissue", f"tables/pixnet_{BINS}"]
    assert predicted.stdout.splitlines() == written
    sdata = sd.read_zarr(slide)
    assert np.isfinite(sdata.tables[f"pixnet_{BINS}"].X).all()


def test_evaluate(slide, predicted, pixnet_sd):
    output = slide.with_name("genes.csv")
    done = pixnet_sd("evaluate", slide, f"--table-key={TABLE}", f"--predicted-key=pixnet_{BINS}", f"--output={output}")
    printed = dict(line.split() for line in done.stdout.splitlines())
    expected = ps.tl.evaluate(sd.read_zarr(slide), table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(expected.attrs, abs=1e-4)
    found = pd.read_csv(output, index_col="gene")
    pd.testing.assert_frame_equal(found, expected, check_like=True, rtol=1e-5)


def test_info(slide, predicted, pixnet_sd):
    text = pixnet_sd("info", slide).stdout
    for line in (
        "  sample_full_image: 200 x 200 px, 3 channels, uint8, 2 levels, in 'sample'",
        f"  {BINS}: 408 shapes, bins of 8 µm",
        f"  {TABLE}: 408 rows x 40 genes, measured, annotates '{BINS}', bins of 8 µm",
        f"  pixnet_{BINS}: 408 rows x 6 genes, predicted by pixnet_sd, annotates '{BINS}', bins of 8 µm",
        f"model: {slide.with_name('model')}",
        "slide image: 'sample_full_image' in coordinate system 'sample'",
        f"resolution: 1 µm per pixel, from the lattice pitch of the 8 µm bins '{BINS}'; 0.20 x 0.20 mm",
        "gene map of this model: 50 x 50 px of 4 µm, 6 channels",
    ):
        assert line in text.splitlines(), text


def test_cross_validate(drawn, tmp_path, pixnet_sd, tiny):
    other = shutil.copytree(drawn, tmp_path / "other.zarr")
    arguments = [f"one={drawn}", other, *tiny, "--validation=none", f"--checkpoint-dir={tmp_path / 'cv'}"]
    done = pixnet_sd("cross-validate", *arguments, f"--output={tmp_path / 'genes.csv'}")
    summary = pd.read_csv(tmp_path / "cv" / "summary.csv")
    assert list(summary["how"]) == ["mean per slide", "pooled"]
    assert f"{summary['MSE'][0]:.4f}" in done.stdout
    assert set(pd.read_csv(tmp_path / "genes.csv")["slide"]) == {"one", "other"}
    assert {path.name for path in (tmp_path / "cv").iterdir() if path.is_dir()} == {"one", "other"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("fit nowhere.zarr", 1, "pixnet-sd fit: error: There is nothing at 'nowhere.zarr'."),
        ("fit a/slide.zarr b/slide.zarr", 1, "Two slides are called 'slide'"),
        ("fit slide.zarr --n-gens 3", 2, "unknown option --n-gens; did you mean --n-genes?"),
        ("predict", 2, "SLIDE is needed: 0 given"),
        ("predict slide.zarr --n-symmetries 3", 2, "argument --n-symmetries: '3' is not one of 1|4|8"),
        ("evaluate slide.zarr", 2, "the following arguments are required: --table-key, --predicted-key"),
        ("cross-validate nowhere.zarr other.zarr", 1, "There is nothing at 'nowhere.zarr'."),
        ("convert slide.zarr", 2, "FOLDER STORE is needed: 1 given"),
        ("info nowhere", 1, "pixnet-sd info: error: There is nothing at 'nowhere'."),
        ("demo --seed x", 2, "argument --seed: 'x' is not one of N"),
        ("predcit slide.zarr", 2, "there is no command 'predcit'; did you mean 'predict'?"),
    ],
)
def test_bad_input(arguments, code, message, pixnet_sd):
    done = pixnet_sd(*arguments.split(), code=code)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_loads_nothing_heavy(pixnet_sd, monkeypatch, tmp_path):
    heavy = ("torch", "spatialdata", "anndata", "numpy", "pandas")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: sys.stderr.write(str([m for m in sys.modules if m in "
        f"{heavy}])))\n"
    )
    import subprocess

    code = "import sys; from pixnet_sd.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {"PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    for command in ("fit", "cross-validate", "info", "demo"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], env=environment, capture_output=True, text=True, check=True
        )
        assert "examples:" in done.stdout
        assert done.stderr == "[]"
