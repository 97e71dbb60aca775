"""Expression of a drawn tissue: rates of every gene, densities of every source, their integrals, and Poisson counts.

A source is a kind of nucleus in its surroundings, or an area (`Source`): all genes follow from ten densities, which
are sampled every µm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.special import ndtri

from ._tissue import Floats, Grid, Ints, Mask, Nuclei, Singles, Source, Tissue, hash_unit, in_order, windows

DENSITY_WINDOW = 512  # side of the windows that a density is drawn in, in samples of 1 µm

_DIFFUSION_UM = 2.0  # along each axis before a transcript is caught (standard deviation)
# of the logarithm of the share that is caught: each place's own factor, and a smooth field as permeabilisation leaves
_PLACE_SIGMA, _FIELD_SIGMA, _FIELD_UM = 0.5, 0.25, 300.0
_FIELD_CHANNEL, _PLACE_CHANNEL = 40, 90

# transcripts per nucleus, for areas per µm²; their standard deviation (µm) about the nucleus whose cell makes them
_SOURCES = {
    Source.EPITHELIAL: (48.0, 3.0),
    Source.TUMOUR_CORE: (76.0, 3.9),
    Source.TUMOUR_RIM: (76.0, 3.9),
    Source.FIBROBLAST: (50.0, 3.5),
    Source.IMMUNE_INFILTRATE: (28.0, 2.2),
    Source.IMMUNE_STROMA: (34.0, 2.7),
    Source.IMMUNE_EPITHELIUM: (34.0, 2.2),
    Source.MATRIX: (0.34, 0.0),
    Source.LUMEN: (0.10, 0.0),
    Source.TISSUE: (0.12, 0.0),
}
_FILLER_SHARE = 0.2  # of every source's transcripts
_AMBIENT = 0.03  # of the panel's mean, everywhere on tissue
_PROFILE_SEED = 230107

_LETTERS = dict(zip("ECRFISTML", Source, strict=False))
# genes, each with relative weights of sources by their letters; one without any is constant over the tissue
_TABLE = """
EPCAM E5 C4 R5 | COL1A1 M9 F6 | PTPRC I5 S5 T5 | ERBB2 C9 R6 E0.5 | ACTB | KRT8 E4 C6 R4 |
VIM F6 I3 S4 T3 R2 M1 | MS4A1 I7 | MUC1 E6 L6 C1 | CD3E I3 T7 S1 | GAPDH | MKI67 R6 C0.5 |
COL3A1 M6 F4 | CD68 S9 T1 | SCGB2A2 E6 L8 | VEGFA C6 | EEF1A1 | KRT19 E2 C3 R3 | CD79A I6 |
CD8A T7 I1 | DCN M3 F6 | PIGR E5 L2 | RPLP0 | FN1 M4 F4 R2 | CXCL13 I4 T2 | CA9 C5 | KRT5 E4 |
GZMB T7 | TBP | ACTA2 F4 M1 | CD74 I6 S7 T3 R1 | LTF E3 L4 | MMP11 R4 F1 | MT-CO1
"""
_MARKERS = {
    gene: {_LETTERS[weight[0]]: float(weight[1:]) for weight in weights}
    for gene, *weights in (entry.split() for entry in _TABLE.split("|"))
}


@dataclass(frozen=True)
class Panel:
    """Genes and their rates, in transcripts per nucleus or, of areas, per µm²; the same for every seed."""

    names: list[str]
    markers: Floats  # (sources, all markers), also of those that the panel leaves out
    fillers: Floats  # (sources, fillers)
    varying: Mask  # (genes,)

    @property
    def profile(self) -> Floats:
        """Rates of the panel's genes, (sources, genes)."""
        return np.concatenate([self.markers, self.fillers], axis=1)[:, : len(self.names)]

    @property
    def var(self) -> pd.DataFrame:
        """Columns that describe the genes, by the names that scanpy gives them."""
        ids = [f"PIXNET{k:06d}" for k in range(len(self.names))]
        columns = {"gene_ids": ids, "feature_types": "Gene Expression", "genome": "drawn"}
        return pd.DataFrame({**columns, "spatially_varying": self.varying}, index=self.names)


