"""Any timm backbone gives the same pyramid; weights come from the hub or a file, and no code in a file is run."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import ANY, Mock, call

import huggingface_hub
import pytest
import timm
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd.errors import CheckpointError, PixNetError
from pixnet_sd.geometry import STRIDES
from pixnet_sd.model import build_encoder, hash_weights


def image(height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255


# Each way in which timm makes features, and ViTs whose patches divide the image or do not.
@pytest.mark.parametrize(
    "name",
    ["resnet10t", "test_convnext", "mobilenetv3_small_050", "test_efficientnet", "test_vit", "eva02_tiny_patch14_224"],
)
def test_pyramid_has_strides_4_to_32(name: str) -> None:
    encoder, seen = build_encoder(name, None).eval(), []
    encoder.body.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    with torch.no_grad():
        shapes = [tuple(x.shape) for x in encoder(image())]
    assert shapes == [(1, c, 64 // s, 96 // s) for c, s in zip(encoder.channels, STRIDES, strict=True)]
    assert seen == [(70, 98) if "patch14" in name else (64, 96)]  # a ViT gets whole patches


def test_convnet_sees_the_normalised_image() -> None:
    """The normalisation belongs to the weights and is saved with them."""
    encoder = build_encoder("test_resnet", None).eval()
    assert build_encoder(weights=None).channels == (64, 128, 256, 512)  # of resnet18
    cfg = timm.get_pretrained_cfg("test_resnet")
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (cfg.mean, cfg.std))
    with torch.no_grad():
        expected = encoder.body((image() / 255 - mean) / std)
        torch.testing.assert_close(encoder(image()), expected[-4:])
    torch.testing.assert_close([encoder.state_dict()[key] for key in ("mean", "std")], [mean, std])


def test_vit_levels_are_timms_intermediates_resampled() -> None:
    encoder = build_encoder("test_vit", None).eval()
    plain = timm.create_model("test_vit", dynamic_img_size=True).eval()
    state = {key.removeprefix("model."): value for key, value in encoder.body.state_dict().items()}
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    quarters = [round(len(plain.blocks) * k / 4) - 1 for k in (1, 2, 3, 4)]
    with torch.no_grad():
        x = (image() / 255 - encoder.mean) / encoder.std
        levels = plain.forward_intermediates(x, indices=quarters, intermediates_only=True)
        pyramid = encoder(image())
    for ours, theirs, stride in zip(pyramid, levels, STRIDES, strict=True):
        expected = functional.interpolate(theirs, (64 // stride, 96 // stride), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_keeps_weights_and_statistics(frozen: bool) -> None:
    encoder = build_encoder("test_resnet", None, frozen=frozen).train()
    before, pyramid = hash_weights(encoder), encoder(image())
    assert encoder.training
    assert {layer.training for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)} == {not frozen}
    assert {x.requires_grad for x in (*pyramid, *encoder.parameters())} == {not frozen}
    assert (hash_weights(encoder) == before) == frozen
    if not frozen:
        sum(x.square().mean() for x in pyramid).backward()
        assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet_18", "resnet18"),  # which is close
        ("levit_128s", r"\[4, 8\]"),  # the strides that it lacks
        ("mixer_s32_224", "any size"),
        ("swin_tiny_patch4_window7_224", "any size"),
        ("test_maxvit", "any size"),
    ],
)
def test_backbones_that_do_not_fit(name: str, says: str) -> None:
    with pytest.raises(PixNetError, match=rf"'{name}'.*{says}"):
        build_encoder(name, None)


# timm's hub


@pytest.mark.parametrize(
    ("case", "cause", "asked"),
    [("no answer", "TimeoutError", 1), ("not there", "ConnectionError", 1), ("cached", "ConnectionError", 0)],
)
def test_a_hub_without_the_weights(monkeypatch, tmp_path: Path, case: str, cause: str, asked: int) -> None:
    """It is asked once, where timm itself would try for a minute; and not at all for cached weights."""
    session, create = Mock(), timm.create_model

    def create_or_refuse(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no such file there")
        return create(name, **options)

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(timm, "create_model", create_or_refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    if case == "no answer":
        session.head.side_effect = TimeoutError()
    elif case == "cached":
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: "/cache/model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'test_resnet'.*\({cause}\).*encoder_weights=None"):
        build_encoder("test_resnet")
    assert session.head.call_args_list == [call(huggingface_hub.constants.ENDPOINT, timeout=ANY)] * asked
    assert all(asking.kwargs["timeout"] <= 10 for asking in session.head.call_args_list)


# Weights of a file


def plain(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name)


def without_head(name: str = "test_resnet") -> dict[str, Tensor]:
    head = timm.get_pretrained_cfg(name).classifier
    return {key: value for key, value in plain(name).state_dict().items() if not key.startswith(head)}


def assert_has(body: nn.Module, state: Mapping[str, Tensor]) -> None:
    """All tensors of a body come from a plain model, whatever they are called."""
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    own = {key.removeprefix("model.").replace(".", "_"): value for key, value in body.state_dict().items()}
    assert len(own) > 20
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_plain_timm_weights(tmp_path: Path, name: str, suffix: str) -> None:
    """With a classifier, which is not used, and under names that timm's feature wrappers spell otherwise."""
    state, path = plain(name).state_dict(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert_has(build_encoder(name, path).body, state)


@pytest.mark.parametrize("prefix", ["model.resnet.", "module.encoder.", "backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_prefixes_and_nested_states(tmp_path: Path, caplog: Any, monkeypatch, prefix: str, key: str | None) -> None:
    """Such as Lightning's layout, as of the pathology SimCLR ResNet18; in the home folder."""
    state = {prefix + name: value for name, value in without_head().items()}
    torch.save(state if key is None else {"epoch": 3, key: state, "hparams": {"lr": 0.1}}, tmp_path / "w.ckpt")
    monkeypatch.setenv("HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="pixnet_sd"):
        assert_has(build_encoder("test_resnet", "~/w.ckpt").body, without_head())
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_what_does_not_match_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = plain().state_dict()
    removed, reshaped = "layer1.0.conv1.weight", "layer2.0.bn1.bias"
    del state[removed]
    state[reshaped] = torch.zeros(3)
    torch.save(state, tmp_path / "some.pt")
    with caplog.at_level(logging.INFO, logger="pixnet_sd"):
        build_encoder("test_resnet", tmp_path / "some.pt")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    name, n_matched, n_needed, missing, unused = record.args
    assert (name, n_needed - n_matched) == ("some.pt", 2)
    assert sorted(missing) == [removed, reshaped]
    assert sorted(unused) == ["fc.bias", "fc.weight"]


@pytest.mark.parametrize("given", ["another network", "few tensors", "other shapes"])
def test_weights_of_another_network(tmp_path: Path, given: str) -> None:
    own = without_head()
    states = {
        "another network": plain("test_convnext").state_dict(),
        "few tensors": dict(list(own.items())[: len(own) // 3]),
        "other shapes": {key: torch.zeros(2) for key in own},
    }
    save_file(states[given], tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*encoder="):
        build_encoder("test_resnet", tmp_path / "w.safetensors")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    torch.save({**without_head(), "bomb": Bomb(trace)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"bomb": Bomb(trace)}, protocol=2))
    for name in ("torch.pt", "plain.pkl"):
        with pytest.raises(CheckpointError, match=name) as caught:
            build_encoder("test_resnet", tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch says how to run it
    assert not trace.exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)
    assert trace.exists()  # it would have gone off


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999), rubbish=st.none() | st.binary(max_size=40))
@example(share=0, rubbish=b"e")  # an IndexError deep in torch
def test_truncated_and_rubbish(tmp_path: Path, suffix: str, share: float, rubbish: bytes | None) -> None:
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.ones(50), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)] if rubbish is None else rubbish)
    with pytest.raises(CheckpointError, match=path.name):
        build_encoder("test_resnet", path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], torch.ones(2)])
def test_no_named_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        build_encoder("test_resnet", tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["nowhere.pt", ".", "pipe.pt", "pipe.safetensors", "huge.pt"])
def test_not_a_file(tmp_path: Path, name: str) -> None:
    """A pipe would be waited for, and of a huge file the size is enough to know."""
    for pipe in ("pipe.pt", "pipe.safetensors"):
        os.mkfifo(tmp_path / pipe)
    with (tmp_path / "huge.pt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="encoder_weights=") as refused:
        build_encoder("test_resnet", tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_hash_is_of_names_and_values() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    hashes = [hash_weights(module)]
    assert hash_weights(module) == hashes[0]
    for key, value in module.state_dict().items():  # weights, running statistics, and the scalar count of batches
        value.view(-1)[0] += 1
        hashes.append(hash_weights(module))
        assert len(set(hashes)) == len(hashes), key
    assert hash_weights(nn.ModuleDict({"a": module[0], "1": module[1]})) not in hashes
    assert hash_weights(module.bfloat16()) not in hashes
