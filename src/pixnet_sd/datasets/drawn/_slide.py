"""Names of bins, cells and spots, made for millions at once.

Square bins on a slightly turned lattice, as a Visium HD capture area lies under an image.

Small pictures of a large one that is never there as a whole.

One drawn slide: the generator behind image, counts and truth, in memory or in a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._expression import (
    DENSITY_PITCH_UM,
    Panel,
    density_shape,
    draw_counts,
    fill_density,
    gene_panel,
    integrate_squares,
    library_size,
    read_box,
)
from ._noise import Grid, in_order
from ._tissue import Tissue

__all__ = [
    "BASE_UM",
    "BINS_UM",
    "BLOCK",
    "Band",
    "Bins",
    "DrawnSlide",
    "Expected",
    "Lattice",
    "Previews",
    "bin_barcodes",
    "cell_barcodes",
    "preview_px",
    "spot_barcodes",
]


def bin_barcodes(bin_um: int, row: NDArray[np.int64], col: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """``s_002um_00012_00345-1``, (n,)."""
    return _joined(f"s_{bin_um:03d}um_", _digits(row, 5), "_", _digits(col, 5), "-1")


def cell_barcodes(number: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """``cellid_000000012-1``, (n,)."""
    return _joined("cellid_", _digits(number, 9), "-1")


def spot_barcodes(number: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """Sixteen bases and ``-1``, (n,)."""
    bases = np.frombuffer(b"ACGT", dtype=np.uint8)
    # an odd factor keeps numbers apart and makes neighbours look unlike each other
    mixed = number.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return _joined(bases[(mixed[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)], "-1")


def _digits(number: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Decimal digits as characters, (n, width)."""
    return (number[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + ord("0")).astype(np.uint8)


def _joined(*parts: str | NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Texts that all have, and columns of characters, side by side."""
    n = max(len(part) for part in parts if not isinstance(part, str))
    columns = [
        np.broadcast_to(np.frombuffer(part.encode(), dtype=np.uint8), (n, len(part))) if isinstance(part, str) else part
        for part in parts
    ]
    characters = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return characters.view(f"S{characters.shape[1]}").ravel()


BASE_UM = 2
BINS_UM = (2, 4, 8, 16)


@dataclass(frozen=True)
class Bins:
    """Bins of one size that lie on tissue, row by row; arrays (n,)."""

    bin_um: int
    array_row: NDArray[np.int64]
    array_col: NDArray[np.int64]
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.array_row)

    @property
    def barcodes(self) -> NDArray[np.bytes_]:
        """Names, as bytes."""
        return bin_barcodes(self.bin_um, self.array_row, self.array_col)

    @property
    def names(self) -> list[str]:
        """Names, as text."""
        return [name.decode() for name in self.barcodes.tolist()]

    def gather(self, base: Bins) -> sp.csr_matrix:
        """Sparse 0/1 (n, n of base) that sums the smallest bins into these."""
        step = self.bin_um // base.bin_um
        own = _key(self.array_row, self.array_col)
        parent = _key(base.array_row // step, base.array_col // step)
        owner = np.searchsorted(own, parent).clip(max=max(len(own) - 1, 0))
        child = np.flatnonzero(own[owner] == parent) if len(own) else np.zeros(0, dtype=np.int64)
        ones = np.ones(len(child), dtype=np.float32)
        return sp.csr_matrix((ones, (owner[child], child)), shape=(len(self), len(base)))


def _key(row: NDArray[np.int64], col: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number that sorts row by row."""
    return row * 2**20 + col


@dataclass(frozen=True)
class Lattice:
    """Capture area of ``n_base`` × ``n_base`` bins of 2 µm about the slide's centre, turned by ``angle``."""

    size_um: float
    angle: float

    @property
    def n_base(self) -> int:
        """Bins of 2 µm along a side: a whole number of the largest bins that stays inside the image."""
        largest = max(BINS_UM)
        return int(self.size_um * 0.97 // largest) * largest // BASE_UM

    def centres_um(
        self, bin_um: int, row: NDArray[np.int64], col: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres (x, y) in the slide's frame."""
        half = self.n_base * BASE_UM / 2
        u, v = (col + 0.5) * bin_um - half, (row + 0.5) * bin_um - half
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return self.size_um / 2 + u * cos - v * sin, self.size_um / 2 + u * sin + v * cos

    def base_at(
        self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column of the 2 µm bins that points fall into; outside the capture area too."""
        dx, dy = x_um - self.size_um / 2, y_um - self.size_um / 2
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        row, col = (part / BASE_UM + self.n_base / 2 for part in (dy * cos - dx * sin, dx * cos + dy * sin))
        return np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)

    def bins(self, bin_um: int, whole: NDArray[np.bool_], first_row: int = 0) -> Bins:
        """Bins that are marked in an array of :meth:`whole`, whose rows begin at ``first_row``."""
        row, col = np.nonzero(whole)
        row = row + first_row
        return Bins(bin_um, row, col, *self.centres_um(bin_um, row, col))

    def bins_on(self, bin_um: int, base_on_tissue: NDArray[np.bool_]) -> Bins:
        """Bins of a whole lattice that lie on tissue."""
        return self.bins(bin_um, self.whole(bin_um, base_on_tissue))

    @staticmethod
    def whole(bin_um: int, base_on_tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether all 2 µm parts of a bin lie on tissue, so that sums over parts are complete."""
        step = bin_um // BASE_UM
        n_rows, n_cols = (n // step for n in base_on_tissue.shape)
        return np.asarray(base_on_tissue.reshape(n_rows, step, n_cols, step).all(axis=(1, 3)))


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


Result = TypeVar("Result")

BLOCK = 256
"""Side of the blocks that counts are drawn in, in bins of 2 µm: each has a random stream of its own."""

_ANGLE = float(np.deg2rad(0.5))


@dataclass(frozen=True)
class Expected:
    """What 2 µm bins on tissue are expected to catch; arrays over the bins, row by row."""

    on_tissue: NDArray[np.bool_]  # (rows, cols) of the lattice
    sources: NDArray[np.float64]  # (n, sources): integral of each over each bin
    library: NDArray[np.float64]  # (n,)


@dataclass(frozen=True)
class Band:
    """Counts of ``BLOCK`` rows of the lattice, over its whole width."""

    first_row: int
    on_tissue: NDArray[np.bool_]  # (rows, n_base)
    counts: sp.csr_matrix  # (bins on tissue, genes), row by row


@dataclass(frozen=True)
class DrawnSlide:
    """Tissue, genes and lattice of a slide."""

    tissue: Tissue
    panel: Panel
    size_px: int
    mpp: float

    @classmethod
    def of(cls, *, size_um: float, mpp: float, n_genes: int, seed: int) -> DrawnSlide:
        """Slide of the arguments that the public functions share."""
        size_px = round(size_um / mpp)
        return cls(Tissue(size_px * mpp, seed), gene_panel(n_genes), size_px, mpp)

    @property
    def size_um(self) -> float:
        """Side, a whole number of pixels."""
        return self.tissue.size_um

    @cached_property
    def lattice(self) -> Lattice:
        """Where the bins lie."""
        return Lattice(self.size_um, _ANGLE)

    @cached_property
    def density(self) -> NDArray[np.float16]:
        """Density of every source in memory, (sources, rows, cols)."""
        out = np.empty(density_shape(self.size_um), dtype=np.float16)
        return np.asarray(fill_density(self.tissue, out, None))

    def bands(self, density: Any, n_workers: int | None = None) -> Iterator[Band]:
        """Counts of all bins, band after band, from a density in memory or on disk."""

        def draw(corner: tuple[int, int]) -> tuple[NDArray[np.bool_], sp.csr_matrix]:
            expected = self._expected(density, corner)
            stream = (self.tissue.seed, 7, *corner)
            return expected.on_tissue, draw_counts(expected.sources * expected.library[:, None], self.panel, stream)

        for first_row, blocks in self._bands_of_blocks(draw, n_workers):
            masks = [mask for mask, _ in blocks]
            counts = sp.vstack([part for _, part in blocks], format="csr")
            yield Band(first_row, np.concatenate(masks, axis=1), counts[_row_by_row(masks)])

    def expected(self) -> Expected:
        """Expectations of all bins, in memory."""
        blocks = self._bands_of_blocks(lambda corner: self._expected(self.density, corner), None)
        bands = [_side_by_side(of_band) for _, of_band in blocks]
        return Expected(*(np.concatenate([getattr(band, field.name) for band in bands]) for field in fields(Expected)))

    def _bands_of_blocks(
        self, work: Callable[[tuple[int, int]], Result], n_workers: int | None
    ) -> Iterator[tuple[int, list[Result]]]:
        """First row of each band, and what ``work`` makes of the corners of its blocks."""
        first = range(0, self.lattice.n_base, BLOCK)
        done = in_order(work, ((row, col) for row in first for col in first), n_workers)
        for row in first:
            yield row, [next(done) for _ in first]

    def _expected(self, density: Any, corner: tuple[int, int]) -> Expected:
        rows, cols = (np.arange(first, min(first + BLOCK, self.lattice.n_base)) for first in corner)
        row, col = np.meshgrid(rows, cols, indexing="ij")
        x, y = self.lattice.centres_um(BASE_UM, row, col)
        grid = _grid_about(x, y)
        edge = self.tissue.edge_um(grid)
        inside = edge[np.floor(y).astype(np.int64) - grid.row0, np.floor(x).astype(np.int64) - grid.col0] > 0
        x, y = x[inside], y[inside]
        made = integrate_squares(read_box(density, grid), x - grid.col0, y - grid.row0, BASE_UM, self.lattice.angle)
        return Expected(inside, made, library_size(self.tissue, row[inside], col[inside], x, y))


def _grid_about(x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> Grid:
    """Grid of the density that covers bins with these centres."""
    left, top = (max(int(part.min()) - BASE_UM - 1, 0) for part in (x_um, y_um))
    right, bottom = (int(part.max()) + BASE_UM + 2 for part in (x_um, y_um))
    return Grid(top, left, bottom - top, right - left, DENSITY_PITCH_UM)


def _side_by_side(blocks: Sequence[Expected]) -> Expected:
    """Blocks of one band as one."""
    masks = [block.on_tissue for block in blocks]
    order = _row_by_row(masks)
    sources = np.concatenate([block.sources for block in blocks])[order]
    library = np.concatenate([block.library for block in blocks])[order]
    return Expected(np.concatenate(masks, axis=1), sources, library)


def _row_by_row(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """Order that turns bins of blocks side by side, one block after the other, into bins row by row."""
    rows = np.concatenate([np.nonzero(mask)[0] for mask in masks])
    return np.argsort(rows, kind="stable")
