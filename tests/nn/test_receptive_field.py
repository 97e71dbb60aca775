"""Beyond the receptive radius nothing of the image matters, so a halo of it makes tile borders invisible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixnet_sd.model import DecoderConfig, Network, build_encoder, receptive_radius_px, sees_whole_tile

ALIGN = 32  # halos and tiles are cut at multiples of the coarsest stride


def make(name: str) -> Network:
    torch.manual_seed(0)
    config = DecoderConfig(widths=(8, 8, 8, 8), hidden=(8, 8, 8))
    return Network(build_encoder(name, None), config, n_outputs=2, aggregation="mean").eval()


def image(width: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 2 * ALIGN, width, generator=torch.Generator().manual_seed(seed)) * 255


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_nothing_beyond_the_radius_matters(name: str) -> None:
    network = make(name)
    radius = receptive_radius_px(network)
    assert radius % ALIGN == 0
    left, right = slice(0, radius), slice(radius + ALIGN, 2 * radius + ALIGN)
    one, other = image(2 * radius + ALIGN, seed=0), image(2 * radius + ALIGN, seed=1)
    block = slice(radius // 4, (radius + ALIGN) // 4)  # the map between them
    with torch.no_grad():
        before = network(one)[..., block]
        wider = torch.cat([other, one, other], dim=-1)
        after = network(wider)[..., (3 * radius + ALIGN) // 4 :][..., : ALIGN // 4]
        moved = one.clone()
        moved[..., left], moved[..., right] = other[..., left], other[..., right]
        within = network(moved)[..., block]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    assert not torch.allclose(within, before, atol=1e-3 * float(before.std()))  # what is within the radius does


def test_changes_beyond_the_radius_change_no_bit() -> None:
    network = make("test_resnet")
    radius = receptive_radius_px(network)
    one, other = image(2 * radius + 3 * ALIGN, seed=0), image(2 * radius + 3 * ALIGN, seed=1)
    other[..., ALIGN : 2 * radius + 2 * ALIGN] = one[..., ALIGN : 2 * radius + 2 * ALIGN]
    block = slice((radius + ALIGN) // 4, (radius + 2 * ALIGN) // 4)
    with torch.no_grad():
        before, after = network(one), network(other)
    assert torch.equal(before[..., block], after[..., block])
    assert not torch.equal(before, after)


def test_radius_is_no_wild_guess() -> None:
    """ResNet18's own receptive field has a radius of 217 px; the decoder adds to it."""
    assert 217 <= receptive_radius_px(make("resnet18")) <= 600


def test_deeper_networks_see_farther() -> None:
    assert receptive_radius_px(make("resnet10t")) < receptive_radius_px(make("resnet18"))


def test_mode_and_hooks_are_left_as_they_were() -> None:
    network = make("test_resnet").train()
    assert receptive_radius_px(network) == receptive_radius_px(network)
    sees_whole_tile(network, 64)
    assert network.training
    assert not any(layer._forward_hooks for layer in network.modules())


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("resnet10t", False),
        ("test_convnext", False),
        ("test_vit", True),  # attention
        ("mobilenetv3_small_050", True),  # squeeze-excite
    ],
)
def test_sees_whole_tile(name: str, whole: bool) -> None:
    network = make(name)
    assert sees_whole_tile(network, receptive_radius_px(network)) is whole
