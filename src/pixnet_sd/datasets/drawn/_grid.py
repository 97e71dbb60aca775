"""Grids, noise and hashed numbers that depend on position and seed only, so any window can be drawn on its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # smallest x, smallest y, largest x, largest y

_CELLS = 128  # periods along a side of the table, after which the noise repeats
_PER_CELL = 8  # table samples in one period


@dataclass(frozen=True)
class Columns:
    """Base of records whose fields are arrays of one shape."""

    def subset(self, keep: Any) -> Self:
        """Index every column alike."""
        return type(self)(*(getattr(self, field.name)[keep] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Concatenate records."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Grid:
    """Window of a regular grid in micrometres: sample (i, j) sits at the centre of its pixel.

    ``row0`` and ``col0`` count pixels from the slide's origin, so every window of one pitch shares one lattice.
    """

    row0: int
    col0: int
    n_rows: int
    n_cols: int
    pitch_um: float = 1.0  # that of densities

    @property
    def x_um(self) -> Floats:
        """Centres of the columns."""
        return (self.col0 + np.arange(self.n_cols, dtype=np.float64) + 0.5) * self.pitch_um

    @property
    def y_um(self) -> Floats:
        """Centres of the rows."""
        return (self.row0 + np.arange(self.n_rows, dtype=np.float64) + 0.5) * self.pitch_um

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.n_rows, self.n_cols

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns of the window in an array of the whole slide."""
        return slice(self.row0, self.row0 + self.n_rows), slice(self.col0, self.col0 + self.n_cols)

    @property
    def box_um(self) -> Box:
        """Smallest x, smallest y, largest x, largest y."""
        left, top = self.col0 * self.pitch_um, self.row0 * self.pitch_um
        return left, top, left + self.n_cols * self.pitch_um, top + self.n_rows * self.pitch_um

    def pixel(self, x_um: Floats, y_um: Floats) -> tuple[Ints, Ints]:
        """Row and column, in the window, of the pixel nearest to each point."""
        row, col = (np.floor(value / self.pitch_um).astype(np.int64) for value in (y_um, x_um))
        return (row - self.row0).clip(0, self.n_rows - 1), (col - self.col0).clip(0, self.n_cols - 1)


def windows(side: int, step: int, pitch_um: float = 1.0) -> Iterator[Grid]:
    """Windows of ``step`` pixels that cover a square of ``side`` row by row; the last ones are smaller."""
    for row in range(0, side, step):
        for col in range(0, side, step):
            yield Grid(row, col, min(step, side - row), min(step, side - col), pitch_um)


class Noise:
    """Periodic smooth noise of mean 0 and standard deviation 1, many independent-looking channels from one table."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        table = rng.standard_normal((_CELLS * _PER_CELL, _CELLS * _PER_CELL), dtype=np.float32)
        table = gaussian_filter(table, 0.53 * _PER_CELL, mode="wrap", truncate=3)
        self._table: Singles = ((table - table.mean()) / table.std()).astype(np.float32)
        self._shift = rng.uniform(0, table.shape[0], (64, 2))

    def grid(self, grid: Grid, period_um: float, channel: int) -> Singles:
        """Noise on a grid, (n_rows, n_cols)."""
        size = self._table.shape[0]
        rows, row_weight = _split(self._position(grid.y_um, period_um, channel, 0))
        cols, col_weight = _split(self._position(grid.x_um, period_um, channel, 1))
        needed = self._table[np.arange(rows[0], rows[-1] + 2) % size]
        left, right = needed[:, cols % size], needed[:, (cols + 1) % size]
        across = left + (right - left) * col_weight
        drawn = np.diff(across, axis=0)[rows - rows[0]]
        drawn *= row_weight[:, None]
        drawn += across[rows - rows[0]]
        return np.asarray(drawn)

    def at(self, x_um: NDArray[Any], y_um: NDArray[Any], period_um: float, channel: int) -> Singles:
        """Noise at points; the same values as :meth:`grid` where they meet."""
        return self.warped(x_um, y_um, (period_um, period_um), channel)

    def warped(self, x_um: NDArray[Any], y_um: NDArray[Any], periods_um: tuple[float, float], channel: int) -> Singles:
        """Noise at points, with its own period along each axis."""
        row = self._position(y_um, periods_um[1], channel, 0)
        col = self._position(x_um, periods_um[0], channel, 1)
        return np.asarray(map_coordinates(self._table, [row, col], order=1, mode="grid-wrap", output=np.float32))

    def white(self, grid: Grid, channel: int) -> Singles:
        """Noise without correlation between neighbouring samples."""
        size = self._table.shape[0]
        shift = self._shift[channel].astype(np.int64)
        # a stride of 21 samples passes the table's correlation; 21 and 1024 share no factor
        rows = (shift[0] + 21 * (grid.row0 + np.arange(grid.n_rows))) % size
        cols = (shift[1] + 21 * (grid.col0 + np.arange(grid.n_cols))) % size
        return np.asarray(self._table[rows][:, cols])

    def _position(self, value_um: NDArray[Any], period_um: float, channel: int, axis: int) -> NDArray[Any]:
        return np.asarray(value_um * (_PER_CELL / period_um) + self._shift[channel, axis])


def _split(position: Floats) -> tuple[Ints, Singles]:
    whole = np.floor(position)
    return whole.astype(np.int64), (position - whole).astype(np.float32)


def hash_unit(seed: int, row: NDArray[Any], col: NDArray[Any], channel: int) -> Floats:
    """Return a number in [0, 1) that is a fixed function of seed, lattice site and channel (splitmix64 finaliser)."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + channel * 0xD1B54A32D192ED03) % 2**64)
    # lattice sites may be negative: two's complement keeps them apart
    mixed = _finalise(np.asarray(row, dtype=np.int64).astype(np.uint64) + key)
    mixed = _finalise(mixed ^ np.asarray(col, dtype=np.int64).astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _finalise(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def smoothstep(value: NDArray[Any] | float, low: float, high: float) -> Singles:
    """Rise from 0 at ``low`` to 1 at ``high`` by a smooth cubic."""
    unit = np.clip((value - low) / (high - low), 0, 1)
    return np.asarray(unit * unit * (3 - 2 * unit), dtype=np.float32)


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], n_workers: int | None) -> Iterator[Result]:
    """Results of ``work`` in the order of ``items``, never many more than workers at once.

    Threads and not processes: nearly all of the time goes to numpy and scipy loops that let other threads run, and a
    script without a main guard or a process that holds a GPU cannot be forked or spawned from safely.
    """
    n_workers = n_workers or os.cpu_count() or 1
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > n_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
