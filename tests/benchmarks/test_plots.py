"""The benchmark of plots at a size at which it says nothing: that it counts what is read, and judges."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_rows_and_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import plots

    small = ["--folder", str(tmp_path), "--map-px", "100", "--genes", "24", "--repeats", "1"]
    found = plots.main(small)
    assert len(found) == 3
    assert all(figures.seconds > 0 for figures in found.values())
    # one chunk of channels: 8 of 24 at the finest level, 16 at the next
    assert 0.2 < found["crop of 500 µm, finest level"].share < 0.3
    said = capsys.readouterr().out
    assert "MISSED: " in said
    assert "% of the map's bytes read, 5% allowed" in said
