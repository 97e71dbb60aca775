"""Drawn tissue: compartments and nuclei, in micrometres from the slide's upper left corner."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ._grid import Box, Columns, Floats, Grid, Ints, Noise, Singles, hash_unit, smoothstep

NUCLEUS_REACH_UM = 12.0  # no nucleus paints farther from its centre

_GLAND_PITCH_UM = 112.0
_EPITHELIUM_UM = 15.0  # height of the gland lining
_RIM_UM = 14.0  # depth of the outer tumour layer, whose cells express differently


class NucleusKind(IntEnum):
    """What a nucleus looks like."""

    EPITHELIAL = 0
    TUMOUR = 1
    FIBROBLAST = 2
    IMMUNE = 3


class Source(IntEnum):
    """What expresses: nuclei by kind and context first, then areas."""

    EPITHELIAL = 0
    TUMOUR_CORE = 1
    TUMOUR_RIM = 2
    FIBROBLAST = 3
    IMMUNE_INFILTRATE = 4
    IMMUNE_STROMA = 5
    IMMUNE_EPITHELIUM = 6
    MATRIX = 7
    LUMEN = 8
    TISSUE = 9


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
        self.size_um = size_um
        self.seed = seed
        # small slides get finer zones, so that they hold every compartment too
        self._zone_um = float(np.clip(size_um / 6, 55, 165))
        self._fibres_rad = float(np.pi * np.random.default_rng([seed, 2]).uniform(-0.5, 0.5))  # from the x axis
        self.noise = Noise(seed)

    def edge_um(self, grid: Grid) -> Singles:
        """Rough signed distance to the tissue's border, positive inside.

        The glass about the tissue does not grow beyond what a slide of 2000 µm has, and the corners fill up, so that
        a whole capture area lies nearly all on tissue.
        """
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
        return Compartments(
            edge_um=edge,
            tissue=tissue,
            epithelium=epithelium * tissue,
            lumen=lumen * tissue,
            membrane=membrane * tissue,
            nest=nest * tissue,
            nest_depth_um=depth,
            infiltrate=(infiltrate * tissue).astype(np.float32),
        )

    def nuclei(self, box_um: Box) -> Nuclei:
        """Nuclei whose centres lie in a box (smallest x, smallest y, largest x, largest y)."""
        left, top, right, bottom = (int(np.floor(v)) for v in box_um)
        grid = Grid(top - 1, left - 1, bottom - top + 3, right - left + 3, 1.0)
        masks = self.compartments(grid)
        every = Nuclei.joined(
            [
                self._gland_nuclei(box_um),
                self._lattice_nuclei(box_um, grid, masks, NucleusKind.TUMOUR, 11.5, 10),
                self._lattice_nuclei(box_um, grid, masks, NucleusKind.FIBROBLAST, 13.0, 20),
                self._lattice_nuclei(box_um, grid, masks, NucleusKind.IMMUNE, 7.4, 30),
            ]
        )
        return every.subset(masks.edge_um[grid.pixel(every.x_um, every.y_um)] > every.long_um + 1)

    def fibre_angle(self, x_um: Floats, y_um: Floats) -> Singles:
        """Direction of the stroma's fibres at points, radians from the x axis."""
        slope_x, slope_y = (
            (self._warp_um(x_um + dx, y_um + dy) - self._warp_um(x_um - dx, y_um - dy)) / 4
            for dx, dy in ((2, 0), (0, 2))
        )
        # fibres are level lines of "across" in fibre_frame_um, so they run at right angles to its slope
        cos, sin = np.cos(self._fibres_rad), np.sin(self._fibres_rad)
        return np.asarray(np.arctan2(sin - slope_x, cos + slope_y), dtype=np.float32)

    def fibre_frame_um(self, grid: Grid) -> tuple[Singles, Singles]:
        """Coordinates along and across the waving fibres, on a grid."""
        cos, sin = np.cos(self._fibres_rad), np.sin(self._fibres_rad)
        x, y = grid.x_um[None], grid.y_um[:, None]
        warp = 46 * self.noise.grid(grid, 150, 5) + 5 * self.noise.grid(grid, 38, 6)
        return (x * cos + y * sin).astype(np.float32), (y * cos - x * sin + warp).astype(np.float32)

    def _warp_um(self, x_um: Floats, y_um: Floats) -> Singles:
        """Height by which fibres wave, at points."""
        return np.asarray(46 * self.noise.at(x_um, y_um, 150, 5) + 5 * self.noise.at(x_um, y_um, 38, 6))

    def _glands(self, box_um: Box) -> _Glands:
        row, col, x, y = _sites(self.seed, box_um, _GLAND_PITCH_UM, 50, margin_um=70, jitter=0.26)
        radius = 26 + 18 * hash_unit(self.seed, row, col, 52)
        zone = self.noise.at(x, y, self._zone_um, 2)
        keep = (zone < 0.15) & (hash_unit(self.seed, row, col, 53) < 0.8)
        phase = 2 * np.pi * np.stack([hash_unit(self.seed, row, col, 54), hash_unit(self.seed, row, col, 55)], -1)
        return _Glands(x, y, radius, phase, row, col).subset(keep)

    def _gland_masks(self, grid: Grid) -> tuple[Singles, Singles, Singles]:
        """Lining, lumen and basement membrane."""
        glands = self._glands(grid.box_um)
        depth = np.full(grid.shape, -50, dtype=np.float32)  # below the outer border
        for k in range(len(glands.x_um)):
            reach = 1.25 * glands.radius_um[k] + 6
            cols = _range(glands.x_um[k] - reach, glands.x_um[k] + reach, grid.col0, grid.n_cols, grid.pitch_um)
            rows = _range(glands.y_um[k] - reach, glands.y_um[k] + reach, grid.row0, grid.n_rows, grid.pitch_um)
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
        nuclei = Nuclei(
            x_um=glands.x_um[gland] + radius * np.cos(angle),
            y_um=glands.y_um[gland] + radius * np.sin(angle),
            long_um=3.6 + 0.9 * u[3],
            short_um=2.5 + 0.5 * u[4],
            angle=angle + 0.5 * (u[5] - 0.5),
            shade=0.95 + 0.3 * u[4],
            kind=np.full(len(gland), NucleusKind.EPITHELIAL),
            source=np.full(len(gland), Source.EPITHELIAL),
        )
        left, top, right, bottom = box_um
        x, y = nuclei.x_um, nuclei.y_um
        return nuclei.subset((x >= left) & (x < right) & (y >= top) & (y < bottom))

    def _lattice_nuclei(
        self, box_um: Box, grid: Grid, masks: Compartments, kind: NucleusKind, pitch_um: float, channel: int
    ) -> Nuclei:
        """Candidates on a jittered lattice, kept with the probability that their place gives them."""
        row, col, x, y = _sites(self.seed, box_um, pitch_um, channel, margin_um=0, jitter=0.3)
        u = [hash_unit(self.seed, row, col, channel + k) for k in range(2, 8)]
        place = masks.subset(grid.pixel(x, y))
        long_um, short_um, shade, source, chance = _lattice_traits(kind, u, place)
        angle = np.pi * u[4]
        if kind == NucleusKind.FIBROBLAST:
            angle = self.fibre_angle(x, y) + 0.35 * (u[4] - 0.5)
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


