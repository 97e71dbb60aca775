"""Segmented cells: nuclei as they are drawn, the cells grown about them, and the bins that belong to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import KDTree

from ._expression import DENSITY_WINDOW
from ._noise import in_order
from ._slide import BASE_UM, BLOCK, Band, DrawnSlide, Lattice, cell_barcodes
from ._tissue import NUCLEUS_REACH_UM, Nuclei

__all__ = ["CellCounts", "Cells", "CountedCells", "find_cells"]

CELL_MARGIN_UM = 3.0
"""How far a cell reaches beyond its nucleus, where no other nucleus is nearer."""

_CORNERS = 16
_NEIGHBOURS = 12
_REACH_BINS = int(np.ceil(NUCLEUS_REACH_UM / BASE_UM))
_BATCH = 2048

_Covered = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True)
class Cells:
    """All cells of a slide, by the bin of 2 µm that their centre lies in, row by row; arrays (n,)."""

    nuclei: Nuclei
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    lattice: Lattice

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def _tree(self) -> KDTree:
        return KDTree(np.stack([self.nuclei.x_um, self.nuclei.y_um], axis=1))

    def until_row(self, row: int) -> int:
        """Number of cells whose centre lies above a row of the lattice."""
        return int(np.searchsorted(self.row, row))

    def of_bins(self, first_row: int, on_tissue: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Cell of each bin on tissue of a few rows of the lattice, -1 for none, and whether its nucleus covers it.

        A bin belongs to the nucleus that covers its centre, else to the cell with the nearest centre if that covers it.
        """
        owner = self._nuclei_over(first_row, on_tissue.shape)[on_tissue]
        in_nucleus = owner >= 0
        row, col = (part[~in_nucleus] for part in np.nonzero(on_tissue))
        owner[~in_nucleus] = self._nearest(*self.lattice.centres_um(BASE_UM, row + first_row, col))
        return owner, in_nucleus

    def _nearest(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.int64]:
        """Cell with the nearest centre, -1 where it does not reach the point."""
        reach_um = NUCLEUS_REACH_UM + CELL_MARGIN_UM
        _, nearest = self._tree.query(np.stack([x_um, y_um], axis=1), distance_upper_bound=reach_um)
        near = np.flatnonzero(nearest < len(self))
        rho = self._rho(nearest[near], x_um[near], y_um[near], CELL_MARGIN_UM)
        nearest[nearest == len(self)] = -1
        nearest[near[rho > 1]] = -1
        return np.asarray(nearest)

    def _nuclei_over(self, first_row: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Cell whose nucleus covers the centre of each bin, -1 for none, (rows, cols)."""
        near = (first_row - _REACH_BINS, first_row + shape[0] + _REACH_BINS)
        start, stop = (self.until_row(row) for row in near)
        owner = np.full(shape, -1, dtype=np.int64)
        rho_of_owner = np.full(shape, np.inf)
        for first in range(start, stop, _BATCH):
            cell, row, col, rho = self._covered(np.arange(first, min(first + _BATCH, stop)))
            row = row - first_row
            inside = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])
            inside[inside] = rho[inside] < rho_of_owner[row[inside], col[inside]]
            # of several values for one bin the last one stays: the innermost, and of two alike the first cell
            order = np.flatnonzero(inside)[np.lexsort((-cell[inside], -rho[inside]))]
            owner[row[order], col[order]] = cell[order]
            rho_of_owner[row[order], col[order]] = rho[order]
        return owner

    def _covered(self, which: NDArray[np.int64]) -> _Covered:
        """Cell, row and column of every bin that some nuclei cover, and how far out it lies, 1 on the border."""
        offset = np.arange(-_REACH_BINS, _REACH_BINS + 1)
        row, col = self.row[which, None] + offset, self.col[which, None] + offset
        x, y = self.lattice.centres_um(BASE_UM, row[:, :, None], col[:, None, :])
        rho = self._rho(which[:, None, None], x, y, 0.0)
        cell, down, right = np.nonzero(rho <= 1)
        return which[cell], row[cell, down], col[cell, right], rho[cell, down, right]

    def _rho(
        self, which: NDArray[np.int64], x_um: NDArray[np.float64], y_um: NDArray[np.float64], margin_um: float
    ) -> NDArray[np.float64]:
        """Distance of points from the centre of some cell each, 1 on the border of its grown ellipse."""
        nuclei = self.nuclei
        dx, dy = x_um - nuclei.x_um[which], y_um - nuclei.y_um[which]
        cos, sin = np.cos(nuclei.angle[which]), np.sin(nuclei.angle[which])
        long_um, short_um = nuclei.long_um[which] + margin_um, nuclei.short_um[which] + margin_um
        return np.hypot((dx * cos + dy * sin) / long_um, (dy * cos - dx * sin) / short_um)

    def outlines_px(self, which: NDArray[np.int64], mpp: float, *, nucleus: bool) -> NDArray[np.float64]:
        """Closed outlines of some cells or of their nuclei in pixels, (n, corners + 1, 2), to two decimals.

        A cell is its nucleus's ellipse, grown, up to where another nucleus's centre is nearer.
        """
        angle, radius = self._ellipse(which, 0.0 if nucleus else CELL_MARGIN_UM)
        if not nucleus:
            inner = self._radius_um(which, angle, 0.0)
            radius = np.maximum(inner, np.minimum(radius, self._half_way_um(which, angle)))
        x, y = self.nuclei.x_um[which, None], self.nuclei.y_um[which, None]
        return (np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=-1) / mpp).round(2)

    def _ellipse(self, which: NDArray[np.int64], margin_um: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Directions of corners from the centre, closer where the ellipse bends more, and their radii."""
        turn = 2 * np.pi * (np.arange(_CORNERS + 1) % _CORNERS) / _CORNERS
        long_um, short_um = (part[which, None] + margin_um for part in (self.nuclei.long_um, self.nuclei.short_um))
        angle = self.nuclei.angle[which, None] + np.arctan2(short_um * np.sin(turn), long_um * np.cos(turn))
        return angle, self._radius_um(which, angle, margin_um)

    def _radius_um(self, which: NDArray[np.int64], angle: NDArray[np.float64], margin_um: float) -> NDArray[np.float64]:
        long_um, short_um = (part[which, None] + margin_um for part in (self.nuclei.long_um, self.nuclei.short_um))
        turned = angle - self.nuclei.angle[which, None]
        return long_um * short_um / np.hypot(short_um * np.cos(turned), long_um * np.sin(turned))

    def _half_way_um(self, which: NDArray[np.int64], angle: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distance at which another centre becomes nearer, in each direction."""
        centre = np.stack([self.nuclei.x_um[which], self.nuclei.y_um[which]], axis=1)
        # the first one is the cell itself
        distance, other = self._tree.query(centre, k=range(2, min(_NEIGHBOURS, len(self) - 1) + 2))
        direction = np.arctan2(self.nuclei.y_um[other] - centre[:, 1:], self.nuclei.x_um[other] - centre[:, :1])
        towards = np.cos(angle[:, :, None] - direction[:, None, :])
        limit = np.full(towards.shape, np.inf)
        np.divide(distance[:, None, :] / 2, towards, out=limit, where=towards > 0)
        return np.asarray(limit.min(axis=2, initial=np.inf))


def find_cells(slide: DrawnSlide, n_workers: int | None = None) -> Cells:
    """All cells whose centre lies on the lattice; some 60 bytes each."""
    found = list(in_order(slide.tissue.nuclei, _boxes_um(slide.size_um), n_workers))
    nuclei = Nuclei(*(np.concatenate([getattr(part, field.name) for part in found]) for field in fields(Nuclei)))
    row, col = slide.lattice.base_at(nuclei.x_um, nuclei.y_um)
    order = np.lexsort((nuclei.x_um, col, row))
    n_base = slide.lattice.n_base
    order = order[((row >= 0) & (row < n_base) & (col >= 0) & (col < n_base))[order]]
    return Cells(nuclei.subset(order), row[order], col[order], slide.lattice)


def _boxes_um(size_um: float) -> Iterator[tuple[float, float, float, float]]:
    starts = np.arange(0, size_um, DENSITY_WINDOW)
    for top in starts:
        for left in starts:
            yield left, top, min(left + DENSITY_WINDOW, size_um), min(top + DENSITY_WINDOW, size_um)


@dataclass(frozen=True)
class CountedCells:
    """Cells that have at least one bin, and their counts."""

    which: NDArray[np.int64]
    counts: sp.csr_matrix  # (n, genes)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Numbers from 1, as the format counts."""
        return self.which + 1

    @property
    def barcodes(self) -> NDArray[np.bytes_]:
        """Names, as bytes."""
        return cell_barcodes(self.numbers)


class CellCounts:
    """Sums bins into cells, band by band; a cell is given out when no later band can add to it."""

    def __init__(self, cells: Cells, n_genes: int) -> None:
        self._cells = cells
        self._first = 0
        self._pending = sp.csr_matrix((0, n_genes), dtype=np.float32)
        self._n_bins = np.zeros(0, dtype=np.int64)

    def add(self, band: Band, owner: NDArray[np.int64]) -> CountedCells:
        """Take in a band, whose bins belong to ``owner``; returns the cells that are complete."""
        stop = self._cells.until_row(band.first_row + 2 * BLOCK)
        bins = np.flatnonzero(owner >= 0)
        here = owner[bins] - self._first
        n_pending = stop - self._first
        ones = np.ones(len(bins), dtype=np.float32)
        gather = sp.csr_matrix((ones, (here, bins)), shape=(n_pending, len(owner)))
        self._pending.resize(n_pending, self._pending.shape[1])
        self._pending = self._pending + gather @ band.counts
        self._n_bins = np.concatenate([self._n_bins, np.zeros(n_pending - len(self._n_bins), dtype=np.int64)])
        self._n_bins += np.bincount(here, minlength=n_pending)
        return self._give(self._cells.until_row(band.first_row))

    def rest(self) -> CountedCells:
        """Cells that are left after the last band."""
        return self._give(self._first + len(self._n_bins))

    def _give(self, stop: int) -> CountedCells:
        n = stop - self._first
        found = np.flatnonzero(self._n_bins[:n])
        given = CountedCells(found + self._first, self._pending[found])
        self._first, self._pending, self._n_bins = stop, self._pending[n:], self._n_bins[n:]
        return given
