"""Runs that are cut off leave store and folder as they were, and the same call goes on; no two train in one folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
import torch
from spatialdata.models import Image2DModel
from tests.tl.conftest import map_values, names, user_files

from pixnet_sd.engine.train import RunState, Trainer
from pixnet_sd.errors import CheckpointError, StoreError

MODEL = {"checksums.json", "config.json", "model.safetensors"}


@pytest.fixture
def strip(tmp_path) -> sd.SpatialData:
    """Backed slide of two blocks of the map, of 512 map pixels, and a little more: 17 tiles of 256 px in a row."""
    pixels = np.random.default_rng(0).integers(100, 170, (3, 32, 135), dtype=np.uint8).repeat(32, axis=2)
    sdata = sd.SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list("rgb"))})
    sdata.write(tmp_path / "strip.zarr")
    return sd.read_zarr(tmp_path / "strip.zarr")


@pytest.fixture
def break_at(each_pass):
    """Interrupt, once, the n-th forward pass of those made while a file is there."""

    def arrange(nth: int, *, while_there: Path | None = None) -> None:
        passes = iter(range(1, 1000))

        def breaking(_image):
            if (while_there is None or while_there.exists()) and next(passes) == nth:
                raise KeyboardInterrupt

        each_pass(breaking)

    return arrange


@pytest.mark.parametrize("arguments", [{}, {"radius_um": 8}, {"radius_um": 8, "write": None}], ids=str)
def test_predict_interrupted(strip, model, predict, forward_passes, break_at, arguments):
    """What was done is not done again, unless the settings are others."""
    whole = sd.read_zarr(shutil.copytree(strip.path, strip.path.with_name("whole.zarr")))
    before = user_files(strip.path)
    predict(whole, model, mpp=1.0, **arguments)
    assert len(forward_passes) == 17
    break_at(12)
    with pytest.raises(KeyboardInterrupt):
        predict(strip, model, mpp=1.0, **arguments)
    again = sd.read_zarr(strip.path)
    assert names(again) == {"he"}
    assert user_files(strip.path) == before
    if not arguments:
        predict(strip, model, mpp=1.0, n_symmetries=4)
        assert np.abs(map_values(strip) - map_values(whole)).max() > 1e-4
        return
    del forward_passes[:]
    predict(again, model, mpp=1.0, **arguments)
    assert 1 <= len(forward_passes) <= 17 - 8  # a block is eight tiles
    tables = [sdata.tables["pixnet_circles_8um"].X for sdata in (again, whole)]
    if "write" in arguments:
        np.testing.assert_array_equal(*tables)
    else:
        np.testing.assert_array_equal(map_values(again), map_values(whole))
        np.testing.assert_allclose(*tables, atol=1e-5)
    assert user_files(strip.path) == before
    assert not list(Path(strip.path).parent.glob(".*.pixnet_sd/*"))


def test_fit_interrupted(slide, fit, break_at, tmp_path):
    """Before an epoch is done, in the second, and there once more; an epoch has two passes or more."""

    def run(folder: str):
        return fit(slide, checkpoint_dir=tmp_path / folder, validation=0.25, max_epochs=3, batch_size=2)

    whole = run("whole")
    state = tmp_path / "parts" / "training" / "training_state.pt"
    for epochs_done, after in ((0, None), (1, state), (1, None)):
        break_at(2, while_there=after)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
        assert state.exists() == bool(epochs_done)
        assert slide.attrs["pixnet_sd"]["model"].endswith("whole")
    parts = run("parts")
    mine, theirs = parts.network.state_dict(), whole.network.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert parts.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    assert not list((tmp_path / "parts" / "training").glob("*"))


@pytest.mark.parametrize("arguments", [{"radius_um": 16, "write": None}, {"write": "factors"}])
@pytest.mark.parametrize("when", ["moving", "attaching", "disk full"])
def test_cut_off_while_results_are_moved_in(fitted, predict, forward_passes, monkeypatch, arguments, when):
    """Ctrl-C waits until store and object agree; the same call finishes what is there, and another is refused."""
    rename, read, cuts, is_full = Path.rename, sd.read_zarr, [], when == "disk full"

    def cut_off(due: bool) -> None:
        if due and (is_full or not cuts):
            cuts.append(True)
            raise OSError(28, "No space left on device") if is_full else KeyboardInterrupt

    def renaming(self, target):
        cut_off(when != "attaching" and Path(target).parent.parent == fitted.path)
        return rename(self, target)

    def reading(*args, **kwargs):
        cut_off(when == "attaching" and len(forward_passes) > 0)
        return read(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renaming)
        patch.setattr(sd, "read_zarr", reading)
        with pytest.raises(StoreError if is_full else KeyboardInterrupt, match="No space left" if is_full else None):
            predict(fitted, **arguments)
    assert cuts
    before, again = names(fitted), sd.read_zarr(fitted.path) if is_full else fitted
    assert is_full or before == names(sd.read_zarr(fitted.path))
    del forward_passes[:]
    predict(again, **arguments)
    assert forward_passes == []
    assert names(again) == names(sd.read_zarr(fitted.path)) >= before
    assert any(name.startswith("pixnet_") for name in names(again))
    assert not list(Path(fitted.path).parent.glob(".*.pixnet_sd"))
    with pytest.raises(StoreError, match="exists already"):
        predict(again, n_symmetries=4, **arguments)


@pytest.mark.parametrize("what", ["store", "work folder"])
def test_moved_away_during_the_run(fitted, predict, each_pass, tmp_path, what):
    """Nothing is written in its place, and what was done is gone on from once it is back."""
    store = fitted.path
    work = store.parent / f".{store.name}.pixnet_sd"
    moved, before = tmp_path / "moved", user_files(store)
    thing = store if what == "store" else work
    each_pass(lambda _image: None if moved.exists() else thing.rename(moved))
    with pytest.raises(StoreError, match=thing.name):
        predict(fitted, radius_um=8)
    assert not list(store.rglob("*")) if what == "store" else not list(work.rglob("c"))
    shutil.rmtree(thing, ignore_errors=True)
    shutil.copytree(moved, thing)
    assert user_files(store) == before
    predict(sd.read_zarr(store), radius_um=8)
    assert {"pixnet_map", "pixnet_circles_8um"} <= names(sd.read_zarr(store))


@pytest.mark.parametrize("error", [MemoryError, TypeError])
def test_nothing_is_left_of_a_run_that_did_nothing(fitted, predict, fit, each_pass, error):
    def failing(_image):
        raise error

    each_pass(failing)
    with pytest.raises(error):
        predict(fitted, radius_um=8)
    with pytest.raises(error):
        fit(fitted, genes=5)
    assert [path.name for path in fitted.path.parent.iterdir()] == ["fitted.zarr"]


@pytest.mark.parametrize("default", [False, True])
def test_the_second_run_is_refused(slide, fit, tmp_path: Path, monkeypatch, default: bool) -> None:
    """A folder that was given is held before the encoder is looked at, which takes long."""
    where = {"max_epochs": 1} | ({} if default else {"checkpoint_dir": tmp_path / "model"})
    refused, start = [], Trainer.start

    def in_between(trainer: Trainer) -> None:
        with pytest.raises(CheckpointError, match="checkpoint_dir") as caught:
            fit(slide, **where, **({} if default else {"encoder": "no such encoder"}))
        refused.append(str(caught.value))
        start(trainer)

    monkeypatch.setattr(Trainer, "start", in_between)
    fit(slide, **where)
    folder = Path(slide.attrs["pixnet_sd"]["model"])
    assert folder.name in refused[0]
    assert folder.parent == (tmp_path.resolve() / "pixnet_sd_models" if default else tmp_path)
    assert {path.name for path in folder.rglob("*")} == MODEL


def test_a_finished_model_is_read_where_nothing_can_be_written(slide, fit, checkpoint, no_training, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    fit(slide, checkpoint_dir=checkpoint, validation=0.25, record_model=False)


def test_killed_when_the_model_was_trained(slide, fit, tmp_path: Path, monkeypatch) -> None:
    """The same call finishes, and tidies up, whether the model is whole or lacks its last file."""
    folder = tmp_path / "model"
    with monkeypatch.context() as patched:
        patched.setattr(RunState, "remove", lambda directory: None)
        first = fit(slide, checkpoint_dir=folder, max_epochs=1)
    shutil.copytree(folder, tmp_path / "lacking")
    (tmp_path / "lacking" / "checksums.json").unlink()
    for left in (folder, tmp_path / "lacking"):
        (left / ".training.lock").touch()
        (left / "training" / ".pixnet_sd-a.partial").mkdir()
        assert fit(slide, checkpoint_dir=left, max_epochs=1).record == first.record
        assert {path.name for path in left.rglob("*")} == MODEL
