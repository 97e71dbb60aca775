"""Runs that are cut off by an exception: the store is as it was, and the same call goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
import torch
from spatialdata.models import Image2DModel

from pixnet_sd.errors import StoreError
from pixnet_sd.model import Network


@pytest.fixture
def strip(tmp_path) -> sd.SpatialData:
    """Backed slide of two blocks of the map, of 512 map pixels, and a little more: 17 tiles of 256 px in a row."""
    pixels = np.random.default_rng(0).integers(100, 170, (3, 32, 135), dtype=np.uint8).repeat(32, axis=2)
    sdata = sd.SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list("rgb"))})
    sdata.write(tmp_path / "strip.zarr")
    return sd.read_zarr(tmp_path / "strip.zarr")


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


@pytest.mark.parametrize("regions", [{}, {"radius_um": 8}], ids=["map", "map and circles"])
def test_predict_interrupted(
    strip, model, predict, forward_passes, break_at, map_values, user_files, tmp_path, regions
):
    """What was done is not done again, unless the settings are others."""
    whole = sd.read_zarr(shutil.copytree(strip.path, strip.path.with_name("whole.zarr")))
    before = user_files(strip.path)
    predict(whole, model, mpp=1.0, **regions)
    assert len(forward_passes) == 17
    break_at(12)
    with pytest.raises(KeyboardInterrupt):
        predict(strip, model, mpp=1.0, **regions)
    assert names(sd.read_zarr(strip.path)) == {"he"}
    assert user_files(strip.path) == before

    break_at(1000)
    if not regions:
        predict(strip, model, mpp=1.0, n_symmetries=4)
        assert np.abs(map_values(strip) - map_values(whole)).max() > 1e-4
        return
    del forward_passes[:]
    again = sd.read_zarr(strip.path)
    predict(again, model, mpp=1.0, **regions)
    assert 1 <= len(forward_passes) <= 17 - 8  # a block is eight tiles
    np.testing.assert_array_equal(map_values(again), map_values(whole))
    np.testing.assert_allclose(*(s.tables["pixnet_circles_8um"].X for s in (again, whole)), atol=1e-5)
    assert user_files(strip.path) == before
    assert not list(Path(strip.path).parent.glob(".*.pixnet_sd/*"))


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
    mine, theirs = parts.network.state_dict(), whole.network.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert parts.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    assert not list((tmp_path / "parts" / "training").glob("*"))


@pytest.mark.parametrize("arguments", [{"radius_um": 16, "write": None}, {"write": "factors"}])
@pytest.mark.parametrize("when", ["moving", "attaching"])
def test_interrupted_while_results_are_moved_in(fitted, predict, forward_passes, monkeypatch, arguments, when):
    """Ctrl-C waits until store and object agree; the same call then has nothing to do."""
    rename, read, interrupted = Path.rename, sd.read_zarr, []

    def interrupt(due: bool) -> None:
        if due and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    def renaming(self, target):
        interrupt(when == "moving" and Path(target).parent.parent == fitted.path)
        return rename(self, target)

    def reading(*args, **kwargs):
        interrupt(when == "attaching" and len(forward_passes) > 0)
        return read(*args, **kwargs)

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(sd, "read_zarr", reading)
    with pytest.raises(KeyboardInterrupt):
        predict(fitted, **arguments)
    monkeypatch.undo()
    stored, attached = names(sd.read_zarr(fitted.path)), names(fitted)
    assert interrupted
    assert stored == attached
    assert any(name.startswith("pixnet_") for name in stored)
    del forward_passes[:]
    predict(fitted, **arguments)
    assert names(fitted) == stored
    assert not list(Path(fitted.path).parent.glob(".*.pixnet_sd"))


@pytest.mark.parametrize("arguments", [{"radius_um": 16, "write": None}, {"write": "factors"}])
def test_disk_full_while_results_are_moved_in(fitted, predict, forward_passes, monkeypatch, arguments):
    """The same call finishes what is there, and returns; another one is still told that the name is taken."""
    rename = Path.rename

    def failing(self, target):
        if Path(target).parent.parent == fitted.path:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(StoreError, match="No space left"):
            predict(fitted, **arguments)
    del forward_passes[:]
    again = sd.read_zarr(fitted.path)
    predict(again, **arguments)
    assert forward_passes == []
    assert names(again) == names(sd.read_zarr(fitted.path)) > names(fitted)
    assert not list(Path(fitted.path).parent.glob(".*.pixnet_sd"))
    with pytest.raises(StoreError, match="exists already"):
        predict(again, n_symmetries=4, **arguments)


@pytest.mark.parametrize("what", ["store", "work folder"])
def test_moved_away_during_the_run(fitted, predict, monkeypatch, user_files, tmp_path, what):
    """Nothing is written in its place, and what was done is gone on from once it is back."""
    store = fitted.path
    work = store.parent / f".{store.name}.pixnet_sd"
    moved, before, forward = tmp_path / "moved", user_files(store), Network.forward
    thing = store if what == "store" else work

    def moving(self, image):
        if torch.is_inference_mode_enabled() and not moved.exists():  # not when the reach of a network is measured
            thing.rename(moved)
        return forward(self, image)

    monkeypatch.setattr(Network, "forward", moving)
    with pytest.raises(StoreError, match=thing.name):
        predict(fitted, radius_um=8)
    monkeypatch.undo()
    assert not list(store.rglob("*")) if what == "store" else not list(work.rglob("c"))
    shutil.rmtree(thing, ignore_errors=True)
    moved.rename(thing)
    assert user_files(store) == before
    predict(sd.read_zarr(store), radius_um=8)
    assert {"pixnet_map", "pixnet_circles_8um"} <= names(sd.read_zarr(store))


@pytest.mark.parametrize("error", [MemoryError, TypeError])
def test_nothing_is_left_of_a_run_that_did_nothing(fitted, predict, fit, monkeypatch, error):
    def failing(self, image):
        raise error

    monkeypatch.setattr(Network, "forward", failing)
    with pytest.raises(error):
        predict(fitted, radius_um=8)
    with pytest.raises(error):
        fit(fitted, genes=5)
    assert [path.name for path in fitted.path.parent.iterdir()] == ["fitted.zarr"]
