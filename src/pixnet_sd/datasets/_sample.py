"""The drawn sample as a SpatialData object, and its truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet_sd._errors import DataError

from ._expression import (
    DENSITY_PITCH_UM,
    Panel,
    draw_counts,
    gene_panel,
    integrate_on_grid,
    integrate_squares,
    sources,
)
from ._lattice import BASE_UM, BINS_UM, Bins, Lattice
from ._noise import FloatArray, Grid
from ._staining import draw
from ._tissue import Tissue

if TYPE_CHECKING:
    from collections.abc import Sequence

    import scipy.sparse as sp
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray

__all__ = ["sample", "sample_truth", "sample_truth_bins"]

_ANGLE = np.deg2rad(0.5)
_HIRES_PX, _LOWRES_PX = 1000, 300
_CHUNK_PX = 512


def sample(
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    bin_um: Sequence[int] = (2, 8, 16),
    n_genes: int = 40,
    dataset_id: str = "sample",
    seed: int = 0,
) -> SpatialData:
    """Draw H&E tissue with expression that follows from what is drawn, shaped as ``spatialdata_io.visium_hd`` does.

    The tissue has fibrous stroma, glands with a lumen, tumour nests, and immune cells, on empty glass. Every
    nucleus and every area expresses by its kind and its surroundings: the same small dark nucleus makes *MS4A1* in
    an infiltrate, *CD68* in stroma, *GZMB* inside a tumour nest, and a tumour nest's outer cells make *MKI67*, its
    inner ones *VEGFA*. Some genes (*ACTB*, *GAPDH*, ...) have a constant density all over the tissue. Counts are
    Poisson draws around the density's integral over each turned 2 µm bin; larger bins are exact sums of them.

    Parameters
    ----------
    size_um
        Side of the square slide in µm, at least 100. Everything is held in memory and each bin is a polygon: up to
        about 3000 (2 million bins of 2 µm) is reasonable, 6500 (a whole capture area) is not.
    mpp
        µm per pixel of the full image.
    bin_um
        Bin sizes in µm, out of 2, 4, 8 and 16.
    n_genes
        Number of genes: 34 named ones, then fillers ``GENE001``, ... whose total does not grow with their number.
    dataset_id
        Prefix of element names.
    seed
        Another seed draws other tissue. Genes, their profiles, and the stains stay the same.

    Returns
    -------
    SpatialData
        ``images``: ``{id}_full_image`` (multiscale, uint8, c y x), ``{id}_hires_image``, ``{id}_lowres_image``.
        ``shapes``: ``{id}_square_002um``, ... squares in pixels of the full image. ``tables``: ``square_002um``, ...
        with raw counts (float32, CSR) of the bins on tissue and ``var["spatially_varying"]``. Coordinate systems:
        ``{id}``, ``{id}_downscaled_hires``, ``{id}_downscaled_lowres``.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    from spatialdata import SpatialData

    slide = _DrawnSlide.checked(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    sizes = _checked_bins(bin_um)
    counts = draw_counts(slide.base_sources, slide.panel, seed)
    shapes, tables = {}, {}
    for size in sizes:
        bins = slide.bins(size)
        region = f"{dataset_id}_square_{size:03d}um"
        shapes[region] = _squares(bins, mpp, _transformations(dataset_id, slide.size_px))
        tables[f"square_{size:03d}um"] = _table(bins, bins.gather(slide.base) @ counts, slide.panel, region, mpp)
    return SpatialData(images=_images(slide, dataset_id), shapes=shapes, tables=tables)


def sample_truth(
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    n_genes: int = 40,
    seed: int = 0,
    pitch_um: float = 2.0,
) -> DataArray:
    """Compute the expected counts of :func:`sample` at every pixel of a grid in the image's frame.

    Pixel (i, j) covers [i, i + 1) × [j, j + 1) times ``pitch_um``, from the full image's upper left corner. Sums of
    pixels are expected counts of the area they cover; divided by ``pitch_um²`` the values are a density per µm². Give
    the arguments that :func:`sample` was given. For the means of its bins see :func:`sample_truth_bins`.

    Parameters
    ----------
    size_um, mpp, n_genes, seed
        As in :func:`sample`.
    pitch_um
        Side of a pixel in µm.

    Returns
    -------
    DataArray
        float32, dims ``c`` (genes), ``y``, ``x`` (pixel centres in µm). ``attrs``: ``units``, ``pitch_um``, and
        ``spatially_varying``, the names of the genes that vary over the tissue.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    from xarray import DataArray

    if not 0 < pitch_um <= size_um:
        raise DataError(f"pitch_um={pitch_um} is outside (0, size_um={size_um}].")
    slide = _DrawnSlide.checked(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    made = integrate_on_grid(slide.density, slide.size_um, pitch_um)
    values = np.tensordot(slide.panel.profile.T.astype(np.float32), made, axes=1)
    centres = (np.arange(values.shape[1]) + 0.5) * pitch_um
    names = np.array(slide.panel.names)
    attrs = {
        "units": "expected counts per pixel",
        "pitch_um": float(pitch_um),
        "spatially_varying": names[slide.panel.varying].tolist(),
    }
    return DataArray(values, dims=("c", "y", "x"), coords={"c": names, "y": centres, "x": centres}, attrs=attrs)


def sample_truth_bins(
    bin_um: int = 8, *, size_um: float = 1000.0, mpp: float = 0.5, n_genes: int = 40, seed: int = 0
) -> pd.DataFrame:
    """Compute the Poisson means of the counts in a table of :func:`sample`.

    Parameters
    ----------
    bin_um
        Bin size of the table in µm.
    size_um, mpp, n_genes, seed
        As in :func:`sample`.

    Returns
    -------
    DataFrame
        Expected counts, bins × genes, in the order and with the names of the table.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    (size,) = _checked_bins((bin_um,))
    slide = _DrawnSlide.checked(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    bins = slide.bins(size)
    means = (bins.gather(slide.base) @ slide.base_sources) @ slide.panel.profile
    return pd.DataFrame(means, index=bins.names, columns=slide.panel.names)


@dataclass(frozen=True)
class _DrawnSlide:
    """One generator behind image, counts and truth."""

    tissue: Tissue
    panel: Panel
    size_px: int
    mpp: float

    @classmethod
    def checked(cls, *, size_um: float, mpp: float, n_genes: int, seed: int) -> _DrawnSlide:
        if size_um < 100:
            raise DataError(f"size_um={size_um} is too small to hold any tissue; give at least 100.")
        if not 0.1 <= mpp <= 2:
            raise DataError(f"mpp={mpp} is outside 0.1 to 2 µm per pixel.")
        if n_genes < 1:
            raise DataError(f"n_genes={n_genes}: give at least 1.")
        if seed < 0:
            raise DataError(f"seed={seed}: give 0 or more.")
        size_px = round(size_um / mpp)
        return cls(Tissue(size_px * mpp, seed), gene_panel(n_genes), size_px, mpp)

    @property
    def size_um(self) -> float:
        return self.tissue.size_um

    @cached_property
    def lattice(self) -> Lattice:
        return Lattice(self.size_um, float(_ANGLE))

    @cached_property
    def grid(self) -> Grid:
        side = int(np.ceil(self.size_um / DENSITY_PITCH_UM))
        return Grid(0, 0, side, side, DENSITY_PITCH_UM)

    @cached_property
    def density(self) -> FloatArray:
        return sources(self.tissue, self.grid)

    @cached_property
    def base_on_tissue(self) -> NDArray[np.bool_]:
        edge = self.tissue.edge_um(self.grid)
        x, y = self.lattice.all_base_um()
        inside = edge[(y / DENSITY_PITCH_UM).astype(np.int64), (x / DENSITY_PITCH_UM).astype(np.int64)] > 0
        return np.asarray(inside)

    @cached_property
    def base(self) -> Bins:
        return self.bins(BASE_UM)

    @cached_property
    def base_sources(self) -> NDArray[np.float64]:
        """Integral of every source over the 2 µm bins, (n, sources)."""
        return integrate_squares(self.density, self.base.x_um, self.base.y_um, BASE_UM, self.lattice.angle)

    def bins(self, bin_um: int) -> Bins:
        return self.lattice.bins(bin_um, self.base_on_tissue)


def _checked_bins(bin_um: Sequence[int]) -> tuple[int, ...]:
    unknown = [size for size in bin_um if size not in BINS_UM]
    if unknown or not len(bin_um):
        raise DataError(f"bin_um={tuple(bin_um)}: give one or more of {BINS_UM}.")
    return tuple(sorted({int(size) for size in bin_um}))


def _preview_px(size_px: int) -> tuple[int, int]:
    return min(_HIRES_PX, size_px), min(_LOWRES_PX, size_px)


def _transformations(dataset_id: str, size_px: int) -> dict[str, Any]:
    from spatialdata.transformations import Identity, Scale

    hires, lowres = (Scale([px / size_px] * 2, axes=("x", "y")) for px in _preview_px(size_px))
    return {
        dataset_id: Identity(),
        f"{dataset_id}_downscaled_hires": hires,
        f"{dataset_id}_downscaled_lowres": lowres,
    }


def _squares(bins: Bins, mpp: float, transformations: dict[str, Any]) -> GeoDataFrame:
    """Squares along the image's axes about turned centres: so the reader makes them, by buffering points."""
    import shapely
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    x, y, half = bins.x_um / mpp, bins.y_um / mpp, bins.bin_um / mpp / 2
    index = pd.Index(np.arange(len(bins)), name="location_id")
    squares = GeoDataFrame(geometry=shapely.box(x - half, y - half, x + half, y + half), index=index)
    return ShapesModel.parse(squares, transformations=transformations)


def _table(bins: Bins, counts: sp.csr_matrix, panel: Panel, region: str, mpp: float) -> AnnData:
    from anndata import AnnData
    from spatialdata.models import TableModel

    obs = pd.DataFrame(
        {
            "in_tissue": np.ones(len(bins), dtype=np.int64),
            "array_row": bins.array_row,
            "array_col": bins.array_col,
            "location_id": np.arange(len(bins)),
            "region": pd.Categorical([region] * len(bins)),
        },
        index=bins.names,
    )
    var = pd.DataFrame(
        {
            "gene_ids": [f"PIXNET{k:06d}" for k in range(len(panel.names))],
            "feature_types": "Gene Expression",
            "genome": "drawn",
            "spatially_varying": panel.varying,
        },
        index=panel.names,
    )
    table = AnnData(counts.astype(np.float32), obs=obs, var=var)
    table.obsm["spatial"] = np.stack([bins.x_um, bins.y_um], axis=1) / mpp
    return TableModel.parse(table, region=region, region_key="region", instance_key="location_id")


def _images(slide: _DrawnSlide, dataset_id: str) -> dict[str, Any]:
    from PIL import Image
    from spatialdata.transformations import Identity

    full = draw(slide.tissue, slide.size_px, slide.mpp)
    scales = [2] * int(np.clip(np.log2(slide.size_px / 64), 1, 4))
    images = {f"{dataset_id}_full_image": _image(full, {dataset_id: Identity()}, scales)}
    to_preview = _transformations(dataset_id, slide.size_px)
    for name, px in zip(("hires", "lowres"), _preview_px(slide.size_px), strict=True):
        small = np.asarray(Image.fromarray(full).resize((px, px), Image.Resampling.BOX))
        system = f"{dataset_id}_downscaled_{name}"
        transformations = {system: Identity(), dataset_id: to_preview[system].inverse()}
        images[f"{dataset_id}_{name}_image"] = _image(small, transformations, None)
    return images


def _image(pixels: NDArray[np.uint8], transformations: dict[str, Any], scale_factors: list[int] | None) -> Any:
    import dask.array as da
    from spatialdata.models import Image2DModel
    from xarray import DataArray

    data = da.from_array(np.ascontiguousarray(pixels.transpose(2, 0, 1)), chunks=(3, _CHUNK_PX, _CHUNK_PX))
    return Image2DModel.parse(
        DataArray(data, dims=("c", "y", "x")),
        c_coords=["r", "g", "b"],
        transformations=transformations,
        scale_factors=scale_factors,
    )