def gene_panel(n_genes: int) -> Panel:
    """First ``n_genes`` of the markers, then fillers ``GENE001``, ..., which share a budget however many they are."""
    marker_weights = np.array([[genes.get(source, 0.0) for genes in _MARKERS.values()] for source in Source])
    n_fillers = max(n_genes - len(_MARKERS), 0)
    rngs = [np.random.default_rng([_PROFILE_SEED, k]) for k in range(n_fillers)]
    filler_weights = np.array([rng.gamma(0.35, 1, len(Source)) for rng in rngs]).reshape(n_fillers, len(Source)).T
    filler_weights[:, 3::4] = 0
    markers, markers_vary = _rates(marker_weights, 1 - _FILLER_SHARE)
    fillers, fillers_vary = _rates(filler_weights, _FILLER_SHARE)
    names = [*_MARKERS, *(f"GENE{k + 1:03d}" for k in range(n_fillers))]
    return Panel(names[:n_genes], markers, fillers, np.concatenate([markers_vary, fillers_vary])[:n_genes])


def _rates(weights: Floats, share: float) -> tuple[Floats, Mask]:
    """Rates (sources, genes) that share out a part of every source's budget by weight, and which genes vary."""
    varying = np.asarray(weights.any(axis=0), dtype=np.bool_)
    weights[Source.TISSUE] = ~varying  # a gene without any weight is constant over the tissue
    budget = np.array([_SOURCES[source][0] for source in Source])
    rates = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1) * (share * budget)[:, None]
    # a little of every other gene is all over the tissue, too; 100 µm² stand for one nucleus
    per_um2 = np.where(np.arange(len(Source))[:, None] < Source.MATRIX, rates / 100, rates)
    rates[Source.TISSUE] += np.where(varying, _AMBIENT * per_um2.mean(axis=0), 0)
    return rates, varying


def draw_density(tissue: Tissue, grid: Grid) -> Singles:
    """Density of every source over a grid of 1 µm, (sources, n_rows, n_cols): nuclei per µm², areas as 0 to 1."""
    # each nucleus is spread over its cell, then all diffuses: one Gaussian after another is a Gaussian
    sigma = {source: np.hypot(cell_um, _DIFFUSION_UM) for source, (_, cell_um) in _SOURCES.items()}
    pad = int(np.ceil(4 * max(sigma.values()))) + 1
    wide = Grid(grid.row0 - pad, grid.col0 - pad, grid.n_rows + 2 * pad, grid.n_cols + 2 * pad)
    masks, nuclei = tissue.compartments(wide), tissue.nuclei(wide.box_um)
    matrix = masks.stroma * (1 - 0.7 * masks.infiltrate)
    area = {Source.MATRIX: matrix, Source.LUMEN: masks.lumen, Source.TISSUE: masks.tissue}
    density = np.empty((len(Source), *grid.shape), dtype=np.float32)
    for source in Source:
        raw = area[source] if source in area else _count(nuclei.subset(nuclei.source == source), wide)
        density[source] = gaussian_filter(raw, sigma[source], truncate=4)[pad:-pad, pad:-pad]
    return density


def _count(nuclei: Nuclei, grid: Grid) -> Singles:
    """Nuclei per µm², each shared among the four nearest pixels."""
    density = np.zeros(grid.shape, dtype=np.float32)
    row, col = nuclei.y_um - grid.row0 - 0.5, nuclei.x_um - grid.col0 - 0.5
    for down, right in np.ndindex(2, 2):
        i, j = (np.floor(at).astype(np.int64) + step for at, step in ((row, down), (col, right)))
        weight = (1 - np.abs(row - i)) * (1 - np.abs(col - j))
        inside = (i >= 0) & (i < grid.n_rows) & (j >= 0) & (j < grid.n_cols)
        np.add.at(density, (i[inside], j[inside]), weight[inside].astype(np.float32))
    return density


def density_shape(size_um: float) -> tuple[int, int, int]:
    """Shape of a slide's density: sources, rows, columns."""
    side = int(np.ceil(size_um))
    return len(Source), side, side


def fill_density(tissue: Tissue, out: Any, n_workers: int | None) -> Any:
    """Draw the density into an array or a zarr array of :func:`density_shape`, and return it."""
    # rounded to 16 bits, which the last bits of the blur, that the machine decides, do not survive
    grids = list(windows(out.shape[1], DENSITY_WINDOW))
    drawn = in_order(lambda grid: draw_density(tissue, grid).astype(np.float16), grids, n_workers)
    for grid, values in zip(grids, drawn, strict=True):
        out[:, *grid.slices] = values
    return out


