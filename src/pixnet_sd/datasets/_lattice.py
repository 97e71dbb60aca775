"""Square bins on a slightly turned lattice, as a Visium HD capture area lies under an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._barcodes import bin_barcodes

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
