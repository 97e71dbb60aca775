"""Two runs do not train in one folder: the second says so at once, and the first leaves nothing behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from pixnet_sd.engine.train import RunState, Trainer
from pixnet_sd.errors import CheckpointError

MODEL = {"checksums.json", "config.json", "model.safetensors"}


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
