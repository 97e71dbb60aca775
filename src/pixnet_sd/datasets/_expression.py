"""Expression of a drawn tissue: what each source makes of each gene, and the density of every source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from ._noise import FloatArray, Grid
from ._tissue import Nuclei, Source, Tissue

__all__ = [
    "DENSITY_PITCH_UM",
    "DIFFUSION_UM",
    "Panel",
    "gene_panel",
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
