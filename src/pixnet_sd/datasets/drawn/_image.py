"""Haematoxylin and eosin image of a drawn tissue, window by window, and its previews."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from PIL import Image

from ._tissue import NUCLEUS_REACH_UM, Grid, Nuclei, NucleusKind, Pixels, Singles, Tissue, in_order, smoothstep, windows

WINDOW_PX = 1024
_PREVIEW_PX = {"hires": 1000, "lowres": 300}

# optical density of one unit of stain in red, green and blue
_HAEMATOXYLIN = np.array([0.60, 0.74, 0.36], dtype=np.float32)
_EOSIN = np.array([0.17, 0.80, 0.50], dtype=np.float32)
_GLASS = np.array([243, 241, 244], dtype=np.float32)


def draw(tissue: Tissue, size_px: int, mpp: float, n_workers: int | None = None) -> Iterator[tuple[Grid, Pixels]]:
    """Windows of the image of the whole tissue, row by row of windows; pixels are (rows, cols, 3)."""
    yield from in_order(lambda grid: (grid, draw_window(tissue, grid)), windows(size_px, WINDOW_PX, mpp), n_workers)


def draw_window(tissue: Tissue, grid: Grid) -> Pixels:
    """Image of one window, (n_rows, n_cols, 3); windows drawn apart fit together without a seam."""
    (left, top, right, bottom), reach = grid.box_um, NUCLEUS_REACH_UM
    cover, chromatin = _stamp(tissue.nuclei((left - reach, top - reach, right + reach, bottom + reach)), grid)
    eosin, haze = _ground(tissue, grid)
    noise = tissue.noise
    grain = 1 + 0.2 * noise.grid(grid, 1.3, 10) + 0.1 * noise.grid(grid, 2.8, 11)
    batch = 1 + 0.05 * noise.grid(grid, 400, 12)
    haematoxylin = (haze * (1 - cover) + chromatin * grain) * batch
    eosin = eosin * (1 - 0.45 * cover) * (1 + 0.05 * noise.grid(grid, 330, 13))
    # Beer-Lambert: light that two stains let through, plus camera noise
    image = np.empty((*grid.shape, 3), dtype=np.uint8)
    for channel in range(3):
        density = haematoxylin * _HAEMATOXYLIN[channel] + eosin * _EOSIN[channel]
        light = _GLASS[channel] * np.exp(-density) + 1.8 * noise.white(grid, 20 + channel)
        image[..., channel] = np.clip(np.rint(light), 0, 255)
    return image


def _ground(tissue: Tissue, grid: Grid) -> tuple[Singles, Singles]:
    """Eosin, and diffuse haematoxylin, of everything but the nuclei."""
    masks, noise = tissue.compartments(grid), tissue.noise
    # wavy bundles of collagen, about -2 to 2, and the clefts between them, 0 to 1
    along, across = tissue.fibre_frame_um(grid)
    coarse, fine, cleft = (
        noise.at(along, across, periods_um, channel)
        for periods_um, channel in (((70, 7.5), 16), ((24, 2.4), 17), ((46, 5.5), 18))
    )
    fibre, gap = 0.75 * coarse + 0.6 * fine, smoothstep(cleft + 0.25 * fine, 1.25, 1.75)
    mottle = noise.grid(grid, 4.5, 14) + 0.6 * noise.grid(grid, 1.7, 9)
    soft = noise.grid(grid, 16, 15)
    stroma = masks.stroma * (1 - masks.infiltrate)
    matrix = np.clip(0.56 + 0.17 * fibre + 0.05 * mottle, 0.08, None) * (1 - 0.82 * gap)
    epithelium = 0.52 + 0.07 * mottle + 0.06 * soft
    nest = (0.50 + 0.08 * mottle + 0.06 * soft) * (1 - 0.5 * smoothstep(-masks.nest_depth_um, -2.5, 0))
    infiltrate = np.clip(0.36 + 0.09 * mottle, 0.05, None)
    lumen = 0.03 + 0.14 * smoothstep(soft, 0.9, 1.8)
    eosin = stroma * matrix + masks.epithelium * epithelium + masks.nest * nest
    eosin = eosin + masks.infiltrate * infiltrate + masks.lumen * lumen + masks.membrane * 0.18
    haze = 0.03 * stroma + 0.16 * masks.epithelium + 0.2 * masks.nest + 0.12 * masks.infiltrate
    return eosin, haze * (1 + 0.2 * mottle)


def _stamp(nuclei: Nuclei, grid: Grid) -> tuple[Singles, Singles]:
    """Coverage by nuclei, 0 to 1, and their haematoxylin; where two overlap the darker one shows."""
    cover, chromatin = (np.zeros(grid.shape, dtype=np.float32) for _ in range(2))
    of_kinds = (nuclei.subset(np.flatnonzero(nuclei.kind == kind)) for kind in NucleusKind)
    for some in (own.subset(slice(start, start + 1024)) for own in of_kinds for start in range(0, len(own), 1024)):
        half = int(np.ceil((some.long_um.max() * 1.15 + 1) / grid.pitch_um))
        row, col = (
            np.floor(centre_um / grid.pitch_um).astype(np.int64)[:, None] + np.arange(-half, half + 1)
            for centre_um in (some.y_um, some.x_um)
        )
        dy = ((row + 0.5) * grid.pitch_um - some.y_um[:, None]).astype(np.float32)[:, :, None]
        dx = ((col + 0.5) * grid.pitch_um - some.x_um[:, None]).astype(np.float32)[:, None, :]
        alpha, stain = _profile(some, dx, dy)
        row, col = (row - grid.row0)[:, :, None], (col - grid.col0)[:, None, :]
        inside = (row >= 0) & (row < grid.n_rows) & (col >= 0) & (col < grid.n_cols) & (alpha > 0)
        flat = (row * grid.n_cols + col)[inside]
        np.maximum.at(cover.reshape(-1), flat, alpha[inside])
        np.maximum.at(chromatin.reshape(-1), flat, stain[inside])
    return cover, chromatin


def _profile(nuclei: Nuclei, dx: Singles, dy: Singles) -> tuple[Singles, Singles]:
    """Coverage and haematoxylin on each nucleus's patch, (n, rows, cols)."""
    columns = (np.cos(nuclei.angle), np.sin(nuclei.angle), nuclei.long_um, nuclei.short_um, nuclei.shade)
    cos, sin, long_um, short_um, shade, twist = (
        values.astype(np.float32)[:, None, None] for values in (*columns, 7 * nuclei.shade)
    )
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    # a bent, slightly egg-shaped ellipse
    across = across + 0.16 * short_um * np.sin(twist + 2.2 * along / long_um)
    rho = np.hypot(along / long_um, across / (short_um * (1 + 0.12 * along / long_um)))
    edge_um = (1 - rho) * short_um
    alpha = smoothstep(edge_um, -0.45, 0.45)
    if nuclei.kind[0] in (NucleusKind.TUMOUR, NucleusKind.EPITHELIAL):
        # open chromatin: a dark membrane, a pale middle, a nucleolus beside the centre
        rim = np.exp(-(((edge_um - 0.5) / 0.55) ** 2))
        nucleolus = np.exp(-((along - 0.25 * long_um) ** 2 + (across + 0.2 * short_um) ** 2) / 0.7)
        shade = shade * (1 + 0.45 * rim + 0.75 * nucleolus)
    return alpha, alpha * shade


