"""Spot-crop regression, the recipe of ST-Net: a crop of the spot, an encoder, one vector, a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from cross_scale_slides import MPP
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd.model import Encoder, Part, make_objective

__all__ = ["CropNetwork", "Crops"]

CROP_PX = 64  # to which a crop is resized, whatever it shows
BATCH = 64
HEAD_SHARE, TUNE_SHARE = 2.0, 0.4  # of PixNet's steps


class Crops:
    """Square crops of a slide image (3, rows, columns), white beyond it."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        pad = 128
        self._pad = pad
        self._image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), constant_values=255)

    def of(self, centre_px: NDArray[np.float64], side_um: float) -> Tensor:
        """(n, 3, CROP_PX, CROP_PX), 0 to 255: sampled bilinearly, and so blurred where little is shown."""
        image = torch.from_numpy(self._image)[None].float()
        height, width = self._image.shape[1:]
        grid = (torch.arange(CROP_PX) + 0.5) / CROP_PX - 0.5
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        parts = []
        for cx, cy in centre_px:
            px, py = (v * side_um / MPP + c + self._pad for v, c in ((x, cx), (y, cy)))
            at = torch.stack([2 * px / width - 1, 2 * py / height - 1], dim=-1)[None]
            parts.append(functional.grid_sample(image, at, align_corners=False))
        return torch.cat(parts)


class CropNetwork(nn.Module):
    """An encoder, its maps averaged over the crop and standardised, and a linear head."""

    def __init__(self, encoder: Encoder, n_genes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(sum(encoder.channels), n_genes)
        self.register_buffer("mean", torch.zeros(sum(encoder.channels)))
        self.register_buffer("std", torch.ones(sum(encoder.channels)))

    def vectors(self, crops: Tensor) -> Tensor:
        """One vector a crop, all levels of the pyramid side by side."""
        return torch.cat([level.mean(dim=(2, 3)) for level in self.encoder(crops)], dim=1)

    def forward(self, crops: Tensor) -> Tensor:
        """Predicted expression, (n, genes)."""
        return self.head((self.vectors(crops) - self.mean) / self.std)

    @torch.no_grad()
    def predict(self, crops: Tensor) -> NDArray[np.float64]:
        """Averaged over the mirror images."""
        self.eval()
        views = [crops, crops.flip(2), crops.flip(3), crops.flip(2, 3)]
        found = [torch.cat([self(part) for part in view.split(256)]) for view in views]
        return torch.stack(found).mean(0).double().numpy()

    def fit_head(self, crops: Tensor, target: Tensor, sizes: Sequence[slice], steps: int) -> None:
        """The head alone, on the vectors of all mirror images."""
        self.eval()
        with torch.no_grad():
            each = [torch.cat([self.vectors(p) for p in v.split(256)]) for v in (crops, crops.flip(2), crops.flip(3))]
            self.mean.copy_(torch.cat(each).mean(0))
            self.std.copy_(torch.cat(each).std(0) + 1e-6)
            each = [(v - self.mean) / self.std for v in each]
        self.head.bias.data.copy_(target.mean(0))
        self.head.weight.data.mul_(0.1)
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=2e-3, weight_decay=0.3)
        for step in range(round(HEAD_SHARE * steps)):
            view = functional.dropout(each[step % len(each)], 0.5)
            _step(optimizer, _loss(self.head(view), target, sizes))

    def fine_tune(self, crops: Tensor, target: Tensor, steps: int, seed: int = 0) -> None:
        """Everything, from a fitted head on."""
        for parameter in self.encoder.parameters():
            parameter.requires_grad_()
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=1e-2)
        rng = np.random.default_rng(seed)
        for _ in range(round(TUNE_SHARE * steps)):
            index = torch.from_numpy(rng.choice(len(crops), min(BATCH, len(crops)), replace=False))
            batch = crops[index]
            batch = batch.flip(2) if rng.random() < 0.5 else batch
            batch = batch.flip(3) if rng.random() < 0.5 else batch
            _step(optimizer, _loss(self(batch), target[index], [slice(None)]))


def _loss(predicted: Tensor, target: Tensor, sizes: Sequence[slice]) -> Tensor:
    """Eq. 6, mean over sizes: the loss that PixNet has."""
    every = slice(None)
    objective = make_objective("mse_pcc", pcc_weight=0.5, target_sum=1e4)
    parts = []
    for size in sizes:
        n_varying = objective.n_varying([target[size]])
        parts.append(objective.part(predicted[size], target[size], Part(every, target.shape[1], n_varying, 0)))
    return torch.stack(parts).mean()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
