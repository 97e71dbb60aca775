"""One drawn slide: bins of a turned lattice, segmented cells, and the counts of both, band by band.

A band is a row of blocks: nothing larger than a band's counts is needed at once, whatever the slide's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import islice, product
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import KDTree

from ._expression import (
    DENSITY_WINDOW,
    Panel,
    density_shape,
    draw_counts,
    fill_density,
    gene_panel,
    integrate_shapes,
    library_size,
)
from ._tissue import NUCLEUS_REACH_UM, Floats, Grid, Ints, Mask, Nuclei, Tissue, in_order, windows

BASE_UM = 2

_LARGEST_UM = 16
_BLOCK = 256  # side of the blocks that counts are drawn in, in bins of 2 µm: each has a random stream of its own
_CELL_MARGIN_UM = 3.0  # by which a cell reaches beyond its nucleus, where no other nucleus is nearer
_ANGLE = float(np.deg2rad(0.5))  # of the lattice
_COS, _SIN = np.cos(_ANGLE), np.sin(_ANGLE)
_CORNERS = 16  # of an outline
_NEIGHBOURS = 12  # that may bound a cell
_REACH_BINS = int(np.ceil(NUCLEUS_REACH_UM / BASE_UM))
_BATCH = 2048  # nuclei whose bins are found at once


def bin_barcodes(bin_um: int, row: Ints, col: Ints) -> NDArray[np.bytes_]:
    """``s_002um_00012_00345-1``, (n,)."""
    parts: list[Any] = [f"s_{bin_um:03d}um_".encode(), _digits(row, 5), b"_", _digits(col, 5), b"-1"]
    return np.asarray(reduce(np.char.add, parts))


def cell_barcodes(cell: Ints) -> NDArray[np.bytes_]:
    """``cellid_000000012-1``, (n,), of numbers from 0; the format counts from 1."""
    return np.char.add(np.char.add(b"cellid_", _digits(cell + 1, 9)), b"-1")


def spot_barcodes(number: Ints) -> NDArray[np.bytes_]:
    """Sixteen bases and ``-1``, (n,)."""
    # an odd factor keeps numbers apart and makes neighbours look unlike each other
    mixed = number.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    base = (mixed[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    return np.char.add(np.frombuffer(b"ACGT", dtype=np.uint8)[base].view("S16").ravel(), b"-1")


def _digits(number: Ints, width: int) -> NDArray[np.bytes_]:
    digits = number[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10
    return (digits + ord("0")).astype(np.uint8).view(f"S{width}").ravel()


@dataclass(frozen=True)
class Lattice:
    """Capture area of ``n_base`` × ``n_base`` bins of 2 µm about the slide's centre, turned by ``_ANGLE``."""

    size_um: float

    @property
    def n_base(self) -> int:
        """Bins of 2 µm along a side: a whole number of the largest bins that stays inside the image."""
        return int(self.size_um * 0.97 // _LARGEST_UM) * _LARGEST_UM // BASE_UM

    def centres_um(self, bin_um: int, row: Ints, col: Ints) -> tuple[Floats, Floats]:
        """Centres (x, y) in the slide's frame."""
        half = self.n_base * BASE_UM / 2
        u, v = (col + 0.5) * bin_um - half, (row + 0.5) * bin_um - half
        return self.size_um / 2 + u * _COS - v * _SIN, self.size_um / 2 + u * _SIN + v * _COS

    def base_at(self, x_um: Floats, y_um: Floats) -> tuple[Ints, Ints]:
        """Row and column of the 2 µm bins that points fall into; outside the capture area too."""
        dx, dy = x_um - self.size_um / 2, y_um - self.size_um / 2
        row, col = (value / BASE_UM + self.n_base / 2 for value in (dy * _COS - dx * _SIN, dx * _COS + dy * _SIN))
        return np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)

    def bins(self, bin_um: int, on_tissue: Mask) -> pd.DataFrame:
        """Row, column and centre (µm) of all bins that are whole, by barcode."""
        row, col = np.nonzero(self.whole(bin_um, on_tissue))
        x_um, y_um = self.centres_um(bin_um, row, col)
        columns = {"array_row": row, "array_col": col, "x_um": x_um, "y_um": y_um}
        return pd.DataFrame(columns, index=bin_barcodes(bin_um, row, col).astype(str))

    @staticmethod
    def whole(bin_um: int, on_tissue: Mask) -> Mask:
        """Whether all 2 µm parts of a bin lie on tissue, so that sums over parts are complete."""
        step = bin_um // BASE_UM
        n_rows, n_cols = (n // step for n in on_tissue.shape)
        return np.asarray(on_tissue.reshape(n_rows, step, n_cols, step).all(axis=(1, 3)))

    def gather(self, bin_um: int, on_tissue: Mask) -> sp.csr_matrix:
        """Sparse 0/1 (bins, 2 µm bins on tissue) that sums 2 µm bins into those of :meth:`bins`."""
        whole, step = self.whole(bin_um, on_tissue), bin_um // BASE_UM
        number = np.where(whole, np.cumsum(whole).reshape(whole.shape) - 1, -1)
        owner = number.repeat(step, axis=0).repeat(step, axis=1)[on_tissue]
        base = np.flatnonzero(owner >= 0)
        entries = (np.ones(len(base), np.float32), (owner[base], base))
        return sp.csr_matrix(entries, shape=(int(whole.sum()), len(owner)))


@dataclass(frozen=True)
class Band:
    """Counts of ``_BLOCK`` rows of the lattice, over its whole width."""

    first_row: int
    on_tissue: Mask  # (rows, n_base)
    counts: sp.csr_matrix  # (bins on tissue, genes), row by row


@dataclass(frozen=True)
class Cells:
    """All cells of a slide, by the bin of 2 µm that their centre lies in, row by row; arrays (n,)."""

    nuclei: Nuclei
    row: Ints
    col: Ints
    lattice: Lattice

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def _tree(self) -> KDTree:
        return KDTree(np.stack([self.nuclei.x_um, self.nuclei.y_um], axis=1))

    def until_row(self, row: int) -> int:
        """Number of cells whose centre lies above a row of the lattice."""
        return int(np.searchsorted(self.row, row))

    def of_bins(self, first_row: int, on_tissue: Mask) -> tuple[Ints, Mask]:
        """Cell of each bin on tissue of a few rows of the lattice, -1 for none, and whether its nucleus covers it."""
        # the nucleus that covers a bin's centre owns it, else the cell with the nearest centre if that covers it
        owner = self._nuclei_over(first_row, on_tissue.shape)[on_tissue]
        in_nucleus = owner >= 0
        row, col = (index[~in_nucleus] for index in np.nonzero(on_tissue))
        x_um, y_um = self.lattice.centres_um(BASE_UM, row + first_row, col)
        reach_um = NUCLEUS_REACH_UM + _CELL_MARGIN_UM
        _, nearest = self._tree.query(np.stack([x_um, y_um], axis=1), distance_upper_bound=reach_um)
        near = np.flatnonzero(nearest < len(self))
        inside = self._rho(nearest[near], x_um[near], y_um[near], _CELL_MARGIN_UM) <= 1
        owner[np.flatnonzero(~in_nucleus)[near[inside]]] = nearest[near[inside]]
        return owner, in_nucleus

    def _nuclei_over(self, first_row: int, shape: tuple[int, ...]) -> Ints:
        """Cell whose nucleus covers the centre of each bin, -1 for none, (rows, cols)."""
        start, stop = (self.until_row(row) for row in (first_row - _REACH_BINS, first_row + shape[0] + _REACH_BINS))
        owner = np.full(shape, -1, dtype=np.int64)
        rho_of_owner = np.full(shape, np.inf)
        offset = np.arange(-_REACH_BINS, _REACH_BINS + 1)
        for first in range(start, stop, _BATCH):
            which = np.arange(first, min(first + _BATCH, stop))
            row, col = self.row[which, None] + offset, self.col[which, None] + offset
            x, y = self.lattice.centres_um(BASE_UM, row[:, :, None], col[:, None, :])
            rho = self._rho(which[:, None, None], x, y, 0.0)
            cell, down, right = np.nonzero(rho <= 1)
            row, col, rho, cell = row[cell, down] - first_row, col[cell, right], rho[cell, down, right], which[cell]
            inside = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])
            inside[inside] = rho[inside] < rho_of_owner[row[inside], col[inside]]
            # of several values for one bin the last one stays: the innermost, and of two alike the first cell
            order = np.flatnonzero(inside)[np.lexsort((-cell[inside], -rho[inside]))]
            owner[row[order], col[order]] = cell[order]
            rho_of_owner[row[order], col[order]] = rho[order]
        return owner

    def _rho(self, which: Ints, x_um: Floats, y_um: Floats, margin_um: float) -> Floats:
        """Distance of points from the centre of a cell each, 1 on the border of its nucleus grown by a margin."""
        own = self.nuclei.subset(which)
        dx, dy, cos, sin = x_um - own.x_um, y_um - own.y_um, np.cos(own.angle), np.sin(own.angle)
        along, across = (dx * cos + dy * sin) / (own.long_um + margin_um), (dy * cos - dx * sin)
        return np.hypot(along, across / (own.short_um + margin_um))

    def outlines_px(self, which: Ints, mpp: float, *, nucleus: bool) -> Floats:
        """Closed outlines of some cells or of their nuclei in pixels, (n, corners + 1, 2), to two decimals."""
        # a cell is its nucleus's ellipse, grown, up to where another nucleus's centre is nearer
        own = self.nuclei.subset(which[:, None])
        margin_um = 0.0 if nucleus else _CELL_MARGIN_UM
        long_um, short_um = own.long_um + margin_um, own.short_um + margin_um
        # corners are closer where the ellipse bends more
        turn = 2 * np.pi * (np.arange(_CORNERS + 1) % _CORNERS) / _CORNERS
        angle = own.angle + np.arctan2(short_um * np.sin(turn), long_um * np.cos(turn))
        radius = _radius_um(long_um, short_um, angle - own.angle)
        if not nucleus:
            # the first neighbour is the cell itself; half-way to another centre that one becomes nearer
            centre = np.concatenate([own.x_um, own.y_um], axis=1)
            distance, other = self._tree.query(centre, k=range(2, min(_NEIGHBOURS, len(self) - 1) + 2))
            direction = np.arctan2(self.nuclei.y_um[other] - own.y_um, self.nuclei.x_um[other] - own.x_um)
            towards = np.cos(angle[:, :, None] - direction[:, None, :])
            half_way_um = np.full(towards.shape, np.inf)
            np.divide(distance[:, None, :] / 2, towards, out=half_way_um, where=towards > 0)
            inner = _radius_um(own.long_um, own.short_um, angle - own.angle)
            radius = np.maximum(inner, np.minimum(radius, half_way_um.min(axis=2, initial=np.inf)))
        x, y = own.x_um + radius * np.cos(angle), own.y_um + radius * np.sin(angle)
        return (np.stack([x, y], axis=-1) / mpp).round(2)


