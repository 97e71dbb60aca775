"""Killed at random points, and on a full disk: nothing of the user's changes, and the same call goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import spatialdata as sd

import pixnet_sd as ps

SCRIPT = Path(__file__).with_name("disturbed.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL"),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, fast) -> tuple[Path, dict[str, object]]:
    """A slide of 16 blocks, and the same one with a model."""
    folder = tmp_path_factory.mktemp("disturbed")
    ps.datasets.sample(size_um=400, mpp=1.0, bin_um=(8,)).write(folder / "slide.zarr")
    arguments = fast | {"validation": 0.25, "max_epochs": 4}
    shutil.copytree(folder / "slide.zarr", folder / "fitted.zarr")
    ps.tl.fit(sd.read_zarr(folder / "fitted.zarr"), checkpoint_dir=folder / "model", **arguments)
    return folder, arguments


def run(what: str, stores: tuple[Path, dict[str, object]], tmp_path: Path, n: int) -> str:
    folder, arguments = stores
    for name in ("slide.zarr", "fitted.zarr"):
        shutil.copytree(folder / name, tmp_path / name)
    command = [sys.executable, str(SCRIPT), what, str(tmp_path), json.dumps(arguments), str(n)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert not done.returncode, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("what", ["predict", "fit"])
def test_killed_at_random_points(stores, tmp_path, what):
    killed = run(what, stores, tmp_path, 20)
    assert killed.endswith("of 20 killed")
    assert int(killed.split()[0]) >= 15  # the last ones may come too late


def can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return mounted.returncode == 0


def test_full_disk(stores, tmp_path):
    if not can_mount(tmp_path / "mount"):
        pytest.skip("cannot mount a small file system")
    assert run("full", stores, tmp_path, 4) == "4 predictions and 4 trainings of 4 found the disk full"
