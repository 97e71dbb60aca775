"""Expression of a drawn tissue: what each source makes of each gene, and the density of every source.

Integrals of densities over turned squares, disks, and the pixels of a grid.

Density of every source over a whole slide, in windows that are always the same, whoever asks.

How many transcripts a place catches, and of which genes: library sizes and Poisson draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.special import ndtri

from ._noise import FloatArray, Grid, hash_unit, in_order
from ._tissue import Nuclei, Source, Tissue

__all__ = [
    "DENSITY_PITCH_UM",
    "DENSITY_WINDOW",
    "DIFFUSION_UM",
    "LIBRARY_FIELD_SIGMA",
    "LIBRARY_FIELD_UM",
    "LIBRARY_PLACE_SIGMA",
    "Panel",
    "density_shape",
    "draw_counts",
    "fill_density",
    "gene_panel",
    "integrate_disks",
    "integrate_on_grid",
    "integrate_squares",
    "library_size",
    "read_box",
    "sources",
]

DENSITY_PITCH_UM = 1.0

# transcripts per nucleus for what nuclei make, per µm² for areas
_BUDGET = {
    Source.EPITHELIAL: 48.0,
    Source.TUMOUR_CORE: 76.0,
    Source.TUMOUR_RIM: 76.0,
    Source.FIBROBLAST: 50.0,
    Source.IMMUNE_INFILTRATE: 28.0,
    Source.IMMUNE_STROMA: 34.0,
    Source.IMMUNE_EPITHELIUM: 34.0,
    Source.MATRIX: 0.34,
    Source.LUMEN: 0.10,
    Source.TISSUE: 0.12,
}
DIFFUSION_UM = 2.0
"""Standard deviation of the distance, along each axis, that a transcript travels before it is caught."""

# standard deviation of transcripts about the middle of the nucleus whose cell makes them; areas have sharp borders
_CELL_UM = {
    Source.EPITHELIAL: 3.0,
    Source.TUMOUR_CORE: 3.9,
    Source.TUMOUR_RIM: 3.9,
    Source.FIBROBLAST: 3.5,
    Source.IMMUNE_INFILTRATE: 2.2,
    Source.IMMUNE_STROMA: 2.7,
    Source.IMMUNE_EPITHELIUM: 2.2,
}
_FILLER_SHARE = 0.2  # of every budget
_AMBIENT = 0.03  # of the panel's mean, everywhere on tissue
_PROFILE_SEED = 230107

_E, _C, _R, _F = Source.EPITHELIAL, Source.TUMOUR_CORE, Source.TUMOUR_RIM, Source.FIBROBLAST
_I, _S, _T = Source.IMMUNE_INFILTRATE, Source.IMMUNE_STROMA, Source.IMMUNE_EPITHELIUM
_M, _L = Source.MATRIX, Source.LUMEN

# relative weights; a gene without any is constant over the tissue
_MARKERS: dict[str, dict[Source, float]] = {
    "EPCAM": {_E: 5, _C: 4, _R: 5},
    "COL1A1": {_M: 9, _F: 6},
    "PTPRC": {_I: 5, _S: 5, _T: 5},
    "ERBB2": {_C: 9, _R: 6, _E: 0.5},
    "ACTB": {},
    "KRT8": {_E: 4, _C: 6, _R: 4},
    "VIM": {_F: 6, _I: 3, _S: 4, _T: 3, _R: 2, _M: 1},
    "MS4A1": {_I: 7},
    "MUC1": {_E: 6, _L: 6, _C: 1},
    "CD3E": {_I: 3, _T: 7, _S: 1},
    "GAPDH": {},
    "MKI67": {_R: 6, _C: 0.5},
    "COL3A1": {_M: 6, _F: 4},
    "CD68": {_S: 9, _T: 1},
    "SCGB2A2": {_E: 6, _L: 8},
    "VEGFA": {_C: 6},
    "EEF1A1": {},
    "KRT19": {_E: 2, _C: 3, _R: 3},
    "CD79A": {_I: 6},
    "CD8A": {_T: 7, _I: 1},
    "DCN": {_M: 3, _F: 6},
    "PIGR": {_E: 5, _L: 2},
    "RPLP0": {},
    "FN1": {_M: 4, _F: 4, _R: 2},
    "CXCL13": {_I: 4, _T: 2},
    "CA9": {_C: 5},
    "KRT5": {_E: 4},
    "GZMB": {_T: 7},
    "TBP": {},
    "ACTA2": {_F: 4, _M: 1},
    "CD74": {_I: 6, _S: 7, _T: 3, _R: 1},
    "LTF": {_E: 3, _L: 4},
    "MMP11": {_R: 4, _F: 1},
    "MT-CO1": {},
}


@dataclass(frozen=True)
class Panel:
    """Genes and what each source makes of them; the same for every seed.

    Rates are transcripts per nucleus, or per µm² for areas.
    """

    names: list[str]
    markers: NDArray[np.float64]  # (sources, all markers), also of those that the panel leaves out
    fillers: NDArray[np.float64]  # (sources, fillers)
    varying: NDArray[np.bool_]  # (genes,)

    @property
    def profile(self) -> NDArray[np.float64]:
        """Rates of the panel's genes, (sources, genes)."""
        return np.concatenate([self.markers, self.fillers], axis=1)[:, : len(self.names)]

    @property
    def var(self) -> dict[str, Any]:
        """Columns that describe the genes, by the names that scanpy gives them."""
        n_genes = len(self.names)
        return {
            "gene_ids": [f"PIXNET{k:06d}" for k in range(n_genes)],
            "feature_types": ["Gene Expression"] * n_genes,
            "genome": ["drawn"] * n_genes,
            "spatially_varying": self.varying,
        }