def _lattice_traits(
    kind: NucleusKind, u: list[Floats], place: Compartments
) -> tuple[Floats, Floats, Floats, Ints, Singles]:
    """Half axes (µm), darkness, source, and probability of nuclei at lattice sites.

    The source depends on the surroundings, not on the look of the nucleus alone.
    """
    if kind == NucleusKind.TUMOUR:
        long_um = 4.4 + 1.6 * u[0]
        chance = 0.96 * (place.nest > 0.5) * smoothstep(place.nest_depth_um, 2, 5)
        source = np.where(place.nest_depth_um < _RIM_UM, Source.TUMOUR_RIM, Source.TUMOUR_CORE)
        return long_um, long_um * (0.72 + 0.22 * u[1]), 0.62 + 0.3 * u[2], source, chance
    if kind == NucleusKind.FIBROBLAST:
        chance = 0.5 * (place.stroma > 0.8) * (place.membrane < 0.2) * (1 - 0.85 * place.infiltrate)
        source = np.full(len(place.nest), Source.FIBROBLAST)
        return 5.0 + 3.2 * u[0], 1.2 + 0.5 * u[1], 1.1 + 0.4 * u[2], source, chance
    long_um = 2.7 + 0.5 * u[0]
    swarm = np.maximum(0.88 * place.infiltrate, 0.035) * (place.epithelium + place.lumen < 0.1)
    loose = np.where(place.infiltrate > 0.25, Source.IMMUNE_INFILTRATE, Source.IMMUNE_STROMA)
    source = np.where(place.nest > 0.5, Source.IMMUNE_EPITHELIUM, loose)
    chance = np.where(place.nest > 0.5, 0.03, swarm)
    return long_um, long_um * (0.86 + 0.12 * u[1]), 1.6 + 0.5 * u[2], source, chance


def _range(low_um: float, high_um: float, first: int, count: int, pitch_um: float) -> slice:
    start = int(np.clip(np.floor(low_um / pitch_um) - first, 0, count))
    return slice(start, int(np.clip(np.ceil(high_um / pitch_um) - first, start, count)))