def preview_px(size_px: int) -> dict[str, int]:
    """Sides of the two previews."""
    return {name: min(px, size_px) for name, px in _PREVIEW_PX.items()}


class Previews:
    """Both previews of a square image: means over boxes, summed up window by window."""

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px
        self._light = {name: np.zeros((px, px, 3)) for name, px in preview_px(size_px).items()}

    def add(self, grid: Grid, pixels: Pixels) -> None:
        """Take in one window, (n_rows, n_cols, 3)."""
        for light in self._light.values():
            first, down = self._shares(len(light), grid.row0, grid.n_rows)
            start, across = self._shares(len(light), grid.col0, grid.n_cols)
            for channel in range(3):
                sums = down @ (across @ pixels[..., channel].T.astype(np.float64)).T
                light[first : first + len(sums), start : start + sums.shape[1], channel] += sums

    def pixels(self) -> dict[str, Pixels]:
        """Pictures by name, each (px, px, 3)."""
        return {name: np.rint(light).clip(0, 255).astype(np.uint8) for name, light in self._light.items()}

    def save(self, spatial: Path) -> None:
        """Write ``tissue_hires_image.png`` and ``tissue_lowres_image.png``."""
        spatial.mkdir(parents=True, exist_ok=True)
        for name, pixels in self.pixels().items():
            Image.fromarray(pixels).save(spatial / f"tissue_{name}_image.png")

    def _shares(self, n_boxes: int, start: int, count: int) -> tuple[int, sp.csr_array]:
        """First box that a run of pixels meets, and the share that each pixel has in each box."""
        box = self._size_px / n_boxes
        first, last = int(start / box), min(int((start + count - 1e-9) / box), n_boxes - 1)
        low = np.arange(first, last + 1)[:, None] * box
        pixel = np.arange(start, start + count)
        share = np.minimum(low + box, pixel + 1) - np.maximum(low, pixel)
        return first, sp.csr_array(share.clip(min=0) / box)
