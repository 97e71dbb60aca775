"""The rate of a run, and its state on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pixnet_sd.engine.train import BestEpoch, RunState, seal
from pixnet_sd.errors import CheckpointError

FILE = "training_state.pt"


@pytest.mark.parametrize(
    ("anneal", "held_out", "cycle"),
    [(False, [], False), (None, ["a slide"], False), (True, ["a slide"], True), (None, [], True)],
)
def test_the_rate_is_constant_or_goes_through_one_cycle(make_run, anneal, held_out, cycle: bool) -> None:
    rates = np.array([make_run(held_out=held_out, anneal=anneal, lr=2e-3).learning_rate(k / 100) for k in range(101)])
    assert rates.max() == pytest.approx(2e-3)
    if cycle:
        np.testing.assert_allclose(rates[[0, 10, 20, 60, 100]], 2e-3 * np.array([0.04, 0.52, 1, 0.5, 0]), atol=1e-12)
    else:
        assert len(set(rates)) == 1


@pytest.fixture
def state() -> RunState:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return RunState(
        "abc",
        epoch=4,
        network=layer.state_dict(),
        optimizer=optimizer.state_dict(),
        history=[{"epoch": 1.0, "loss": 0.5}],
        best=BestEpoch(3, 0.25, [0.5, float("nan")], {"weight": torch.ones(2)}),
    )


def test_a_state_is_on_disk_before_it_takes_the_place_of_the_last(state, tmp_path: Path, monkeypatch) -> None:
    """A power cut then leaves one of the two, and not an empty file."""
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), done.append(os.fstat(handle).st_ino))[0])
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append(new), replace(old, new))[1])
    state.save(tmp_path)
    target = tmp_path / FILE
    assert done == [target.stat().st_ino, target, tmp_path.stat().st_ino]


def test_round_trip(state, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "new" / "folder"
    assert RunState.load(folder, "abc") == RunState("abc")  # nothing there begins anew
    state.save(folder)
    found = RunState.load(folder, "abc")
    assert (found.fingerprint, found.epoch, found.history) == ("abc", 4, [{"epoch": 1.0, "loss": 0.5}])
    torch.testing.assert_close(found.network, state.network, rtol=0, atol=0)
    torch.testing.assert_close(found.optimizer["state"], state.optimizer["state"], rtol=0, atol=0)
    assert found.optimizer["param_groups"] == state.optimizer["param_groups"]
    assert (found.best.epoch, found.best.pcc) == (3, 0.25)
    assert found.best.pcc_per_gene == pytest.approx([0.5, float("nan")], nan_ok=True)
    assert torch.equal(found.best.weights["weight"], torch.ones(2))
    assert not caplog.records


def test_other_versions_are_warned_of_and_do_not_end_a_run(state, tmp_path: Path, caplog) -> None:
    """Of what computes, not of what reads."""
    state.versions |= {"torch": "0.0.1", "anndata": "0.0.2"}
    state.save(tmp_path)
    assert RunState.load(tmp_path, "abc").epoch == 4
    assert "torch 0.0.1" in caplog.text
    assert "anndata" not in caplog.text


def test_state_of_another_run(state, tmp_path: Path) -> None:
    state.save(tmp_path / "training")
    with pytest.raises(CheckpointError, match="checkpoint_dir") as refused:
        RunState.load(tmp_path / "training", "xyz")
    assert str(tmp_path) in str(refused.value)
    assert (tmp_path / "training" / FILE).exists()


def refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}.*Delete it"):
        RunState.load(directory, "abc", most_bytes=1 << 30)


def test_damaged(state, tmp_path: Path) -> None:
    """Cut off anywhere, with any bit flipped, or with something behind it."""
    state.save(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 64, len(whole) - 1)]
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 30):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(content))
    for content in (*damaged, whole + whole):
        path.write_bytes(content)
        refused(tmp_path)
    path.write_bytes(whole)
    assert RunState.load(tmp_path, "abc").epoch == 4


def sealed(content: object, path: Path) -> None:
    """Write with a hash that fits, as someone who means harm would."""
    with path.open("w+b") as file:
        torch.save(content, file)
        seal(file)


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_something_else_in_its_place(state, tmp_path: Path) -> None:
    """Code that would be run, fields that no state has, a pipe, and a file that is too large."""
    path = tmp_path / FILE
    other = {"epoch": -1}, {"history": [{"epoch": "x"}]}, {"best": None}, {"new": 1}, {"new": Trap(tmp_path / "sprung")}
    for content in ([1, 2], *(vars(state) | {"best": vars(state.best)} | fields for fields in other)):
        sealed(content, path)
        refused(tmp_path)
    assert not (tmp_path / "sprung").exists()
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 42)
    refused(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_what_fails_while_saving_leaves_the_state_before(state, tmp_path: Path, monkeypatch, error) -> None:
    """A kill, and a full disk, of which torch's writer may tell as a RuntimeError."""
    state.save(tmp_path)
    state.epoch = 5

    def failing(content, file) -> None:
        file.write(b"half")
        raise error("no space")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", failing)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError):
            state.save(tmp_path)
    assert RunState.load(tmp_path, "abc").epoch == 4
    state.save(tmp_path)
    assert RunState.load(tmp_path, "abc").epoch == 5
    for _ in range(2):
        RunState.remove(tmp_path)
        assert not tmp_path.exists()
