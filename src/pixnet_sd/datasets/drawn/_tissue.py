"""Drawn tissue: compartments and nuclei, in micrometres from the slide's upper left corner.

Grids, noise and hashed numbers depend on position and seed only, so any window can be drawn on its own.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import product
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

NUCLEUS_REACH_UM = 12.0  # no nucleus paints farther from its centre

_CELLS = 128  # periods along a side of the noise table, after which the noise repeats
_PER_CELL = 8  # table samples in one period
_GLAND_PITCH_UM = 112.0
_EPITHELIUM_UM = 15.0  # height of the gland lining
_RIM_UM = 14.0  # depth of the outer tumour layer, whose cells express differently


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
        return (self.col0 + np.arange(self.n_cols, dtype=np.float64) + 0.5) * self.pitch_um

    @property
    def y_um(self) -> Floats:
        return (self.row0 + np.arange(self.n_rows, dtype=np.float64) + 0.5) * self.pitch_um

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_rows, self.n_cols

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns of the window in an array of the whole slide."""
        return slice(self.row0, self.row0 + self.n_rows), slice(self.col0, self.col0 + self.n_cols)

    @property
    def box_um(self) -> Box:
        left, top = self.col0 * self.pitch_um, self.row0 * self.pitch_um
        return left, top, left + self.n_cols * self.pitch_um, top + self.n_rows * self.pitch_um

    def pixel(self, x_um: Floats, y_um: Floats) -> tuple[Ints, Ints]:
        """Row and column, in the window, of the pixel nearest to each point."""
        row, col = (np.floor(value / self.pitch_um).astype(np.int64) for value in (y_um, x_um))
        return (row - self.row0).clip(0, self.n_rows - 1), (col - self.col0).clip(0, self.n_cols - 1)


def windows(side: int, step: int, pitch_um: float = 1.0) -> Iterator[Grid]:
    """Windows of ``step`` pixels that cover a square of ``side`` row by row; the last ones are smaller."""
    for row, col in product(range(0, side, step), repeat=2):
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
        at = [self._position(um, period_um, channel, axis) for axis, um in enumerate((grid.y_um, grid.x_um))]
        rows, cols = (np.floor(position).astype(np.int64) for position in at)
        row_weight, col_weight = ((position - np.floor(position)).astype(np.float32) for position in at)
        needed = self._table[np.arange(rows[0], rows[-1] + 2) % size]
        left, right = needed[:, cols % size], needed[:, (cols + 1) % size]
        across = left + (right - left) * col_weight
        drawn = np.diff(across, axis=0)[rows - rows[0]]
        drawn *= row_weight[:, None]
        drawn += across[rows - rows[0]]
        return np.asarray(drawn)

    def at(self, x_um: Any, y_um: Any, period_um: float | tuple[float, float], channel: int) -> Singles:
        """Noise at points, of one period or one along x and y; the same values as :meth:`grid` where they meet."""
        across_um, down_um = period_um if isinstance(period_um, tuple) else (period_um, period_um)
        row, col = self._position(y_um, down_um, channel, 0), self._position(x_um, across_um, channel, 1)
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