def integrate_shapes(
    density: Singles, x_um: Floats, y_um: Floats, side_um: float, *, angle: float = 0.0, disk: bool = False
) -> Floats:
    """Integral of each source over turned squares, or disks of that diameter, (n, sources).

    Centres count from the upper left corner of ``density``, which has a pitch of 1 µm and is read between its samples,
    by a midpoint rule of step 1 µm or less.
    """
    steps = int(np.ceil(side_um - 1e-6))
    offset = ((np.arange(steps) + 0.5) / steps - 0.5) * side_um
    u, v = (axis.ravel() for axis in np.meshgrid(offset, offset))
    area_um2 = side_um**2
    if disk:
        inside = np.hypot(u, v) <= side_um / 2
        u, v, area_um2 = u[inside], v[inside], np.pi * (side_um / 2) ** 2
    cos, sin = np.cos(angle), np.sin(angle)
    total = np.zeros((len(x_um), len(density)))
    for dx, dy in zip(u * cos - v * sin, u * sin + v * cos, strict=True):
        where = [y_um + dy - 0.5, x_um + dx - 0.5]
        total += np.stack([map_coordinates(plane, where, order=1, mode="nearest") for plane in density], axis=1)
    return total * (area_um2 / len(u))


def integrate_on_grid(density: Any, size_um: float, pitch_um: float, rows: range, cols: range) -> Singles:
    """Integral of each source of a density, in memory or on disk, over pixels of a grid, (sources, rows, cols)."""
    (y, down), (x, across) = (_intervals(density.shape[1], size_um, pitch_um, pixels) for pixels in (rows, cols))
    planes = np.asarray(density[:, y, x])
    integrals = np.empty((len(planes), len(rows), len(cols)), dtype=np.float32)
    for source, plane in enumerate(planes):
        integrals[source] = down @ (across @ plane.T.astype(np.float64)).T  # 64 bits for one source at a time
    return integrals


def _intervals(length: int, size_um: float, pitch_um: float, pixels: range) -> tuple[slice, sp.csr_array]:
    """Integrals over [i, i + 1) · pitch by the midpoint rule: samples needed, operator (pixels, samples)."""
    steps = int(np.ceil(pitch_um - 1e-6))
    pixel, step = (index.ravel() for index in np.indices((len(pixels), steps)))
    point_um = (pixels.start + pixel + (step + 0.5) / steps) * pitch_um
    weight = np.where(point_um < size_um, pitch_um / steps, 0.0)
    position = np.clip(point_um - 0.5, 0, length - 1)
    low = np.minimum(np.floor(position).astype(np.int64), max(length - 2, 0))
    high, share = np.minimum(low + 1, length - 1), position - low
    first, last = int(low.min()), int(high.max())
    values = np.concatenate([weight * (1 - share), weight * share])
    where = (np.tile(pixel, 2), np.concatenate([low, high]) - first)
    return slice(first, last + 1), sp.csr_array((values, where), shape=(len(pixels), last + 1 - first))


def library_size(tissue: Tissue, row: Ints, col: Ints, x_um: Floats, y_um: Floats) -> Floats:
    """Share that each place catches of what lies there, relative to the mean, (n,): log-normal with mean 1."""
    # a field that is smooth over the slide times a number that belongs to the place's row and column
    field = tissue.noise.at(x_um, y_um, _FIELD_UM, _FIELD_CHANNEL).astype(np.float64)
    place = ndtri(hash_unit(tissue.seed, row, col, _PLACE_CHANNEL))
    return np.exp(_FIELD_SIGMA * field + _PLACE_SIGMA * place - (_FIELD_SIGMA**2 + _PLACE_SIGMA**2) / 2)


def draw_counts(caught: Floats, panel: Panel, stream: Sequence[int]) -> sp.csr_matrix:
    """Poisson counts (n, genes), float32, of what places catch of each source (n, sources); ``stream`` is the seed.

    Each source gives every place a Poisson number of transcripts, and each of these is of a gene with the probability
    that the source's profile gives: the same as Poisson draws of every gene, at a cost of the number of transcripts.
    """
    n_genes = len(panel.names)
    places, genes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    # markers and fillers have streams of their own, so the number of genes changes no marker
    for number, (profile, first_gene) in enumerate([(panel.markers, 0), (panel.fillers, panel.markers.shape[1])]):
        rng = np.random.default_rng([*stream, number])
        for source, rates in enumerate(profile):
            total = rates.sum()
            if total > 0:
                places.append(np.repeat(np.arange(len(caught)), rng.poisson(caught[:, source] * total)))
                gene = np.searchsorted(np.cumsum(rates) / total, rng.random(len(places[-1])), side="right")
                genes.append(np.minimum(gene, len(rates) - 1) + first_gene)
    place, gene = np.concatenate(places), np.concatenate(genes)
    place, gene = place[gene < n_genes], gene[gene < n_genes]
    return sp.csr_matrix((np.ones(len(place), dtype=np.float32), (place, gene)), shape=(len(caught), n_genes))