def gene_panel(n_genes: int) -> Panel:
    """First ``n_genes`` of the markers, then fillers ``GENE001``, ``GENE002``, ...

    The fillers share a fixed budget, so totals stay alike however many there are.
    """
    markers, constant = _marker_profile()
    fillers, filler_constant = _filler_profile(max(n_genes - len(_MARKERS), 0))
    names = list(_MARKERS) + [f"GENE{k + 1:03d}" for k in range(fillers.shape[1])]
    varying = ~np.concatenate([constant, filler_constant])[:n_genes]
    return Panel(names[:n_genes], markers, fillers, varying)


def _budget() -> NDArray[np.float64]:
    return np.array([_BUDGET[source] for source in Source])


def _marker_profile() -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    weight = np.array([[genes.get(source, 0.0) for genes in _MARKERS.values()] for source in Source])
    constant = np.asarray(~weight.any(axis=0), dtype=np.bool_)
    weight[Source.TISSUE] = constant
    profile = weight / weight.sum(axis=1, keepdims=True) * ((1 - _FILLER_SHARE) * _budget())[:, None]
    return _with_ambient(profile, constant), constant


def _filler_profile(count: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    constant = np.arange(count) % 4 == 3
    rngs = [np.random.default_rng([_PROFILE_SEED, k]) for k in range(count)]
    weight = np.array([rng.gamma(0.35, 1, len(Source)) for rng in rngs]).reshape(count, len(Source)).T
    weight[:, constant] = 0
    weight[Source.TISSUE] = constant
    profile = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1) * (_FILLER_SHARE * _budget())[:, None]
    return _with_ambient(profile, constant), constant


