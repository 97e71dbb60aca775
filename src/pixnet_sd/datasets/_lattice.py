"""Square bins on a slightly turned lattice, as a Visium HD capture area lies under an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["BASE_UM", "BINS_UM", "Bins", "Lattice"]

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
    def names(self) -> list[str]:
        """Barcodes."""
        pairs = zip(self.array_row, self.array_col, strict=True)
        return [f"s_{self.bin_um:03d}um_{row:05d}_{col:05d}-1" for row, col in pairs]

    def gather(self, base: Bins) -> sp.csr_matrix:
        """Sparse 0/1 (n, n of base) that sums the smallest bins into these."""
        step = self.bin_um // base.bin_um
        side = 1 + max(int(part.max(initial=0)) for part in (base.array_row, base.array_col)) // step
        number = np.full((side, side), -1)
        number[self.array_row, self.array_col] = np.arange(len(self))
        owner = number[base.array_row // step, base.array_col // step]
        child = np.flatnonzero(owner >= 0)
        ones = np.ones(len(child), dtype=np.float32)
        return sp.csr_matrix((ones, (owner[child], child)), shape=(len(self), len(base)))


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

    def all_base_um(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of every 2 µm bin, each (n_base, n_base)."""
        row, col = np.meshgrid(np.arange(self.n_base), np.arange(self.n_base), indexing="ij")
        return self.centres_um(BASE_UM, row, col)

    def bins(self, bin_um: int, base_on_tissue: NDArray[np.bool_]) -> Bins:
        """Bins all of whose 2 µm parts lie on tissue, so that sums over parts are complete."""
        step = bin_um // BASE_UM
        n_bins = self.n_base // step
        whole = base_on_tissue.reshape(n_bins, step, n_bins, step).all(axis=(1, 3))
        row, col = np.nonzero(whole)
        return Bins(bin_um, row, col, *self.centres_um(bin_um, row, col))
