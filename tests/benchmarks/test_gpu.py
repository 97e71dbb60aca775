"""The GPU benchmark at a size at which it runs anywhere: that it works, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TINY = ["--device", "cpu", "--small", "--slide-px", "260", "--repeats", "1", "--warm-up-steps", "1", "--steps", "1"]


@pytest.mark.slow
def test_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, SCRIPT, *TINY, "--json", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = {f["name"]: f for f in json.loads(out.read_text())["figures"]}
    assert len(figures) == 6
    assert all(f["tiles_per_s"] > 0 and f["peak_gb"] is None for f in figures.values())
    bare = [name for name, f in figures.items() if f["share_of_bare"] is None]
    assert bare == ["forward", "forward + backward"]
    assert "met" not in done.stdout.lower().split()  # a CPU says nothing about the targets
