"""Augmentation: the eight symmetries of the square, and jitter of the stain."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["N_SYMMETRIES", "apply_symmetry", "jitter_stain", "undo_symmetry"]

N_SYMMETRIES = 8


def apply_symmetry(x: Tensor, k: int) -> Tensor:
    """Turn by ``k % 4`` right angles, then mirror for ``k >= 4``.

    Parameters
    ----------
    x
        Shape (..., H, W).
    k
        0 to 7; 0 leaves it as it is.

    Returns
    -------
    Shape (..., H, W), or (..., W, H) for odd k.
    """
    x = torch.rot90(x, k % 4, (-2, -1))
    return x.flip(-1) if k >= 4 else x


def undo_symmetry(x: Tensor, k: int) -> Tensor:
    """Invert `apply_symmetry`.

    The network sees a turned tile; its feature map is turned back, so the tile's regions and their aggregation
    operator stay as they are. That is exact: the bilinear resize commutes with all eight symmetries.
    """
    x = x.flip(-1) if k >= 4 else x
    return torch.rot90(x, -(k % 4), (-2, -1))


def jitter_stain(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale and shift the optical density of each channel at random, tile by tile.

    Parameters
    ----------
    image
        RGB, shape (B, 3, H, W), 0 to 255.
    strength
        Standard deviation of the log scale; the shift has a tenth of it.
    generator
        Source of randomness, on the CPU.

    Returns
    -------
    Shape (B, 3, H, W), 0 to 255.
    """
    if strength == 0:
        return image
    noise = torch.randn(2, len(image), 3, 1, 1, generator=generator)
    noise = (noise.pin_memory() if image.is_cuda else noise).to(image.device, non_blocking=True) * strength
    density = -torch.log((image + 1) / 256)
    return (256 * torch.exp(-(density * torch.exp(noise[0]) + 0.1 * noise[1])) - 1).clamp(0, 255)
