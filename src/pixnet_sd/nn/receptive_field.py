"""How far a pixel of the map looks, so that tiles can be given a halo that makes their borders invisible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder import STRIDES
from .model import MAP_STRIDE, Network

__all__ = ["receptive_radius_px", "sees_whole_tile"]

_ALIGN_PX = STRIDES[-1]
_SPREADING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def _pair(value: int | tuple[int, ...]) -> int:
    return max(value) if isinstance(value, tuple) else value


def _spread(module: Any) -> int:
    """Pixels of its input by which a window module reaches to one side."""
    dilation = _pair(getattr(module, "dilation", 1))
    return (_pair(module.kernel_size) - 1) * dilation // 2 + (_pair(module.kernel_size) + 1) % 2


@torch.no_grad()
def receptive_radius_px(network: Network) -> int:
    """Bound on how far from a map pixel the image can matter.

    Sums the reach of every convolution and pooling layer on the way, at the resolution it works at; branches are
    added as if they followed each other, so the bound is safe, and exact for plain residual networks.

    Parameters
    ----------
    network
        The network; global operations (attention, squeeze-excite) are not seen here, see `sees_whole_tile`.

    Returns
    -------
    Working pixels, a multiple of 32.
    """
    side = 4 * _ALIGN_PX
    reach = float(2 * MAP_STRIDE)  # the bilinear Resize
    handles = []

    def add(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal reach
        reach += _spread(module) * side / args[0].shape[-1]

    for module in network.modules():
        if isinstance(module, _SPREADING):
            handles.append(module.register_forward_hook(add))
    was_training = network.training
    try:
        device = next(network.parameters()).device
        network.eval()
        network.decoder(network.encoder(torch.zeros(1, 3, side, side, device=device)))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    return int(-(-reach // _ALIGN_PX) * _ALIGN_PX)


@torch.no_grad()
def sees_whole_tile(network: Network, radius_px: int) -> bool:
    """Whether pixels beyond the receptive radius change the map: attention, squeeze-excite and the like.

    Parameters
    ----------
    network
        The network.
    radius_px
        `receptive_radius_px` of it.

    Returns
    -------
    True if the result depends on how the slide is cut into tiles, however wide the halo.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, _ALIGN_PX, radius_px + 3 * _ALIGN_PX, generator=generator).mul(255).to(device)
    changed = image.clone()
    changed[..., radius_px + _ALIGN_PX :] = 255 - changed[..., radius_px + _ALIGN_PX :]
    try:
        near = slice(0, _ALIGN_PX // MAP_STRIDE)
        before, after = (network(x)[..., near] for x in (image, changed))
    finally:
        network.train(was_training)
    return bool((before - after).abs().max() > 1e-5 * before.std())
