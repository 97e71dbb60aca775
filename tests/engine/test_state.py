from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixnet_sd._errors import CheckpointError
from pixnet_sd.engine.state import BestEpoch, RunState

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


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_truncated(state, tmp_path: Path, size: int) -> None:
    state.save(tmp_path)
    path = tmp_path / FILE
    assert path.stat().st_size > size
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{FILE}.*cannot be read.*Delete"):
        RunState.load(tmp_path, "abc")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"fingerprint": "abc", "epoch": 1}])
def test_a_file_of_another_kind(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE}.*cannot be read.*Delete"):
        RunState.load(tmp_path, "abc")


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_code_is_run(tmp_path: Path) -> None:
    torch.save({"fingerprint": "abc", "trap": Trap(tmp_path / "sprung")}, tmp_path / FILE)
    with pytest.raises(CheckpointError):
        RunState.load(tmp_path, "abc")
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
