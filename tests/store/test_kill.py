"""SIGKILL at any file operation: the store opens, nothing of the user's has changed, the next run makes it whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KILLER = Path(__file__).with_name("killer.py")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_runs(slide, tmp_path):
    points = ["0.3", "0.6", "+7", "+16"]  # among the blocks, in the table, while elements are swapped, and put away
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(KILLER), str(tmp_path), "overwrite", *points]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"killed {len(points)} ")
