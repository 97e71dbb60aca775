"""Small pictures of a large one that is never there as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._noise import Grid

__all__ = ["Previews", "preview_px"]

_HIRES_PX, _LOWRES_PX = 1000, 300


def preview_px(size_px: int) -> dict[str, int]:
    """Sides of the two previews."""
    return {"hires": min(_HIRES_PX, size_px), "lowres": min(_LOWRES_PX, size_px)}


@dataclass(frozen=True)
class Previews:
    """Both previews of a slide's image, summed up window by window."""

    of: dict[str, _Preview]

    @classmethod
    def blank(cls, size_px: int) -> Previews:
        """Previews without any window yet."""
        return cls({name: _Preview.blank(size_px, px) for name, px in preview_px(size_px).items()})

    def add(self, grid: Grid, pixels: NDArray[np.uint8]) -> None:
        """Take in one window, (n_rows, n_cols, 3)."""
        for preview in self.of.values():
            preview.add(grid, pixels)

    def pixels(self) -> dict[str, NDArray[np.uint8]]:
        """Pictures by name, each (px, px, 3)."""
        return {name: preview.pixels for name, preview in self.of.items()}

    def save(self, spatial: Path) -> None:
        """Write ``tissue_hires_image.png`` and ``tissue_lowres_image.png``."""
        from PIL import Image

        spatial.mkdir(parents=True, exist_ok=True)
        for name, pixels in self.pixels().items():
            Image.fromarray(pixels).save(spatial / f"tissue_{name}_image.png")


@dataclass(frozen=True)
class _Preview:
    """Mean over boxes of a square picture, summed up window by window."""

    size_px: int
    light: NDArray[np.float64]  # (px, px, 3)

    @classmethod
    def blank(cls, size_px: int, px: int) -> _Preview:
        return cls(size_px, np.zeros((px, px, 3)))

    def add(self, grid: Grid, pixels: NDArray[np.uint8]) -> None:
        first, down = self._overlap(grid.row0, grid.n_rows)
        start, across = self._overlap(grid.col0, grid.n_cols)
        for channel in range(3):
            part = down @ (across @ pixels[..., channel].T.astype(np.float64)).T
            self.light[first : first + len(part), start : start + part.shape[1], channel] += part

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return np.rint(self.light).clip(0, 255).astype(np.uint8)

    def _overlap(self, start: int, count: int) -> tuple[int, sp.csr_array]:
        """First box that a run of pixels meets, and the share that each pixel has in each box."""
        box = self.size_px / len(self.light)
        first, last = int(start / box), min(int((start + count - 1e-9) / box), len(self.light) - 1)
        low = np.arange(first, last + 1)[:, None] * box
        pixel = np.arange(start, start + count)
        share = np.minimum(low + box, pixel + 1) - np.maximum(low, pixel)
        return first, sp.csr_array(share.clip(min=0) / box)
