"""Killed at random points, and on a full disk: nothing of the user's changes, and the same call finishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kills.py"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")]


def can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return mounted.returncode == 0


def test_killed_and_out_of_disk(tmp_path):
    n_disks = 1 if can_mount(tmp_path / "mount") else 0
    command = [sys.executable, str(SCRIPT), str(tmp_path / "kills"), "--kills", "8", "--full-disks", str(n_disks)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert not done.returncode, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert sum(int(line.split()[1]) for line in lines[:4]) >= 6  # the last ones may come too late
    if n_disks:
        assert lines[4] == "1 predictions and 1 trainings of 1 found the disk full"
