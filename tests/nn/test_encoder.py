from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd.errors import CheckpointError, PixNetError
from pixnet_sd.geometry import STRIDES
from pixnet_sd.model import Encoder, build_encoder
from pixnet_sd.model import _encoder as module


def image(height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 255


def batch_norms(encoder: Encoder) -> list[nn.BatchNorm2d]:
    return [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]


# Each way in which timm makes features, and ViTs whose patches divide the image or do not.
@pytest.mark.parametrize(
    "name",
    ["resnet10t", "test_convnext", "mobilenetv3_small_050", "test_efficientnet", "test_vit", "eva02_tiny_patch14_224"],
)
def test_pyramid_has_strides_4_to_32(name: str) -> None:
    encoder = build_encoder(name, None).eval()
    with torch.no_grad():
        pyramid = encoder(image(64, 96))
    assert [tuple(x.shape) for x in pyramid] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(encoder.channels, STRIDES, strict=True)
    ]


def test_default_is_resnet18() -> None:
    assert build_encoder(weights=None).channels == (64, 128, 256, 512)


def test_convnet_sees_the_normalised_image() -> None:
    encoder = build_encoder("test_resnet", None).eval()
    cfg = timm.get_pretrained_cfg("test_resnet")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (cfg.mean, cfg.std))
    with torch.no_grad():
        expected = encoder.body((image() / 255 - mean) / std)
        pyramid = encoder(image())
    for ours, theirs in zip(pyramid, expected[-4:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_normalisation_is_saved_with_the_weights() -> None:
    encoder = build_encoder("test_resnet", None)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    state["mean"] += 0.1
    encoder.load_state_dict(state)
    torch.testing.assert_close(encoder.mean, state["mean"])


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_vit_levels_are_timms_intermediates_resampled(name: str) -> None:
    encoder = build_encoder(name, None).eval()
    plain = timm.create_model(name, dynamic_img_size=True).eval()
    state = {key.removeprefix("model."): value for key, value in encoder.body.state_dict().items()}
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    depth = len(plain.blocks)
    quarters = [round(depth * k / 4) - 1 for k in (1, 2, 3, 4)]
    with torch.no_grad():
        x = (image() / 255 - encoder.mean) / encoder.std
        levels = plain.forward_intermediates(x, indices=quarters, intermediates_only=True)
        pyramid = encoder(image())
    for ours, theirs, stride in zip(pyramid, levels, STRIDES, strict=True):
        expected = functional.interpolate(theirs, (64 // stride, 96 // stride), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, expected)


def test_vit_gets_whole_patches() -> None:
    encoder = build_encoder("eva02_tiny_patch14_224", None).eval()
    seen = []
    encoder.body.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    with torch.no_grad():
        encoder(image(64, 96))
    assert seen == [(70, 98)]


def test_frozen_keeps_weights_and_statistics() -> None:
    encoder = build_encoder("test_resnet", None, frozen=True).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    pyramid = encoder(image())
    assert not any(x.requires_grad for x in pyramid)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.training
    assert not any(layer.training for layer in batch_norms(encoder))
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_not_frozen_learns_both() -> None:
    encoder = build_encoder("test_resnet", None).train()
    layer = batch_norms(encoder)[0]
    before = layer.running_mean.clone()
    sum(x.square().mean() for x in encoder(image())).backward()
    assert not torch.equal(layer.running_mean, before)
    assert all(p.grad is not None for p in encoder.parameters())


def test_unknown_name_lists_what_is_close() -> None:
    with pytest.raises(PixNetError, match=r"no model named 'resnet_18'. Some that it knows: .*resnet18"):
        build_encoder("resnet_18", None)


def test_strides_that_do_not_fit() -> None:
    with pytest.raises(PixNetError, match=r"'levit_128s' has feature maps at strides \[16, 32, 64\], and \[4, 8\] are"):
        build_encoder("levit_128s", None)


@pytest.mark.parametrize("name", ["mixer_s32_224", "swin_tiny_patch4_window7_224", "test_maxvit"])
def test_fixed_sizes_are_refused(name: str) -> None:
    with pytest.raises(PixNetError, match=rf"'{name}' does not take images of any size.*Choose a ConvNet or a plain"):
        build_encoder(name, None)


class Hub:
    """Stands in for the session of huggingface_hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked = error, 0

    def __call__(self) -> Hub:
        return self

    def head(self, url: str, *, timeout: float) -> None:
        assert url == huggingface_hub.constants.ENDPOINT
        assert timeout <= 10
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A hub that answers, nothing cached, and no pretrained model to be had."""
    hub, create = Hub(), timm.create_model

    def create_or_refuse(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no such file there")
        return create(name, **options)

    monkeypatch.setattr(module, "get_session", hub)
    monkeypatch.setattr(timm, "create_model", create_or_refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return hub


def test_hub_that_does_not_answer_is_asked_once(hub: Hub) -> None:
    """Timm itself would try for a minute."""
    hub.error = TimeoutError()
    with pytest.raises(CheckpointError, match=r"'test_resnet' could not be .*\(TimeoutError\).*encoder_weights=None"):
        build_encoder("test_resnet")
    assert hub.asked == 1


def test_hub_without_the_weights(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"\(ConnectionError\). Without a network give encoder_weights= a path"):
        build_encoder("test_resnet")


def test_cached_weights_need_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda repo, file: "/cache/model.safetensors")
    with pytest.raises(CheckpointError, match="ConnectionError"):  # of the refusal above: timm was asked at once
        build_encoder("test_resnet")
    assert hub.asked == 0


def test_offline_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``HF_HUB_OFFLINE=1`` sets, with the real client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="ImageNet weights of 'resnet10t' could not be fetched"):
        build_encoder("resnet10t")
