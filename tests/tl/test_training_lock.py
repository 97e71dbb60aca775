"""Two runs do not train in one folder: the second says so at once, and the first leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixnet_sd.errors import CheckpointError, DataError
from pixnet_sd.tl import _fit


@pytest.fixture
def while_training(monkeypatch):
    """Do something in the middle of a run, once."""

    def arrange(action) -> list[Exception]:
        seen: list[Exception] = []
        train = _fit.train

        def training(*arguments, **options):
            monkeypatch.setattr(_fit, "train", train)
            with pytest.raises(CheckpointError) as refused:
                action()
            seen.append(refused.value)
            return train(*arguments, **options)

        monkeypatch.setattr(_fit, "train", training)
        return seen

    return arrange


@pytest.mark.parametrize("default", [False, True], ids=["given", "default folder"])
def test_the_second_run_is_refused(slide, fit, while_training, tmp_path: Path, monkeypatch, default: bool) -> None:
    where = {} if default else {"checkpoint_dir": tmp_path / "model"}
    if not default:  # found before images are read or an encoder is made
        monkeypatch.setattr(_fit, "build_encoder", _once(_fit.build_encoder))
    seen = while_training(lambda: fit(slide, max_epochs=1, **where))
    fit(slide, max_epochs=1, **where)
    folder = Path(slide.attrs["pixnet_sd"]["model"])
    (error,) = seen
    assert folder.name in str(error)
    assert "checkpoint_dir" in str(error)
    assert {path.name for path in folder.rglob("*")} == {"checksums.json", "config.json", "model.safetensors"}


def _once(function):
    calls = iter([function])
    return lambda *arguments, **options: next(calls)(*arguments, **options)


def test_a_lock_that_a_kill_left(slide, fit, tmp_path: Path) -> None:
    """The kernel has freed it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".training.lock").touch()
    fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1)
    assert not (tmp_path / "model" / ".training.lock").exists()


def test_a_finished_model_is_read_by_many(slide, fit, checkpoint, monkeypatch) -> None:
    """Also where nothing can be written."""
    monkeypatch.setattr(_fit, "train", None)
    monkeypatch.setattr("pixnet_sd.tl._fit.hold_lock", None)
    fit(slide, checkpoint_dir=checkpoint, validation=0.25, record_model=False)


def test_a_refused_run_leaves_no_folders(slide, fit, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError):
        fit(slide, checkpoint_dir=tmp_path / "new" / "deep" / "model", genes=["no such gene"])
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("last", ["checksums.json", None], ids=["while it was saved", "after it was saved"])
def test_killed_when_the_model_was_trained(slide, fit, tmp_path: Path, monkeypatch, last: str | None) -> None:
    """The same call finishes, and tidies up."""
    folder = tmp_path / "model"
    with monkeypatch.context() as patched:
        patched.setattr(_fit.RunState, "remove", lambda directory: None)
        first = fit(slide, checkpoint_dir=folder, max_epochs=1)
    (folder / ".training.lock").touch()
    (folder / "training" / ".pixnet_sd-a.partial").mkdir()
    if last is not None:
        (folder / last).unlink()
    again = fit(slide, checkpoint_dir=folder, max_epochs=1)
    assert again.record == first.record
    assert {path.name for path in folder.rglob("*")} == {"checksums.json", "config.json", "model.safetensors"}
