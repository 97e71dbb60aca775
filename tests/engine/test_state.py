from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pixnet_sd.engine.train import RunState
from pixnet_sd.engine.train._state import BestEpoch, seal
from pixnet_sd.errors import CheckpointError

FILE = "training_state.pt"


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


def test_round_trip(state, tmp_path: Path) -> None:
    state.save(tmp_path / "new" / "folder")
    found = RunState.load(tmp_path / "new" / "folder", "abc")
    assert (found.fingerprint, found.epoch, found.history) == ("abc", 4, [{"epoch": 1.0, "loss": 0.5}])
    torch.testing.assert_close(found.network, state.network, rtol=0, atol=0)
    torch.testing.assert_close(found.optimizer["state"], state.optimizer["state"], rtol=0, atol=0)
    assert found.optimizer["param_groups"] == state.optimizer["param_groups"]
    assert (found.best.epoch, found.best.pcc) == (3, 0.25)
    assert found.best.pcc_per_gene == pytest.approx([0.5, float("nan")], nan_ok=True)
    assert torch.equal(found.best.weights["weight"], torch.ones(2))


def test_nothing_there_begins_anew(tmp_path: Path) -> None:
    assert RunState.load(tmp_path / "none", "abc") == RunState("abc")


def test_state_of_another_run(state, tmp_path: Path) -> None:
    state.save(tmp_path / "training")
    with pytest.raises(CheckpointError, match=r"other data or settings.*checkpoint_dir") as refused:
        RunState.load(tmp_path / "training", "xyz")
    assert str(tmp_path) in str(refused.value)
    assert (tmp_path / "training" / FILE).exists()


def refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{FILE}.*cannot be read.*Delete"):
        RunState.load(directory, "abc")


def test_damaged(state, tmp_path: Path) -> None:
    """Cut off anywhere, with any bit flipped, or with something behind it."""
    state.save(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 103, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(tmp_path)
    path.write_bytes(whole + whole)
    refused(tmp_path)
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 150):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        refused(tmp_path)
    path.write_bytes(whole)
    assert RunState.load(tmp_path, "abc").epoch == 4


def sealed(content: object, path: Path) -> None:
    """With a hash that fits, as someone who means harm would write it."""
    with path.open("w+b") as file:
        torch.save(content, file)
        seal(file)


@pytest.mark.parametrize("forge", [True, False])
@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"fingerprint": "abc", "epoch": 1}])
def test_a_file_of_another_kind(tmp_path: Path, content, forge: bool) -> None:
    (sealed if forge else torch.save)(content, tmp_path / FILE)
    refused(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epoch", value) for value in (-1, 1.5, None, True, "4")),
        *(("history", value) for value in (None, [1], [{"epoch": "x"}])),
        *(("network", value) for value in (None, [], torch.ones(2))),
        *(("best", value) for value in (None, {}, {"epoch": 1}, 5)),
        ("steps", -5),
        ("fingerprint", 7),
        ("new", 1),
    ],
)
def test_fields_that_no_state_has(state, tmp_path: Path, field: str, value) -> None:
    content = vars(state) | {"best": vars(state.best), field: value}
    sealed(content, tmp_path / FILE)
    refused(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "huge"])
def test_something_else_in_its_place(tmp_path: Path, kind: str) -> None:
    path = tmp_path / FILE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 42)
    with pytest.raises(CheckpointError, match=f"{FILE}.*Delete it"):
        RunState.load(tmp_path, "abc", most_bytes=1 << 30)


def test_saving_follows_no_link(state, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    directory = tmp_path / "training"
    directory.mkdir()
    for name in (FILE, f"{FILE}.partial"):
        (directory / name).symlink_to(mine)
    state.save(directory)
    assert mine.read_text() == "years of work"
    assert RunState.load(directory, "abc").epoch == 4


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_code_is_run(tmp_path: Path) -> None:
    sealed({"fingerprint": "abc", "trap": Trap(tmp_path / "sprung")}, tmp_path / FILE)
    refused(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_kill_while_saving_leaves_the_epoch_before(state, tmp_path: Path, monkeypatch) -> None:
    state.save(tmp_path)
    state.epoch = 5

    def killed(content, file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path)
    monkeypatch.undo()
    assert RunState.load(tmp_path, "abc").epoch == 4
    state.save(tmp_path)
    assert RunState.load(tmp_path, "abc").epoch == 5
    RunState.remove(tmp_path)
    assert not tmp_path.exists()


def test_remove_what_is_not_there(tmp_path: Path) -> None:
    RunState.remove(tmp_path)
    assert not tmp_path.exists()