def _radius_um(long_um: Floats, short_um: Floats, angle: Floats) -> Floats:
    """Radius of an ellipse in a direction, which counts from its long axis."""
    return long_um * short_um / np.hypot(short_um * np.cos(angle), long_um * np.sin(angle))


class CellCounts:
    """Sums bins into cells, band by band; a cell is given out when no later band can add to it."""

    def __init__(self, cells: Cells, n_genes: int) -> None:
        self._cells, self._n_given = cells, 0
        self._pending = sp.csr_matrix((len(cells), n_genes), dtype=np.float32)  # rows of what was given are empty
        self._n_bins = np.zeros(len(cells), dtype=np.int64)

    def add(self, band: Band, owner: Ints) -> tuple[Ints, sp.csr_matrix]:
        """Take in a band, whose bins belong to ``owner``; returns the complete cells that have a bin, and counts."""
        n_cells, n_genes = self._pending.shape
        bins = np.flatnonzero(owner >= 0)
        gather = sp.csr_matrix((np.ones(len(bins), np.float32), (owner[bins], bins)), shape=(n_cells, len(owner)))
        pending = self._pending + gather @ band.counts
        self._n_bins += np.bincount(owner[bins], minlength=n_cells)
        is_last = band.first_row + len(band.on_tissue) == self._cells.lattice.n_base
        stop = n_cells if is_last else self._cells.until_row(band.first_row)  # a cell reaches over less than a band
        which = np.flatnonzero(self._n_bins[self._n_given : stop]) + self._n_given
        self._pending = sp.vstack([sp.csr_matrix((stop, n_genes), dtype=np.float32), pending[stop:]], format="csr")
        self._n_given = stop
        return which, pending[which]


