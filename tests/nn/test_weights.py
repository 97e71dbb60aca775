from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from pixnet_sd.errors import CheckpointError
from pixnet_sd.model import build_encoder, hash_weights
from pixnet_sd.model._encoder import load_encoder_weights, read_weights

State = Mapping[str, Tensor]


def plain(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name)


def without_head(name: str = "test_resnet") -> dict[str, Tensor]:
    head = timm.get_pretrained_cfg(name).classifier
    return {key: value for key, value in plain(name).state_dict().items() if not key.startswith(head)}


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def assert_has(body: nn.Module, state: State) -> None:
    """All tensors of a body come from a plain model, whatever they are called."""
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    own = {key.removeprefix("model.").replace(".", "_"): value for key, value in body.state_dict().items()}
    assert len(own) > 20
    for key, value in own.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_plain_timm_weights(tmp_path: Path, name: str, suffix: str) -> None:
    """With a classifier, which is not used, and under names that timm's feature wrappers spell otherwise."""
    state, path = plain(name).state_dict(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert_has(build_encoder(name, path).body, state)


@pytest.mark.parametrize("prefix", ["model.", "resnet.", "model.resnet.", "module.", "module.encoder.", "backbone."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    state = without_head()
    torch.save(prefixed(state, prefix), tmp_path / "w.pt")
    body = build_encoder("test_resnet", None).body
    report = load_encoder_weights(body, tmp_path / "w.pt")
    assert_has(body, state)
    assert report == (len(body.state_dict()), [], [], [])


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_state(tmp_path: Path, key: str) -> None:
    """Lightning's layout, as of the pathology SimCLR ResNet18."""
    state = without_head()
    torch.save({"epoch": 3, key: prefixed(state, "model.resnet."), "hparams": {"lr": 0.1}}, tmp_path / "w.ckpt")
    assert_has(build_encoder("test_resnet", tmp_path / "w.ckpt").body, state)


def test_report_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = plain().state_dict()
    removed, reshaped = "layer1.0.conv1.weight", "layer2.0.bn1.bias"
    del state[removed]
    state[reshaped] = torch.zeros(3)
    torch.save(state, tmp_path / "some.pt")
    body = build_encoder("test_resnet", None).body
    before = body.state_dict()[reshaped].clone()
    with caplog.at_level(logging.INFO, logger="pixnet_sd"):
        report = load_encoder_weights(body, tmp_path / "some.pt")
    assert sorted(report.missing) == [removed, reshaped]
    assert report.wrong_shape == [reshaped]
    assert sorted(report.unused) == ["fc.bias", "fc.weight"]
    assert report.matched == len(body.state_dict()) - 2
    torch.testing.assert_close(body.state_dict()[reshaped], before)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert removed in record.getMessage()


def test_all_matched_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(without_head(), tmp_path / "all.safetensors")
    with caplog.at_level(logging.INFO, logger="pixnet_sd"):
        build_encoder("test_resnet", tmp_path / "all.safetensors")
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.parametrize("other", ["test_vit", "test_convnext"])
def test_weights_of_another_network(tmp_path: Path, other: str) -> None:
    save_file(plain(other).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"Only \d+ of the encoder's \d+ tensors.*other.safet.*Set encoder="):
        build_encoder("test_resnet", tmp_path / "other.safetensors")


def test_little_matches(tmp_path: Path) -> None:
    state = without_head()
    body = build_encoder("test_resnet", None).body
    before = hash_weights(body)
    torch.save(dict(list(state.items())[: len(state) // 3]), tmp_path / "few.pt")
    with pytest.raises(CheckpointError, match="have a match"):
        load_encoder_weights(body, tmp_path / "few.pt")
    assert hash_weights(body) == before


def test_right_names_wrong_shapes(tmp_path: Path) -> None:
    save_file({key: torch.zeros(2) for key in without_head()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"Only 0 of .* \(\d+ of another shape\)"):
        build_encoder("test_resnet", tmp_path / "w.safetensors")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    contents = {**without_head(), "bomb": Bomb(trace)}
    torch.save(contents, tmp_path / "torch.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"bomb": Bomb(trace)}, protocol=2))
    for name in ("torch.pt", "plain.pkl"):
        with pytest.raises(CheckpointError, match=r"cannot be opened as weights.*are never run") as caught:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch says how to run it
    assert not trace.exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)
    assert trace.exists()  # it would have gone off


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.ones(50), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="cannot be opened as weights"):
        read_weights(path)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40), suffix=st.sampled_from([".safetensors", ".pt"]))
@example(content=b"e", suffix=".pt")  # an IndexError deep in torch
def test_rubbish(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"rubbish{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_weights(path)


@pytest.mark.parametrize("name", ["nowhere.pt", ".", "pipe.pt", "pipe.safetensors", "loop.pt", "device.pt", "huge.pt"])
def test_not_a_file(tmp_path: Path, name: str) -> None:
    """A pipe would be waited for, a device never ends, and of a huge file the size is enough to know."""
    for pipe in ("pipe.pt", "pipe.safetensors"):
        os.mkfifo(tmp_path / pipe)
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    with (tmp_path / "huge.pt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="encoder_weights=") as refused:
        build_encoder("test_resnet", tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("found", [{"epoch": 3}, [torch.ones(2)], torch.ones(2)])
def test_no_named_tensors(tmp_path: Path, found: Any) -> None:
    torch.save(found, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_weights(tmp_path / "w.pt")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert list(read_weights("~/w.safetensors")) == ["a"]


def test_hash_is_of_names_and_values() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    hashes = [hash_weights(module)]
    assert hash_weights(module) == hashes[0]
    for key, value in module.state_dict().items():  # weights, running statistics, and the scalar count of batches
        value.view(-1)[0] += 1
        hashes.append(hash_weights(module))
        assert len(set(hashes)) == len(hashes), key
    renamed = nn.ModuleDict({"a": module[0], "1": module[1]})
    assert hash_weights(renamed) not in hashes


def test_hash_takes_any_dtype() -> None:
    linear = nn.Linear(2, 2)
    assert hash_weights(linear) != hash_weights(linear.bfloat16())
