"""Runs that are cut off, by an exception or by a kill: the store is as it was, and the same call goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
import torch

from pixnet_sd.nn.model import Network

KILLED = Path(__file__).with_name("killed.py")


@pytest.fixture
def four_blocks(monkeypatch):
    """Blocks of 32 map pixels: the slide has four, and a tile of 128 working pixels is one."""
    monkeypatch.setattr("pixnet_sd.store._map_layout.MAX_BLOCK_PX", 32)


@pytest.fixture
def break_at(monkeypatch):
    """Interrupt the n-th forward pass of those made while a file is there."""
    forward = Network.forward

    def arrange(nth: int, *, while_there: Path | None = None) -> None:
        passes = iter(range(1, 1000))

        def breaking(self, image):
            if (while_there is None or while_there.exists()) and next(passes) == nth:
                raise KeyboardInterrupt
            return forward(self, image)

        monkeypatch.setattr(Network, "forward", breaking)

    return arrange


def names(sdata) -> set[str]:
    return {name for _, name, _ in sdata.gen_elements()}


@pytest.fixture
def uninterrupted(fitted, predict, four_blocks, tmp_path):
    """Results of a run that nothing disturbed, in a copy of the slide."""
    shutil.copytree(fitted.path, tmp_path / "uninterrupted.zarr")
    sdata = sd.read_zarr(tmp_path / "uninterrupted.zarr")
    predict(sdata, radius_um=8, tile_px=128)
    return sdata


@pytest.mark.parametrize("regions", [{}, {"radius_um": 8}], ids=["map", "map and circles"])
def test_predict_interrupted(fitted, uninterrupted, predict, forward_passes, break_at, map_values, user_files, regions):
    before, there = user_files(fitted.path), names(fitted)
    break_at(4)
    with pytest.raises(KeyboardInterrupt):
        predict(fitted, tile_px=128, **regions)
    assert names(sd.read_zarr(fitted.path)) == there
    assert user_files(fitted.path) == before

    del forward_passes[:]
    break_at(1000)
    again = sd.read_zarr(fitted.path)
    predict(again, tile_px=128, **regions)
    assert 1 <= len(forward_passes) <= 3  # of four: what was done is not done again
    np.testing.assert_array_equal(map_values(again), map_values(uninterrupted))
    if regions:
        tables = [s.tables["pixnet_circles_8um"] for s in (again, uninterrupted)]
        np.testing.assert_allclose(tables[0].X, tables[1].X, atol=1e-5)
    assert user_files(fitted.path) == before
    assert not list(Path(fitted.path).parent.glob(".*.pixnet_sd/*"))


def test_other_settings_do_not_take_up_a_partial_map(fitted, uninterrupted, predict, break_at, map_values):
    break_at(4)
    with pytest.raises(KeyboardInterrupt):
        predict(fitted, tile_px=128, n_symmetries=1)
    break_at(1000)
    predict(fitted, tile_px=128, n_symmetries=4)
    assert np.abs(map_values(fitted) - map_values(uninterrupted)).max() > 1e-4


def test_fit_interrupted(slide, fit, break_at, tmp_path):
    whole = fit(slide, checkpoint_dir=tmp_path / "whole", validation=0.25, max_epochs=3)
    state = tmp_path / "parts" / "training" / "training_state.pt"
    for epochs_done, after in ((0, None), (1, state), (1, None)):
        break_at(2, while_there=after)
        with pytest.raises(KeyboardInterrupt):
            fit(slide, checkpoint_dir=tmp_path / "parts", validation=0.25, max_epochs=3)
        assert state.exists() == bool(epochs_done)
        assert slide.attrs["pixnet_sd"]["model"].endswith("whole")
    break_at(1000)
    parts = fit(slide, checkpoint_dir=tmp_path / "parts", validation=0.25, max_epochs=3)
    assert_same_model(parts, whole)
    assert not list((tmp_path / "parts" / "training").glob("*"))


def assert_same_model(one, other) -> None:
    mine, theirs = one.network.state_dict(), other.network.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed(fitted, slide, uninterrupted, predict, fit, fast, forward_passes, map_values, user_files, tmp_path):
    before = {sdata.path: user_files(sdata.path) for sdata in (fitted, slide)}
    there = names(fitted)
    arguments = json.dumps(fast | {"validation": 0.25})
    command = [sys.executable, str(KILLED), str(fitted.path), str(slide.path), str(tmp_path / "killed"), arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("2 killed\n"), done.stderr
    assert {path: user_files(path) for path in before} == before
    assert names(sd.read_zarr(fitted.path)) == there
    assert "pixnet_sd" not in sd.read_zarr(slide.path).attrs

    again = sd.read_zarr(fitted.path)
    del forward_passes[:]
    predict(again, radius_um=8, tile_px=128)
    assert 1 <= len(forward_passes) <= 3
    again = sd.read_zarr(fitted.path)
    np.testing.assert_array_equal(map_values(again), map_values(uninterrupted))
    np.testing.assert_allclose(
        again.tables["pixnet_circles_8um"].X, uninterrupted.tables["pixnet_circles_8um"].X, atol=1e-5
    )

    resumed = fit(slide, checkpoint_dir=tmp_path / "killed", validation=0.25)
    whole = fit(slide, checkpoint_dir=tmp_path / "whole", validation=0.25)
    assert_same_model(resumed, whole)
    assert {path: user_files(path) for path in before} == before
