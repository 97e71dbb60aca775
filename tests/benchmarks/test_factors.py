"""The benchmark of factors runs, at a tiny size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--side-px", "256", "--channels", "8", "--genes", "40", "--repeats", "1"]


@pytest.mark.slow
def test_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import factors

    found = factors.main(TINY)
    assert found["largest difference"] <= 1e-5
    assert 0 < found["bytes, relative to C/M"] < 5  # of so small a map metadata is the most
    assert "met: largest difference" in capsys.readouterr().out
