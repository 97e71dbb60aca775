"""Regions on the points of a square lattice: Visium HD bins, and grids of circles or squares over a slide.

Each of millions of bins is two integers: bins near a tile are found by arithmetic, and polygons are made of those only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._regions import Circles, Float, Polygons, Regions, Spans, squares

_AXIS_TOLERANCE = 1e-9  # of a bin's side: what a corner may be off before a lattice counts as turned


@dataclass(frozen=True, eq=False)
class Lattice(Regions):
    """Squares that tile a lattice, or circles on its points, at positions `row` and `col`, each of shape (n,).

    Bin (row, col) covers [col, col + 1) x [row, row + 1) in lattice coordinates; its centre is (col + ½, row + ½).
    `to_grid` is the 3 × 3 similarity from lattice coordinates (col, row, 1) to px, `radius` that of circles in px; with
    None the regions are the squares.
    """

    row: NDArray[np.int32]
    col: NDArray[np.int32]
    to_grid: Float
    radius: float | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("row", np.int32), ("col", np.int32), ("to_grid", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))

    def __len__(self) -> int:
        return len(self.row)

    @property
    def pitch(self) -> float:
        """Distance between neighbouring points, px."""
        return float(np.sqrt(abs(np.linalg.det(self.to_grid[:2, :2]))))

    @property
    def is_aligned(self) -> bool:
        """Whether these are squares with sides along rows and columns of pixels, rows down and columns right."""
        a, b, c, d = self.to_grid[:2, :2].ravel() / self.pitch
        return self.radius is None and max(abs(b), abs(c)) < _AXIS_TOLERANCE and a > 0 and d > 0

    @property
    def reach(self) -> float:
        """Half the side of every region's bounding box, px."""
        return float(np.abs(self.to_grid[0, :2]).sum() / 2) if self.radius is None else self.radius

    @property
    def centre_xy(self) -> Float:
        """Centres, shape (n, 2)."""
        col, row = self.col + 0.5, self.row + 0.5
        return np.stack([m[0] * col + m[1] * row + m[2] for m in self.to_grid[:2]], axis=1)

    @property
    def bounds(self) -> Float:
        centre = self.centre_xy
        return np.concatenate([centre - self.reach, centre + self.reach], axis=1)

    @property
    def area(self) -> Float:
        return np.full(len(self), self.pitch**2 if self.radius is None else np.pi * self.radius**2)

    def transform(self, matrix: ArrayLike) -> Lattice:
        """Map the lattice by a similarity."""
        matrix = np.asarray(matrix, np.float64)
        scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        radius = None if self.radius is None else self.radius * float(scale)
        return Lattice(self.row, self.col, matrix @ self.to_grid, radius)

    def subset(self, index: ArrayLike) -> Lattice:
        index = np.asarray(index)
        return Lattice(self.row[index], self.col[index], self.to_grid, self.radius)

    def plain(self) -> Circles | Polygons:
        """Make the regions one by one; meant for a few of them at a time."""
        if self.radius is not None:
            return Circles(self.centre_xy, np.broadcast_to(self.radius, len(self)))
        x, y = self.to_grid[:2, 0]
        return squares(self.centre_xy, self.pitch, float(np.arctan2(y, x)))

    def spans(self, row0: int, row1: int, col0: int, col1: int) -> Spans:
        return self.plain().spans(row0, row1, col0, col1)

    def touching(self, x0: float, y0: float, x1: float, y1: float) -> NDArray[np.intp]:
        return self._centred(x0 - self.reach, y0 - self.reach, x1 + self.reach, y1 + self.reach)

    def within(self, x0: float, y0: float, x1: float, y1: float) -> NDArray[np.intp]:
        return self._centred(x0 + self.reach, y0 + self.reach, x1 - self.reach, y1 - self.reach)

    def _centred(self, x0: float, y0: float, x1: float, y1: float) -> NDArray[np.intp]:
        """Return the regions whose centre lies in a closed box, ascending."""
        if x1 < x0 or y1 < y0 or not len(self):
            return np.empty(0, np.intp)
        table, (row0, col0) = self._table
        corners = np.array([[x0, x1, x1, x0], [y0, y0, y1, y1], [1, 1, 1, 1]])
        cols, rows, _ = np.linalg.inv(self.to_grid) @ corners
        top, left = (max(int(np.floor(v.min() - 1)) - o, 0) for v, o in ((rows, row0), (cols, col0)))
        bottom, right = (int(np.ceil(v.max() + 1)) - o for v, o in ((rows, row0), (cols, col0)))
        near = table[top : max(bottom, top), left : max(right, left)]
        index = np.sort(near[near >= 0]).astype(np.intp)
        x, y = self.subset(index).centre_xy.T
        return index[(x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)]

    @cached_property
    def _table(self) -> tuple[NDArray[np.int32], tuple[int, int]]:
        """Index of the region on every position of the lattice's box, -1 for none, and the box's first row, column."""
        row0, col0 = int(self.row.min()), int(self.col.min())
        table = np.full((int(self.row.max()) - row0 + 1, int(self.col.max()) - col0 + 1), -1, np.int32)
        table[self.row - np.int32(row0), self.col - np.int32(col0)] = np.arange(len(self), dtype=np.int32)
        return table, (row0, col0)