def _with_ambient(profile: NDArray[np.float64], constant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Add a little of every varying gene all over the tissue; 100 µm² stand for one nucleus."""
    per_um2 = np.where(np.arange(len(Source))[:, None] < Source.MATRIX, profile / 100, profile)
    profile[Source.TISSUE] += np.where(constant, 0, _AMBIENT * per_um2.mean(axis=0))
    return profile


def sources(tissue: Tissue, grid: Grid) -> FloatArray:
    """Density of every source over a grid of 1 µm, (sources, n_rows, n_cols): nuclei per µm², areas as 0 to 1.

    Each nucleus is spread over its cell as a Gaussian, and then everything diffuses by :data:`DIFFUSION_UM`.
    """
    pad = int(np.ceil(4 * np.hypot(max(_CELL_UM.values()), DIFFUSION_UM) / grid.pitch_um)) + 1
    wide = Grid(grid.row0 - pad, grid.col0 - pad, grid.n_rows + 2 * pad, grid.n_cols + 2 * pad, grid.pitch_um)
    masks = tissue.compartments(wide)
    nuclei = tissue.nuclei(wide.box_um)
    area = {
        Source.MATRIX: masks.stroma * (1 - 0.7 * masks.infiltrate),
        Source.LUMEN: masks.lumen,
        Source.TISSUE: masks.tissue,
    }
    density = np.empty((len(Source), *grid.shape), dtype=np.float32)
    for source in Source:
        raw = area[source] if source in area else _count(nuclei.subset(nuclei.source == source), wide)
        # one Gaussian after another is a Gaussian
        reach_um = np.hypot(_CELL_UM.get(source, 0.0), DIFFUSION_UM)
        blurred = gaussian_filter(raw, reach_um / grid.pitch_um, truncate=4)
        density[source] = blurred[pad:-pad, pad:-pad]
    return density


def _count(nuclei: Nuclei, grid: Grid) -> FloatArray:
    """Nuclei per µm², each shared among the four nearest pixels."""
    found = np.zeros(grid.shape, dtype=np.float32)
    row, col = nuclei.y_um / grid.pitch_um - grid.row0 - 0.5, nuclei.x_um / grid.pitch_um - grid.col0 - 0.5
    for down in (0, 1):
        for right in (0, 1):
            i, j = np.floor(row).astype(np.int64) + down, np.floor(col).astype(np.int64) + right
            weight = (1 - np.abs(row - i)) * (1 - np.abs(col - j)) / grid.pitch_um**2
            inside = (i >= 0) & (i < grid.n_rows) & (j >= 0) & (j < grid.n_cols)
            np.add.at(found, (i[inside], j[inside]), weight[inside].astype(np.float32))
    return found


def integrate_squares(
    density: FloatArray, x_um: NDArray[np.float64], y_um: NDArray[np.float64], side_um: float, angle: float
) -> NDArray[np.float64]:
    """Integral of each source over turned squares, (n, sources).

    Centres count from the upper left corner of ``density``, which has a pitch of 1 µm and is read between its
    samples; each square is covered by a midpoint rule of step 1 µm or less.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = _midpoints(side_um)
    total = np.zeros((len(x_um), len(density)))
    for x, y in zip(u * cos - v * sin, u * sin + v * cos, strict=True):
        total += _read(density, x_um + x, y_um + y)
    return total * (side_um**2 / len(u))


def integrate_disks(
    density: FloatArray, x_um: NDArray[np.float64], y_um: NDArray[np.float64], radius_um: float
) -> NDArray[np.float64]:
    """Integral of each source over disks, (n, sources), by the rule of :func:`integrate_squares`."""
    u, v = _midpoints(2 * radius_um)
    inside = np.hypot(u, v) <= radius_um
    total = np.zeros((len(x_um), len(density)))
    for x, y in zip(u[inside], v[inside], strict=True):
        total += _read(density, x_um + x, y_um + y)
    return total * (np.pi * radius_um**2 / inside.sum())


def _midpoints(side_um: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps = int(np.ceil(side_um / DENSITY_PITCH_UM - 1e-6))
    offset = ((np.arange(steps) + 0.5) / steps - 0.5) * side_um
    u, v = np.meshgrid(offset, offset)
    return u.ravel(), v.ravel()


def _read(density: FloatArray, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> FloatArray:
    where = [y_um / DENSITY_PITCH_UM - 0.5, x_um / DENSITY_PITCH_UM - 0.5]
    return np.stack([map_coordinates(plane, where, order=1, mode="nearest") for plane in density], axis=1)


def integrate_on_grid(density: Any, size_um: float, pitch_um: float, rows: range, cols: range) -> FloatArray:
    """Integral of each source over pixels of a grid in the image's frame, (sources, rows, cols).

    ``density`` is that of the whole slide, an array or a zarr array of which only what is needed is read; ``rows`` and
    ``cols`` choose pixels of the grid of ``pitch_um`` that begins at the slide's upper left corner.
    """
    down, across = (_Intervals.over(density.shape[1], size_um, pitch_um, pixels) for pixels in (rows, cols))
    box = np.asarray(density[:, down.samples, across.samples])
    made = np.empty((len(box), len(rows), len(cols)), dtype=np.float32)
    for source, plane in enumerate(box):
        made[source] = down.operator @ (across.operator @ plane.T.astype(np.float64)).T
    return made


@dataclass(frozen=True)
class _Intervals:
    """Integrals over [i, i + 1) · pitch by the rule of :func:`integrate_squares`, as a sparse matrix."""

    samples: slice
    operator: sp.csr_array  # (pixels, samples)

    @classmethod
    def over(cls, length: int, size_um: float, pitch_um: float, pixels: range) -> _Intervals:
        """Operator for some pixels, and the samples out of ``length`` that they need."""
        steps = int(np.ceil(pitch_um / DENSITY_PITCH_UM - 1e-6))
        pixel, step = (part.ravel() for part in np.meshgrid(np.arange(len(pixels)), np.arange(steps), indexing="ij"))
        point_um = (pixels.start + pixel + (step + 0.5) / steps) * pitch_um
        weight = np.where(point_um < size_um, pitch_um / steps, 0.0)
        position = np.clip(point_um / DENSITY_PITCH_UM - 0.5, 0, length - 1)
        low = np.minimum(np.floor(position).astype(np.int64), max(length - 2, 0))
        high, part = np.minimum(low + 1, length - 1), position - low
        first, last = int(low.min()), int(high.max())
        values = np.concatenate([weight * (1 - part), weight * part])
        where = (np.tile(pixel, 2), np.concatenate([low, high]) - first)
        return cls(slice(first, last + 1), sp.csr_array((values, where), shape=(len(pixels), last + 1 - first)))


DENSITY_WINDOW = 512
"""Side of the windows, in samples of 1 µm."""


def density_shape(size_um: float) -> tuple[int, int, int]:
    """Sources, rows, columns."""
    side = int(np.ceil(size_um / DENSITY_PITCH_UM))
    return len(Source), side, side


def fill_density(tissue: Tissue, out: Any, n_workers: int | None) -> Any:
    """Draw the density into an array or a zarr array of :func:`density_shape`, and return it.

    Values are rounded to 16 bits, which the blur's last bits do not survive: what is drawn again is the same.
    """
    side = out.shape[1]
    grids = list(_windows(side))
    drawn = in_order(lambda grid: sources(tissue, grid).astype(np.float16), grids, n_workers)
    for grid, values in zip(grids, drawn, strict=True):
        out[:, grid.row0 : grid.row0 + grid.n_rows, grid.col0 : grid.col0 + grid.n_cols] = values
    return out


def read_box(density: Any, grid: Grid) -> FloatArray:
    """Part of a density, float32."""
    rows, cols = slice(grid.row0, grid.row0 + grid.n_rows), slice(grid.col0, grid.col0 + grid.n_cols)
    return np.asarray(density[:, rows, cols]).astype(np.float32)


def _windows(side: int) -> Iterator[Grid]:
    for row in range(0, side, DENSITY_WINDOW):
        for col in range(0, side, DENSITY_WINDOW):
            n_rows, n_cols = min(DENSITY_WINDOW, side - row), min(DENSITY_WINDOW, side - col)
            yield Grid(row, col, n_rows, n_cols, DENSITY_PITCH_UM)


LIBRARY_PLACE_SIGMA = 0.5
"""Standard deviation of the logarithm of the share that a place catches, independent from place to place."""

LIBRARY_FIELD_SIGMA = 0.25
"""The same of a smooth field, such as permeabilisation leaves."""

LIBRARY_FIELD_UM = 300.0
"""Period of that field."""

_FIELD_CHANNEL, _PLACE_CHANNEL = 40, 90


def library_size(
    tissue: Tissue,
    row: NDArray[np.int64],
    col: NDArray[np.int64],
    x_um: NDArray[np.float64],
    y_um: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What each place catches of what lies there, relative to the mean, (n,): log-normal with mean 1.

    A field that is smooth over the slide times a number that belongs to the place's row and column.
    """
    field = tissue.noise.at(x_um, y_um, LIBRARY_FIELD_UM, _FIELD_CHANNEL).astype(np.float64)
    place = ndtri(hash_unit(tissue.seed, row, col, _PLACE_CHANNEL))
    sigmas = LIBRARY_FIELD_SIGMA, LIBRARY_PLACE_SIGMA
    return np.exp(sigmas[0] * field + sigmas[1] * place - (sigmas[0] ** 2 + sigmas[1] ** 2) / 2)


def draw_counts(caught: NDArray[np.float64], panel: Panel, stream: Sequence[int]) -> sp.csr_matrix:
    """Poisson counts, (n, genes), float32, at a cost of the number of transcripts.

    Each source gives every place a Poisson number of transcripts, and each of these is of a gene with the
    probability that the source's profile gives: the same as Poisson draws of every gene.

    Parameters
    ----------
    caught
        Integral of every source over each place times its library size, (n, sources).
    panel
        Genes. Markers and fillers have streams of their own, so the number of genes changes no marker.
    stream
        Seed of this draw.
    """
    n_genes, n_markers = len(panel.names), panel.markers.shape[1]
    place, gene = _draw(caught, panel.markers, np.random.default_rng([*stream, 0]))
    filler_place, filler = _draw(caught, panel.fillers, np.random.default_rng([*stream, 1]))
    kept = gene < n_genes
    rows = np.concatenate([place[kept], filler_place])
    columns = np.concatenate([gene[kept], filler + n_markers])
    ones = np.ones(len(rows), dtype=np.float32)
    return sp.csr_matrix((ones, (rows, columns)), shape=(len(caught), n_genes))


def _draw(
    caught: NDArray[np.float64], profile: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place and gene of every transcript."""
    places, genes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for source, rates in enumerate(profile):
        total = rates.sum()
        if total == 0:
            continue
        place = np.repeat(np.arange(len(caught)), rng.poisson(caught[:, source] * total))
        chosen = np.searchsorted(np.cumsum(rates) / total, rng.random(len(place)), side="right")
        places.append(place)
        genes.append(np.minimum(chosen, len(rates) - 1))
    return np.concatenate(places), np.concatenate(genes)
