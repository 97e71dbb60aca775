"""Layout of the drawn tissue: compartments and nuclei, in micrometres from the slide's upper left corner.

Haematoxylin and eosin image of a drawn tissue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ._noise import FloatArray, Grid, Noise, hash_unit, in_order, smoothstep

__all__ = [
    "NUCLEUS_REACH_UM",
    "WINDOW_PX",
    "Compartments",
    "Nuclei",
    "NucleusKind",
    "Source",
    "Tissue",
    "draw",
    "draw_window",
]

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
class Compartments:
    """Soft masks in [0, 1], and two depths in µm, over one grid; each (n_rows, n_cols)."""

    edge_um: FloatArray  # rough distance to the tissue's border, positive inside
    tissue: FloatArray
    epithelium: FloatArray
    lumen: FloatArray
    membrane: FloatArray
    nest: FloatArray
    nest_depth_um: FloatArray
    infiltrate: FloatArray

    @property
    def stroma(self) -> FloatArray:
        """Tissue that is neither gland nor tumour."""
        return np.asarray(self.tissue * (1 - np.clip(self.epithelium + self.lumen + self.nest, 0, 1)))

    def at(self, row: NDArray[np.int64], col: NDArray[np.int64]) -> Compartments:
        """Values at chosen pixels, each (n,)."""
        return Compartments(*(getattr(self, field.name)[row, col] for field in fields(self)))


@dataclass(frozen=True)
class Nuclei:
    """Nuclei as ellipses, every field (n,): centre, half axes, angle of the long axis, darkness, and their roles."""

    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    long_um: NDArray[np.float64]
    short_um: NDArray[np.float64]
    angle: NDArray[np.float64]
    shade: NDArray[np.float64]
    kind: NDArray[np.int64]
    source: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.x_um)

    def subset(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Nuclei:
        """Nuclei where ``keep`` holds, or of these numbers."""
        return Nuclei(*(getattr(self, field.name)[keep] for field in fields(self)))


@dataclass(frozen=True)
class _Glands:
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    radius_um: NDArray[np.float64]
    phase: NDArray[np.float64]  # (n, 2): of the two- and threefold bulges
    row: NDArray[np.int64]
    col: NDArray[np.int64]

    def outer_um(self, which: int | NDArray[np.int64], angle: NDArray[np.float64]) -> NDArray[np.float64]:
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

    @cached_property
    def noise(self) -> Noise:
        """Noise table of this seed."""
        return Noise(self.seed)

    def edge_um(self, grid: Grid) -> FloatArray:
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
        edge = self.edge_um(grid)
        tissue = smoothstep(edge, -1, 1)
        epithelium, lumen, membrane = self._gland_masks(grid)
        outside = 1 - np.clip(epithelium + lumen + membrane, 0, 1)
        depth = self._nest_depth_um(grid)
        nest = smoothstep(depth, -1, 1) * outside
        swarm = self.noise.grid(grid, 0.6 * self._zone_um, 4)
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

    def nuclei(self, box_um: tuple[float, float, float, float]) -> Nuclei:
        """Nuclei whose centres lie in a box (smallest x, smallest y, largest x, largest y)."""
        left, top, right, bottom = (int(np.floor(v)) for v in box_um)
        grid = Grid(top - 1, left - 1, bottom - top + 3, right - left + 3, 1.0)
        masks = self.compartments(grid)
        found = [
            self._gland_nuclei(box_um),
            self._lattice_nuclei(box_um, grid, masks, NucleusKind.TUMOUR, 11.5, 10),
            self._lattice_nuclei(box_um, grid, masks, NucleusKind.FIBROBLAST, 13.0, 20),
            self._lattice_nuclei(box_um, grid, masks, NucleusKind.IMMUNE, 7.4, 30),
        ]
        joined = Nuclei(*(np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Nuclei)))
        edge = masks.edge_um[_pixel(grid, joined.x_um, joined.y_um)]
        return joined.subset(edge > joined.long_um + 1)

    def fibre_angle(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> FloatArray:
        """Direction of the stroma's fibres at points, radians from the x axis."""
        slope_x, slope_y = (
            (self._warp_um(x_um + dx, y_um + dy) - self._warp_um(x_um - dx, y_um - dy)) / 4
            for dx, dy in ((2, 0), (0, 2))
        )
        # fibres are level lines of "across" in fibre_frame_um, so they run at right angles to its slope
        cos, sin = np.cos(self._lay), np.sin(self._lay)
        return np.asarray(np.arctan2(sin - slope_x, cos + slope_y), dtype=np.float32)

    def fibre_frame_um(self, grid: Grid) -> tuple[FloatArray, FloatArray]:
        """Coordinates along and across the waving fibres, on a grid."""
        cos, sin = np.cos(self._lay), np.sin(self._lay)
        x, y = grid.x_um[None], grid.y_um[:, None]
        warp = 46 * self.noise.grid(grid, 150, 5) + 5 * self.noise.grid(grid, 38, 6)
        return (x * cos + y * sin).astype(np.float32), (y * cos - x * sin + warp).astype(np.float32)

    @property
    def _lay(self) -> float:
        """Mean direction of the fibres, radians from the x axis."""
        return float(np.pi * np.random.default_rng([self.seed, 2]).uniform(-0.5, 0.5))

    def _warp_um(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> FloatArray:
        """Height by which fibres wave, at points."""
        return np.asarray(46 * self.noise.at(x_um, y_um, 150, 5) + 5 * self.noise.at(x_um, y_um, 38, 6))

    def _nest_depth_um(self, grid: Grid) -> FloatArray:
        zone = self.noise.grid(grid, self._zone_um, 2)
        detail = self.noise.grid(grid, 0.42 * self._zone_um, 3)
        edge = self.noise.grid(grid, 22, 7)
        return np.asarray((zone + 0.5 * detail + 0.06 * edge - 0.5) * 0.3 * self._zone_um, dtype=np.float32)

    def _glands(self, box_um: tuple[float, float, float, float]) -> _Glands:
        row, col, x, y = _sites(self.seed, box_um, _GLAND_PITCH_UM, 50, margin_um=70, jitter=0.26)
        radius = 26 + 18 * hash_unit(self.seed, row, col, 52)
        zone = self.noise.at(x, y, self._zone_um, 2)
        keep = (zone < 0.15) & (hash_unit(self.seed, row, col, 53) < 0.8)
        phase = 2 * np.pi * np.stack([hash_unit(self.seed, row, col, 54), hash_unit(self.seed, row, col, 55)], -1)
        return _Glands(x[keep], y[keep], radius[keep], phase[keep], row[keep], col[keep])

    def _gland_masks(self, grid: Grid) -> tuple[FloatArray, FloatArray, FloatArray]:
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

    def _gland_nuclei(self, box_um: tuple[float, float, float, float]) -> Nuclei:
        """One basal row of nuclei around each gland, and a loose second one."""
        glands = self._glands(box_um)
        slots = np.arange(72)
        count = np.maximum((2 * np.pi * (glands.radius_um - 5) / 6.6).astype(np.int64), 1)
        gland, slot = np.nonzero(slots[None] < count[:, None])
        site = (glands.row[gland] * 7919 + glands.col[gland], slot)
        u = [hash_unit(self.seed, *site, 60 + k) for k in range(6)]
        angle = 2 * np.pi * (slot + 0.5 * (u[0] - 0.5)) / count[gland]
        inset = np.where(u[1] < 0.3, 8.6, 4.9) + 1.0 * (u[2] - 0.5)
        radius = glands.outer_um(gland, angle) - inset
        made = Nuclei(
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
        return made.subset((made.x_um >= left) & (made.x_um < right) & (made.y_um >= top) & (made.y_um < bottom))

    def _lattice_nuclei(
        self,
        box_um: tuple[float, float, float, float],
        grid: Grid,
        masks: Compartments,
        kind: NucleusKind,
        pitch_um: float,
        channel: int,
    ) -> Nuclei:
        """Candidates on a jittered lattice, kept with the probability that their place gives them."""
        row, col, x, y = _sites(self.seed, box_um, pitch_um, channel, margin_um=0, jitter=0.3)
        u = [hash_unit(self.seed, row, col, channel + k) for k in range(2, 8)]
        place = masks.at(*_pixel(grid, x, y))
        long_um, short_um, shade = _form(kind, u)
        angle = np.pi * u[4]
        if kind == NucleusKind.FIBROBLAST:
            angle = self.fibre_angle(x, y) + 0.35 * (u[4] - 0.5)
        made = Nuclei(
            x, y, long_um, short_um, angle, shade, np.full(len(x), kind, dtype=np.int64), _source(kind, place)
        )
        return made.subset(u[5] < _chance(kind, place))


def _sites(
    seed: int,
    box_um: tuple[float, float, float, float],
    pitch_um: float,
    channel: int,
    *,
    margin_um: float,
    jitter: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Sites of a jittered hexagonal lattice in a box: lattice row, lattice column, x, y."""
    left, top, right, bottom = box_um
    height = pitch_um * 0.866
    rows = np.arange(int((top - margin_um) // height) - 1, int((bottom + margin_um) // height) + 3)
    cols = np.arange(int((left - margin_um) // pitch_um) - 2, int((right + margin_um) // pitch_um) + 3)
    row, col = (part.ravel() for part in np.meshgrid(rows, cols, indexing="ij"))
    shift_x, shift_y = (hash_unit(seed, row, col, channel + k) - 0.5 for k in range(2))
    x = (col + 0.5 * (row % 2) + 2 * jitter * shift_x) * pitch_um
    y = (row + 2 * jitter * shift_y) * height
    keep = (x >= left - margin_um) & (x < right + margin_um) & (y >= top - margin_um) & (y < bottom + margin_um)
    return row[keep], col[keep], x[keep], y[keep]


def _form(
    kind: NucleusKind, u: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Half axes (µm) and darkness."""
    if kind == NucleusKind.TUMOUR:
        long_um = 4.4 + 1.6 * u[0]
        return long_um, long_um * (0.72 + 0.22 * u[1]), 0.62 + 0.3 * u[2]
    if kind == NucleusKind.FIBROBLAST:
        return 5.0 + 3.2 * u[0], 1.2 + 0.5 * u[1], 1.1 + 0.4 * u[2]
    long_um = 2.7 + 0.5 * u[0]
    return long_um, long_um * (0.86 + 0.12 * u[1]), 1.6 + 0.5 * u[2]


def _chance(kind: NucleusKind, place: Compartments) -> FloatArray:
    if kind == NucleusKind.TUMOUR:
        return np.asarray(0.96 * (place.nest > 0.5) * smoothstep(place.nest_depth_um, 2, 5))
    if kind == NucleusKind.FIBROBLAST:
        return np.asarray(0.5 * (place.stroma > 0.8) * (place.membrane < 0.2) * (1 - 0.85 * place.infiltrate))
    swarm = np.maximum(0.88 * place.infiltrate, 0.035)
    return np.asarray(np.where(place.nest > 0.5, 0.03, swarm * (place.epithelium + place.lumen < 0.1)))


def _source(kind: NucleusKind, place: Compartments) -> NDArray[np.int64]:
    """Role in expression: it depends on the surroundings, not on the look of the nucleus alone."""
    if kind == NucleusKind.TUMOUR:
        return np.where(place.nest_depth_um < _RIM_UM, Source.TUMOUR_RIM, Source.TUMOUR_CORE)
    if kind == NucleusKind.FIBROBLAST:
        return np.full(len(place.nest), Source.FIBROBLAST)
    loose = np.where(place.infiltrate > 0.25, Source.IMMUNE_INFILTRATE, Source.IMMUNE_STROMA)
    return np.where(place.nest > 0.5, Source.IMMUNE_EPITHELIUM, loose)


def _pixel(
    grid: Grid, x_um: NDArray[np.float64], y_um: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    row = np.floor(y_um / grid.pitch_um).astype(np.int64) - grid.row0
    col = np.floor(x_um / grid.pitch_um).astype(np.int64) - grid.col0
    return row.clip(0, grid.n_rows - 1), col.clip(0, grid.n_cols - 1)


def _range(low_um: float, high_um: float, first: int, count: int, pitch_um: float) -> slice:
    start = int(np.clip(np.floor(low_um / pitch_um) - first, 0, count))
    return slice(start, int(np.clip(np.ceil(high_um / pitch_um) - first, start, count)))


Window = tuple[Grid, NDArray[np.uint8]]
"""Where, and the pixels, (rows, cols, 3)."""

# optical density of one unit of stain in red, green and blue
_HAEMATOXYLIN = np.array([0.60, 0.74, 0.36], dtype=np.float32)
_EOSIN = np.array([0.17, 0.80, 0.50], dtype=np.float32)
_GLASS = np.array([243, 241, 244], dtype=np.float32)
WINDOW_PX = 1024


def draw(tissue: Tissue, size_px: int, mpp: float, n_workers: int | None = None) -> Iterator[Window]:
    """Windows of the image of the whole tissue, row by row of windows."""
    yield from in_order(lambda grid: (grid, draw_window(tissue, grid)), _windows(size_px, mpp), n_workers)


def _windows(size_px: int, mpp: float) -> Iterator[Grid]:
    """Windows of :data:`WINDOW_PX` pixels that cover the image; the last ones are smaller."""
    for row in range(0, size_px, WINDOW_PX):
        for col in range(0, size_px, WINDOW_PX):
            yield Grid(row, col, min(WINDOW_PX, size_px - row), min(WINDOW_PX, size_px - col), mpp)


def draw_window(tissue: Tissue, grid: Grid) -> NDArray[np.uint8]:
    """Image of one window, (n_rows, n_cols, 3); windows drawn apart fit together without a seam."""
    masks = tissue.compartments(grid)
    left, top, right, bottom = grid.box_um
    reach = NUCLEUS_REACH_UM
    nuclei = tissue.nuclei((left - reach, top - reach, right + reach, bottom + reach))
    cover, chromatin = _stamp(nuclei, grid)
    eosin, haze = _ground(tissue, grid, masks)
    noise = tissue.noise
    grain = 1 + 0.2 * noise.grid(grid, 1.3, 10) + 0.1 * noise.grid(grid, 2.8, 11)
    batch = 1 + 0.05 * noise.grid(grid, 400, 12)
    haematoxylin = (haze * (1 - cover) + chromatin * grain) * batch
    eosin = eosin * (1 - 0.45 * cover) * (1 + 0.05 * noise.grid(grid, 330, 13))
    return _develop(haematoxylin, eosin, tissue, grid)


def _develop(haematoxylin: FloatArray, eosin: FloatArray, tissue: Tissue, grid: Grid) -> NDArray[np.uint8]:
    """Beer-Lambert: light that two stains let through, plus camera noise."""
    image = np.empty((*grid.shape, 3), dtype=np.uint8)
    for channel in range(3):
        density = haematoxylin * _HAEMATOXYLIN[channel] + eosin * _EOSIN[channel]
        light = _GLASS[channel] * np.exp(-density) + 1.8 * tissue.noise.white(grid, 20 + channel)
        image[..., channel] = np.clip(np.rint(light), 0, 255)
    return image


def _ground(tissue: Tissue, grid: Grid, masks: Compartments) -> tuple[FloatArray, FloatArray]:
    """Eosin, and diffuse haematoxylin, of everything but the nuclei."""
    noise = tissue.noise
    fibre, gap = _fibres(tissue, grid)
    mottle = noise.grid(grid, 4.5, 14) + 0.6 * noise.grid(grid, 1.7, 9)
    soft = noise.grid(grid, 16, 15)
    stroma = masks.stroma * (1 - masks.infiltrate)
    matrix = np.clip(0.56 + 0.17 * fibre + 0.05 * mottle, 0.08, None) * (1 - 0.82 * gap)
    epithelium = 0.52 + 0.07 * mottle + 0.06 * soft
    nest = (0.50 + 0.08 * mottle + 0.06 * soft) * (1 - 0.5 * smoothstep(-masks.nest_depth_um, -2.5, 0))
    infiltrate = np.clip(0.36 + 0.09 * mottle, 0.05, None)
    lumen = 0.03 + 0.14 * smoothstep(soft, 0.9, 1.8)
    eosin = (
        stroma * matrix
        + masks.epithelium * epithelium
        + masks.nest * nest
        + masks.infiltrate * infiltrate
        + masks.lumen * lumen
        + masks.membrane * 0.18
    )
    haze = 0.03 * stroma + 0.16 * masks.epithelium + 0.2 * masks.nest + 0.12 * masks.infiltrate
    return eosin, haze * (1 + 0.2 * mottle)


def _fibres(tissue: Tissue, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Wavy bundles of collagen, about -2 to 2, and the clefts between them, 0 to 1."""
    along, across = tissue.fibre_frame_um(grid)
    coarse = tissue.noise.warped(along, across, (70, 7.5), 16)
    fine = tissue.noise.warped(along, across, (24, 2.4), 17)
    cleft = tissue.noise.warped(along, across, (46, 5.5), 18)
    return 0.75 * coarse + 0.6 * fine, smoothstep(cleft + 0.25 * fine, 1.25, 1.75)


def _stamp(nuclei: Nuclei, grid: Grid) -> tuple[FloatArray, FloatArray]:
    """Coverage by nuclei, 0 to 1, and their haematoxylin; where two overlap the darker one shows."""
    cover = np.zeros(grid.shape, dtype=np.float32)
    chromatin = np.zeros(grid.shape, dtype=np.float32)
    for kind in NucleusKind:
        chosen = nuclei.subset(nuclei.kind == kind)
        for start in range(0, len(chosen), 1024):
            _stamp_some(chosen.subset(np.arange(len(chosen)) // 1024 == start // 1024), grid, cover, chromatin)
    return cover, chromatin


def _stamp_some(nuclei: Nuclei, grid: Grid, cover: FloatArray, chromatin: FloatArray) -> None:
    """Paint nuclei of one kind, all patches at once."""
    half = int(np.ceil((nuclei.long_um.max() * 1.15 + 1) / grid.pitch_um))
    offset = np.arange(-half, half + 1)
    row = np.floor(nuclei.y_um / grid.pitch_um).astype(np.int64)[:, None] + offset
    col = np.floor(nuclei.x_um / grid.pitch_um).astype(np.int64)[:, None] + offset
    dy = ((row + 0.5) * grid.pitch_um - nuclei.y_um[:, None]).astype(np.float32)[:, :, None]
    dx = ((col + 0.5) * grid.pitch_um - nuclei.x_um[:, None]).astype(np.float32)[:, None, :]
    alpha, stain = _profile(nuclei, dx, dy)
    inside = ((row >= grid.row0) & (row < grid.row0 + grid.n_rows))[:, :, None]
    inside = inside & ((col >= grid.col0) & (col < grid.col0 + grid.n_cols))[:, None, :] & (alpha > 0)
    flat = ((row - grid.row0)[:, :, None] * grid.n_cols + (col - grid.col0)[:, None, :])[inside]
    np.maximum.at(cover.reshape(-1), flat, alpha[inside])
    np.maximum.at(chromatin.reshape(-1), flat, stain[inside])


def _profile(nuclei: Nuclei, dx: FloatArray, dy: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coverage and haematoxylin on each nucleus's patch, (n, rows, cols)."""
    cos, sin = (f(nuclei.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    long_um = nuclei.long_um.astype(np.float32)[:, None, None]
    short_um = nuclei.short_um.astype(np.float32)[:, None, None]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    # a bent, slightly egg-shaped ellipse
    twist = (7 * nuclei.shade).astype(np.float32)[:, None, None]
    across = across + 0.16 * short_um * np.sin(twist + 2.2 * along / long_um)
    rho = np.hypot(along / long_um, across / (short_um * (1 + 0.12 * along / long_um)))
    edge_um = (1 - rho) * short_um
    alpha = smoothstep(edge_um, -0.45, 0.45)
    shade = nuclei.shade.astype(np.float32)[:, None, None]
    if nuclei.kind[0] in (NucleusKind.TUMOUR, NucleusKind.EPITHELIAL):
        # open chromatin: a dark membrane, a pale middle, a nucleolus beside the centre
        rim = np.exp(-(((edge_um - 0.5) / 0.55) ** 2))
        nucleolus = np.exp(-((along - 0.25 * long_um) ** 2 + (across + 0.2 * short_um) ** 2) / 0.7)
        shade = shade * (1 + 0.45 * rim + 0.75 * nucleolus)
    return alpha, alpha * shade