@dataclass(frozen=True)
class DrawnSlide:
    """Tissue, genes and lattice of a slide, whose side is a whole number of pixels."""

    tissue: Tissue
    panel: Panel
    lattice: Lattice
    size_px: int
    mpp: float

    @classmethod
    def of(cls, *, size_um: float, mpp: float, n_genes: int, seed: int) -> DrawnSlide:
        """Slide of the arguments that the public functions share."""
        size_px = round(size_um / mpp)
        whole_um = size_px * mpp
        return cls(Tissue(whole_um, seed), gene_panel(n_genes), Lattice(whole_um), size_px, mpp)

    @property
    def size_um(self) -> float:
        return self.tissue.size_um

    @cached_property
    def density(self) -> NDArray[np.float16]:
        """Density of every source in memory, (sources, rows, cols)."""
        return np.asarray(fill_density(self.tissue, np.empty(density_shape(self.size_um), dtype=np.float16), None))

    def cells(self, n_workers: int | None = None) -> Cells:
        """All cells whose centre lies on the lattice; some 60 bytes each."""
        boxes = (grid.box_um for grid in windows(int(np.ceil(self.size_um)), DENSITY_WINDOW))
        nuclei = Nuclei.joined(list(in_order(self.tissue.nuclei, boxes, n_workers)))
        row, col = self.lattice.base_at(nuclei.x_um, nuclei.y_um)
        order, n_base = np.lexsort((nuclei.x_um, col, row)), self.lattice.n_base
        order = order[((row >= 0) & (row < n_base) & (col >= 0) & (col < n_base))[order]]
        return Cells(nuclei.subset(order), row[order], col[order], self.lattice)

    def bands(self, density: Any, n_workers: int | None = None) -> Iterator[Band]:
        """Counts of all bins, band after band, from a density in memory or on disk."""

        def draw(corner: tuple[int, int]) -> tuple[Mask, sp.csr_matrix]:
            on_tissue, integrals, library = self._expected(density, corner)
            return on_tissue, draw_counts(integrals * library[:, None], self.panel, (self.tissue.seed, 7, *corner))

        for first_row, on_tissue, counts, order in self._bands(draw, n_workers):
            yield Band(first_row, on_tissue, sp.vstack(counts, format="csr")[order])

    def expected(self, *, library: bool) -> tuple[Mask, Floats]:
        """Mask of the 2 µm bins on tissue; the integral of each source over these, (n, sources), or what is caught."""

        def catch(corner: tuple[int, int]) -> tuple[Mask, Floats]:
            on_tissue, integrals, sizes = self._expected(self.density, corner)
            return on_tissue, integrals * sizes[:, None] if library else integrals

        _, masks, caught, orders = zip(*self._bands(catch, None), strict=True)
        in_order_of_rows = [np.concatenate(blocks)[order] for blocks, order in zip(caught, orders, strict=True)]
        return np.concatenate(masks), np.concatenate(in_order_of_rows)

    def _bands(
        self, work: Callable[[tuple[int, int]], tuple[Mask, Any]], n_workers: int | None
    ) -> Iterator[tuple[int, Mask, Sequence[Any], Ints]]:
        """First row, mask, values by block, and their order row by row, of each band; ``work`` draws a block."""
        first = range(0, self.lattice.n_base, _BLOCK)
        done = in_order(work, product(first, first), n_workers)
        for first_row in first:
            masks, values = zip(*islice(done, len(first)), strict=True)
            rows = np.concatenate([np.nonzero(mask)[0] for mask in masks])
            yield first_row, np.concatenate(masks, axis=1), values, np.argsort(rows, kind="stable")

    def _expected(self, density: Any, corner: tuple[int, int]) -> tuple[Mask, Floats, Floats]:
        """Mask of a block's bins on tissue, integral of each source over these (n, sources), and library sizes (n,)."""
        sides = (np.arange(first, min(first + _BLOCK, self.lattice.n_base)) for first in corner)
        row, col = np.meshgrid(*sides, indexing="ij")
        x, y = self.lattice.centres_um(BASE_UM, row, col)
        left, top = (max(int(centre.min()) - BASE_UM - 1, 0) for centre in (x, y))
        right, bottom = (int(centre.max()) + BASE_UM + 2 for centre in (x, y))
        grid = Grid(top, left, bottom - top, right - left)
        inside = self.tissue.edge_um(grid)[grid.pixel(x, y)] > 0
        x, y = x[inside], y[inside]
        box = np.asarray(density[:, *grid.slices]).astype(np.float32)
        integrals = integrate_shapes(box, x - left, y - top, BASE_UM, angle=_ANGLE)
        return inside, integrals, library_size(self.tissue, row[inside], col[inside], x, y)
