"""One drawn slide: the generator behind image, counts and truth, in memory or in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._counts import draw_counts, library_size
from ._density import density_shape, fill_density, read_box
from ._expression import DENSITY_PITCH_UM, Panel, gene_panel
from ._integrals import integrate_squares
from ._lattice import BASE_UM, Lattice
from ._noise import Grid
from ._parallel import in_order
from ._tissue import Tissue

__all__ = ["BLOCK", "Band", "DrawnSlide", "Expected"]

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