def hash_unit(seed: int, row: NDArray[Any], col: NDArray[Any], channel: int) -> Floats:
    """Return a number in [0, 1) that is a fixed function of seed, lattice site and channel (splitmix64 finaliser)."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + channel * 0xD1B54A32D192ED03) % 2**64)
    # lattice sites may be negative: two's complement keeps them apart
    row, col = (np.asarray(site, dtype=np.int64).astype(np.uint64) for site in (row, col))
    value = row + key
    for then in (col, np.uint64(0)):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31)) ^ then
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def smoothstep(value: NDArray[Any] | float, low: float, high: float) -> Singles:
    """Rise from 0 at ``low`` to 1 at ``high`` by a smooth cubic."""
    unit = np.clip((value - low) / (high - low), 0, 1)
    return np.asarray(unit * unit * (3 - 2 * unit), dtype=np.float32)


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], n_workers: int | None) -> Iterator[Result]:
    """Results of ``work`` in the order of ``items``, never many more than workers at once."""
    # Threads and not processes: nearly all of the time goes to numpy and scipy loops that let other threads run, and a
    # script without a main guard or a process that holds a GPU cannot be forked or spawned from safely.
    n_workers = n_workers or os.cpu_count() or 1
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > n_workers:
                    yield ahead.popleft().result()
            yield from (future.result() for future in ahead)
        finally:
            pool.shutdown(cancel_futures=True)


class NucleusKind(IntEnum):
    """What a nucleus looks like."""

    EPITHELIAL, TUMOUR, FIBROBLAST, IMMUNE = range(4)


class Source(IntEnum):
    """What expresses: nuclei by kind and context first, then areas."""

    EPITHELIAL, TUMOUR_CORE, TUMOUR_RIM, FIBROBLAST, IMMUNE_INFILTRATE, IMMUNE_STROMA, IMMUNE_EPITHELIUM = range(7)
    MATRIX, LUMEN, TISSUE = range(7, 10)


@dataclass(frozen=True)
class Compartments(Columns):
    """Soft masks in [0, 1], and two depths in µm, over one grid; each (n_rows, n_cols)."""

    edge_um: Singles  # rough distance to the tissue's border, positive inside
    tissue: Singles
    epithelium: Singles
    lumen: Singles
    membrane: Singles
    nest: Singles
    nest_depth_um: Singles
    infiltrate: Singles

    @property
    def stroma(self) -> Singles:
        """Tissue that is neither gland nor tumour."""
        return np.asarray(self.tissue * (1 - np.clip(self.epithelium + self.lumen + self.nest, 0, 1)))


@dataclass(frozen=True)
class Nuclei(Columns):
    """Nuclei as ellipses, every field (n,): centre, half axes, angle of the long axis, darkness, and their roles."""

    x_um: Floats
    y_um: Floats
    long_um: Floats
    short_um: Floats
    angle: Floats
    shade: Floats
    kind: Ints
    source: Ints

    def __len__(self) -> int:
        return len(self.x_um)


@dataclass(frozen=True)
class _Glands(Columns):
    """Glands by the lattice site that they lie on, every field (n,) but ``phase``."""

    x_um: Floats
    y_um: Floats
    radius_um: Floats
    phase: Floats  # (n, 2): of the two- and threefold bulges
    row: Ints
    col: Ints

    def outer_um(self, which: int | Ints, angle: Floats) -> Floats:
        """Outer radius in a direction."""
        phase = self.phase[which]
        bulge = 0.16 * np.cos(2 * angle + phase[..., 0]) + 0.07 * np.cos(3 * angle + phase[..., 1])
        return np.asarray(self.radius_um[which] * (1 + bulge))


class Tissue:
    """Tissue of ``size_um`` × ``size_um`` drawn from a seed; every method answers for any window alone."""

    def __init__(self, size_um: float, seed: int) -> None:
        self.size_um, self.seed = size_um, seed
        # small slides get finer zones, so that they hold every compartment too
        self._zone_um = float(np.clip(size_um / 6, 55, 165))
        self._fibres_rad = float(np.pi * np.random.default_rng([seed, 2]).uniform(-0.5, 0.5))  # from the x axis
        self.noise = Noise(seed)

    def edge_um(self, grid: Grid) -> Singles:
        """Rough signed distance to the tissue's border, positive inside."""
        # beyond 2000 µm the glass about the tissue does not grow and the corners fill up, so that a whole capture area
        # lies nearly all on tissue
        half, span_um = self.size_um / 2, min(self.size_um, 2000.0)
        power = 4 + 4 * float(smoothstep(self.size_um, 2000, 4000))
        x, y = np.abs(grid.x_um / half - 1), np.abs(grid.y_um / half - 1)
        # single precision, good to about 1 nm here, makes the root several times faster
        corner = (x[None] ** power).astype(np.float32) + (y[:, None] ** power).astype(np.float32)
        distance = half - 0.06 * span_um - corner ** np.float32(1 / power) * np.float32(half)
        wave = 0.03 * span_um * self.noise.grid(grid, 0.18 * self.size_um, 0)
        edge = distance + wave + 2.0 * self.noise.grid(grid, 35, 1)
        frame = np.minimum(half - half * x[None], half - half * y[:, None]) - 0.02 * span_um
        return np.asarray(np.minimum(edge, frame), dtype=np.float32)

    def compartments(self, grid: Grid) -> Compartments:
        """Soft masks over a grid."""
        noise, zone_um = self.noise, self._zone_um
        edge = self.edge_um(grid)
        tissue = smoothstep(edge, -1, 1)
        epithelium, lumen, membrane = self._gland_masks(grid)
        outside = 1 - np.clip(epithelium + lumen + membrane, 0, 1)
        relief = noise.grid(grid, zone_um, 2) + 0.5 * noise.grid(grid, 0.42 * zone_um, 3)
        depth = np.asarray((relief + 0.06 * noise.grid(grid, 22, 7) - 0.5) * 0.3 * zone_um, dtype=np.float32)
        nest = smoothstep(depth, -1, 1) * outside
        swarm = noise.grid(grid, 0.6 * zone_um, 4)
        beside = np.exp(-(((depth + 14) / 12) ** 2)) * smoothstep(swarm, -0.5, 0.6)
        infiltrate = np.maximum(smoothstep(swarm, 0.9, 1.5), beside) * outside * (1 - nest)
        epithelium, lumen, membrane, nest = (mask * tissue for mask in (epithelium, lumen, membrane, nest))
        infiltrate = (infiltrate * tissue).astype(np.float32)
        return Compartments(edge, tissue, epithelium, lumen, membrane, nest, depth, infiltrate)

    def nuclei(self, box_um: Box) -> Nuclei:
        """Nuclei whose centres lie in a box (smallest x, smallest y, largest x, largest y)."""
        left, top, right, bottom = (int(np.floor(v)) for v in box_um)
        grid = Grid(top - 1, left - 1, bottom - top + 3, right - left + 3, 1.0)
        masks = self.compartments(grid)
        lattices = ((NucleusKind.TUMOUR, 11.5, 10), (NucleusKind.FIBROBLAST, 13.0, 20), (NucleusKind.IMMUNE, 7.4, 30))
        on_lattices = [self._lattice_nuclei(box_um, grid, masks, *lattice) for lattice in lattices]
        every = Nuclei.joined([self._gland_nuclei(box_um), *on_lattices])
        return every.subset(masks.edge_um[grid.pixel(every.x_um, every.y_um)] > every.long_um + 1)

    def fibre_angle(self, x_um: Floats, y_um: Floats) -> Singles:
        """Direction of the stroma's fibres at points, radians from the x axis."""

        def warp_um(x_um: Floats, y_um: Floats) -> Singles:
            return np.asarray(46 * self.noise.at(x_um, y_um, 150, 5) + 5 * self.noise.at(x_um, y_um, 38, 6))

        slope_x, slope_y = (
            (warp_um(x_um + dx, y_um + dy) - warp_um(x_um - dx, y_um - dy)) / 4 for dx, dy in ((2, 0), (0, 2))
        )
        # fibres are level lines of "across" in fibre_frame_um, so they run at right angles to its slope
        cos, sin = np.cos(self._fibres_rad), np.sin(self._fibres_rad)
        return np.asarray(np.arctan2(sin - slope_x, cos + slope_y), dtype=np.float32)

    def fibre_frame_um(self, grid: Grid) -> tuple[Singles, Singles]:
        """Coordinates along and across the waving fibres, on a grid."""
        cos, sin, x, y = np.cos(self._fibres_rad), np.sin(self._fibres_rad), grid.x_um[None], grid.y_um[:, None]
        warp = 46 * self.noise.grid(grid, 150, 5) + 5 * self.noise.grid(grid, 38, 6)
        return (x * cos + y * sin).astype(np.float32), (y * cos - x * sin + warp).astype(np.float32)

    def _glands(self, box_um: Box) -> _Glands:
        row, col, x, y = _sites(self.seed, box_um, _GLAND_PITCH_UM, 50, margin_um=70, jitter=0.26)
        radius = 26 + 18 * hash_unit(self.seed, row, col, 52)
        zone = self.noise.at(x, y, self._zone_um, 2)
        keep = (zone < 0.15) & (hash_unit(self.seed, row, col, 53) < 0.8)
        phase = 2 * np.pi * np.stack([hash_unit(self.seed, row, col, channel) for channel in (54, 55)], -1)
        return _Glands(x, y, radius, phase, row, col).subset(keep)

    def _gland_masks(self, grid: Grid) -> tuple[Singles, Singles, Singles]:
        """Lining, lumen and basement membrane."""
        glands = self._glands(grid.box_um)
        depth = np.full(grid.shape, -50, dtype=np.float32)  # below the outer border
        for k in range(len(glands.x_um)):
            reach = 1.25 * glands.radius_um[k] + 6
            centre, first = np.array([glands.y_um[k], glands.x_um[k]]), (grid.row0, grid.col0)
            low = np.floor((centre - reach) / grid.pitch_um).astype(np.int64) - first
            high = np.ceil((centre + reach) / grid.pitch_um).astype(np.int64) - first
            rows, cols = map(slice, low.clip(0), high.clip(0))
            dx, dy = grid.x_um[cols] - glands.x_um[k], grid.y_um[rows, None] - glands.y_um[k]
            inside = glands.outer_um(k, np.arctan2(dy, dx)) - np.hypot(dx, dy)
            depth[rows, cols] = np.maximum(depth[rows, cols], inside)
        ragged = depth + 1.2 * self.noise.grid(grid, 7, 8)
        outer, lumen = smoothstep(depth, -1, 0.5), smoothstep(ragged, _EPITHELIUM_UM - 1, _EPITHELIUM_UM + 1)
        return outer * (1 - lumen), outer * lumen, smoothstep(depth, -3.5, -2) * (1 - outer)

    def _gland_nuclei(self, box_um: Box) -> Nuclei:
        """One basal row of nuclei around each gland, and a loose second one."""
        glands = self._glands(box_um)
        count = np.maximum((2 * np.pi * (glands.radius_um - 5) / 6.6).astype(np.int64), 1)
        gland, slot = np.nonzero(np.arange(72) < count[:, None])
        site = (glands.row[gland] * 7919 + glands.col[gland], slot)
        u = [hash_unit(self.seed, *site, 60 + k) for k in range(6)]
        angle = 2 * np.pi * (slot + 0.5 * (u[0] - 0.5)) / count[gland]
        inset = np.where(u[1] < 0.3, 8.6, 4.9) + 1.0 * (u[2] - 0.5)
        radius = glands.outer_um(gland, angle) - inset
        x, y = glands.x_um[gland] + radius * np.cos(angle), glands.y_um[gland] + radius * np.sin(angle)
        kind, source = (np.full(len(gland), value) for value in (NucleusKind.EPITHELIAL, Source.EPITHELIAL))
        long_um, short_um, shade = 3.6 + 0.9 * u[3], 2.5 + 0.5 * u[4], 0.95 + 0.3 * u[4]
        left, top, right, bottom = box_um
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        return Nuclei(x, y, long_um, short_um, angle + 0.5 * (u[5] - 0.5), shade, kind, source).subset(inside)

    def _lattice_nuclei(
        self, box_um: Box, grid: Grid, masks: Compartments, kind: NucleusKind, pitch_um: float, channel: int
    ) -> Nuclei:
        """Candidates on a jittered lattice, kept with the probability that their place gives them."""
        row, col, x, y = _sites(self.seed, box_um, pitch_um, channel, margin_um=0, jitter=0.3)
        u = [hash_unit(self.seed, row, col, channel + k) for k in range(2, 8)]
        place, angle = masks.subset(grid.pixel(x, y)), np.pi * u[4]
        # the source depends on the surroundings, not on the look of the nucleus alone
        if kind == NucleusKind.TUMOUR:
            long_um = 4.4 + 1.6 * u[0]
            short_um, shade = long_um * (0.72 + 0.22 * u[1]), 0.62 + 0.3 * u[2]
            source = np.where(place.nest_depth_um < _RIM_UM, Source.TUMOUR_RIM, Source.TUMOUR_CORE)
            chance = 0.96 * (place.nest > 0.5) * smoothstep(place.nest_depth_um, 2, 5)
        elif kind == NucleusKind.FIBROBLAST:
            long_um, short_um, shade = 5.0 + 3.2 * u[0], 1.2 + 0.5 * u[1], 1.1 + 0.4 * u[2]
            angle = self.fibre_angle(x, y) + 0.35 * (u[4] - 0.5)
            source = np.full(len(x), Source.FIBROBLAST)
            chance = 0.5 * (place.stroma > 0.8) * (place.membrane < 0.2) * (1 - 0.85 * place.infiltrate)
        else:
            long_um = 2.7 + 0.5 * u[0]
            short_um, shade = long_um * (0.86 + 0.12 * u[1]), 1.6 + 0.5 * u[2]
            loose = np.where(place.infiltrate > 0.25, Source.IMMUNE_INFILTRATE, Source.IMMUNE_STROMA)
            source = np.where(place.nest > 0.5, Source.IMMUNE_EPITHELIUM, loose)
            swarm = np.maximum(0.88 * place.infiltrate, 0.035) * (place.epithelium + place.lumen < 0.1)
            chance = np.where(place.nest > 0.5, 0.03, swarm)
        kinds = np.full(len(x), kind, dtype=np.int64)
        return Nuclei(x, y, long_um, short_um, angle, shade, kinds, source).subset(u[5] < chance)


def _sites(
    seed: int, box_um: Box, pitch_um: float, channel: int, *, margin_um: float, jitter: float
) -> tuple[Ints, Ints, Floats, Floats]:
    """Sites of a jittered hexagonal lattice in a box: lattice row, lattice column, x, y."""
    left, top, right, bottom = box_um
    height = pitch_um * 0.866
    rows = np.arange(int((top - margin_um) // height) - 1, int((bottom + margin_um) // height) + 3)
    cols = np.arange(int((left - margin_um) // pitch_um) - 2, int((right + margin_um) // pitch_um) + 3)
    row, col = (index.ravel() for index in np.meshgrid(rows, cols, indexing="ij"))
    shift_x, shift_y = (hash_unit(seed, row, col, channel + k) - 0.5 for k in range(2))
    x = (col + 0.5 * (row % 2) + 2 * jitter * shift_x) * pitch_um
    y = (row + 2 * jitter * shift_y) * height
    keep = (x >= left - margin_um) & (x < right + margin_um) & (y >= top - margin_um) & (y < bottom + margin_um)
    return row[keep], col[keep], x[keep], y[keep]
