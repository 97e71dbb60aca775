"""The drawn sample as a SpatialData object, and the expected counts of drawn slides.

Names, coordinate systems and types are those that ``spatialdata_io.visium_hd`` gives a folder.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale
from xarray import DataArray

from pixnet_sd import store
from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError

from . import drawn

_CHUNK_PX = 512
_BIN_BYTES = 100  # of a bin's polygon and counts, at the least
_ON_TISSUE = 0.5  # of the bins, at the least


def density_bytes(size_um: float) -> float:
    """Bytes of the density of every source, 16 bits each."""
    return 2.0 * math.prod(drawn.density_shape(size_um))


def check_free(n_bytes: float, disk: Path | None = None, /, **arguments: float) -> None:
    """Refuse what memory, or the disk of a path, does not hold, naming the arguments that decide about it."""
    if disk is None:
        what, free = "memory", store.available_memory()
    else:
        present = next(folder for folder in (disk.absolute(), *disk.absolute().parents) if folder.exists())
        what, free = "disk", shutil.disk_usage(present).free
    if n_bytes > free:
        given = ", ".join(f"{name}={value:g}" for name, value in arguments.items())
        raise DataError(
            f"{given}: takes at least {store.size_text(n_bytes)} of {what}, and {store.size_text(free)} are free. "
            "Draw a smaller or coarser slide."
        )


@checked(DataError)
def sample(
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    bin_um: Sequence[int] = (2, 8, 16),
    n_genes: int = 40,
    dataset_id: str = "sample",
    cells: bool = False,
    seed: int = 0,
) -> SpatialData:
    """Draw H&E tissue with expression that follows from what is drawn, shaped as ``spatialdata_io.visium_hd`` does.

    The tissue has fibrous stroma, glands with a lumen, tumour nests, and immune cells, on empty glass. Every
    nucleus and every area expresses by its kind and its surroundings: the same small dark nucleus makes *MS4A1* in
    an infiltrate, *CD68* in stroma, *GZMB* inside a tumour nest, and a tumour nest's outer cells make *MKI67*, its
    inner ones *VEGFA*. Some genes (*ACTB*, *GAPDH*, ...) have a constant density all over the tissue. Transcripts
    lie about their nucleus and diffuse by 2 µm along each axis (standard deviation) before they are caught. Counts are
    Poisson draws around the density's integral over each turned 2 µm bin times the bin's library size: log-normal with
    mean 1, the product of a smooth field (sigma 0.25, period 300 µm) and of each bin's own factor (sigma 0.5). Larger
    bins are exact sums of the 2 µm ones.

    Parameters
    ----------
    size_um
        Side of the square slide in µm, at least 100. Everything is held in memory and each bin is a polygon: up to
        about 3000 (2 million bins of 2 µm) is reasonable, beyond it see :func:`write_visium_hd`, which writes the same
        slide as a folder.
    mpp
        µm per pixel of the full image.
    bin_um
        Bin sizes in µm, out of 2, 4, 8 and 16.
    n_genes
        Number of genes: 34 named ones, then fillers ``GENE001``, ... whose total does not grow with their number.
    dataset_id
        Prefix of element names.
    cells
        Add segmented cells: nuclei as drawn, grown by 3 µm, with the sums of the 2 µm bins whose centre they cover.
    seed
        Another seed draws other tissue. Genes, their profiles, and the stains stay the same.

    Returns
    -------
    SpatialData
        ``images``: ``{id}_full_image`` (multiscale, uint8, c y x), ``{id}_hires_image``, ``{id}_lowres_image``.
        ``shapes``: ``{id}_square_002um``, ... squares in pixels of the full image. ``tables``: ``square_002um``, ...
        with raw counts (float32, CSR) of the bins on tissue and ``var["spatially_varying"]``. With ``cells``, shapes
        ``{id}_cell_segmentations`` and table ``cell_segmentations``. Coordinate systems: ``{id}``,
        ``{id}_downscaled_hires``, ``{id}_downscaled_lowres``.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    sizes = sorted(set(bin_um))
    bins_bytes = sum(_BIN_BYTES * (size_um / um) ** 2 for um in sizes)
    check_free(density_bytes(size_um) + 3 * (size_um / mpp) ** 2 + bins_bytes, size_um=size_um, mpp=mpp)
    slide = drawn.DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    bands = list(slide.bands(slide.density))
    on_tissue = np.concatenate([band.on_tissue for band in bands])
    counts = sp.vstack([band.counts for band in bands], format="csr")
    systems: dict[str, Any] = {dataset_id: Identity()}  # from pixels of the full image
    for name, px in drawn.preview_px(slide.size_px).items():
        systems[f"{dataset_id}_downscaled_{name}"] = Scale([px / slide.size_px] * 2, axes=("x", "y"))
    elements = {f"square_{um:03d}um": _bin_elements(slide, um, on_tissue, counts) for um in sizes}
    elements |= {"cell_segmentations": _cell_elements(slide, bands)} if cells else {}
    shapes, tables = {}, {}
    for table_key, (frame, table) in elements.items():
        region, instance_key = f"{dataset_id}_{table_key}", table.obs.columns[-1]
        table.obs["region"] = pd.Categorical([region] * table.n_obs)
        annotation = {"region": region, "region_key": "region", "instance_key": instance_key}
        tables[table_key] = TableModel.parse(table, **annotation)
        shapes[region] = ShapesModel.parse(frame, transformations=systems)
    return SpatialData(images=_images(slide, dataset_id, systems), shapes=shapes, tables=tables)


def _bin_elements(
    slide: drawn.DrawnSlide, um: int, on_tissue: NDArray[np.bool_], counts: sp.csr_matrix
) -> tuple[GeoDataFrame, AnnData]:
    """Squares and table of the bins of one size; the last column of its obs names the squares, as of cells."""
    bins = slide.lattice.bins(um, on_tissue)
    number = np.arange(len(bins))
    centres_px = bins[["x_um", "y_um"]].to_numpy() / slide.mpp
    (x, y), half = centres_px.T, um / slide.mpp / 2
    # along the image's axes about turned centres: so the reader makes them, by buffering points
    squares = shapely.box(x - half, y - half, x + half, y + half)
    shapes = GeoDataFrame(geometry=squares, index=pd.Index(number, name="location_id"))
    obs = bins[["array_row", "array_col"]].assign(location_id=number)
    obs.insert(0, "in_tissue", 1)
    sums = slide.lattice.gather(um, on_tissue) @ counts
    return shapes, AnnData(sums, obs=obs, var=slide.panel.var, obsm={"spatial": centres_px})


def _cell_elements(slide: drawn.DrawnSlide, bands: Sequence[drawn.Band]) -> tuple[GeoDataFrame, AnnData]:
    cells = slide.cells()
    sums = drawn.CellCounts(cells, len(slide.panel.names))
    owners = (cells.of_bins(band.first_row, band.on_tissue)[0] for band in bands)
    which, counts = zip(*map(sums.add, bands, owners), strict=True)
    names = drawn.cell_barcodes(np.concatenate(which)).astype(str)
    outlines = shapely.polygons(cells.outlines_px(np.concatenate(which), slide.mpp, nucleus=False))
    shapes = GeoDataFrame({"cell_id": names, "geometry": outlines}, index=names)
    obs = pd.DataFrame({"cell_id": names}, index=names)
    return shapes, AnnData(sp.vstack(counts, format="csr"), obs=obs, var=slide.panel.var)


def _images(slide: drawn.DrawnSlide, dataset_id: str, systems: dict[str, Any]) -> dict[str, Any]:
    """Full image and previews."""
    full = np.empty((slide.size_px, slide.size_px, 3), dtype=np.uint8)
    previews = drawn.Previews(slide.size_px)
    for grid, pixels in drawn.draw(slide.tissue, slide.size_px, slide.mpp):
        full[grid.slices] = pixels
        previews.add(grid, pixels)
    images = {}
    for name, picture in {"full": full, **previews.pixels()}.items():
        own = dataset_id if name == "full" else f"{dataset_id}_downscaled_{name}"
        images[f"{dataset_id}_{name}_image"] = Image2DModel.parse(
            da.from_array(np.ascontiguousarray(picture.transpose(2, 0, 1)), chunks=(3, _CHUNK_PX, _CHUNK_PX)),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={own: Identity(), dataset_id: systems[own].inverse()},
            scale_factors=[2] * int(np.clip(np.log2(slide.size_px / 64), 1, 4)) if name == "full" else None,
        )
    return images


@checked(DataError)
def sample_truth(
    *, size_um: float = 1000.0, mpp: float = 0.5, n_genes: int = 40, seed: int = 0, pitch_um: float = 2.0
) -> DataArray:
    """Compute the expected counts of :func:`sample` at every pixel of a grid in the image's frame.

    Pixel (i, j) covers [i, i + 1) × [j, j + 1) times ``pitch_um``, from the full image's upper left corner. Sums of
    pixels are expected counts of the area they cover; divided by ``pitch_um²`` the values are a density per µm². They
    are what lies in the tissue, diffusion included: library sizes, which belong to bins and have mean 1, take no part.
    Give the arguments that :func:`sample` was given. For the means of its bins see :func:`sample_truth_bins`.

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
    values_bytes = 4 * n_genes * (size_um / pitch_um) ** 2
    check_free(density_bytes(size_um) + values_bytes, size_um=size_um, pitch_um=pitch_um, n_genes=n_genes)
    slide = drawn.DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    varying = slide.panel.var["spatially_varying"]
    return truth_map(slide.density, slide.size_um, varying, slide.panel.profile, pitch_um)


def truth_map(
    density: Any, size_um: float, varying: pd.Series, profile: Any, pitch_um: float, window_um: Any = None
) -> DataArray:
    """Expected counts at the pixels of a window; ``varying`` tells of each gene, by name, ``profile`` its rates."""
    if pitch_um > size_um:
        raise DataError(f"pitch_um={pitch_um:g}: give at most the slide's side, {size_um:g} µm.")
    side = int(np.ceil(size_um / pitch_um - 1e-6))
    left, top, right, bottom = window_um or (0.0, 0.0, size_um, size_um)
    rows, cols = (
        range(max(int(np.floor(low / pitch_um + 1e-6)), 0), min(int(np.ceil(high / pitch_um - 1e-6)), side))
        for low, high in ((top, bottom), (left, right))
    )
    if not rows or not cols:
        raise DataError(f"window_um={window_um} does not meet the slide, which is {size_um:g} µm a side.")
    check_free(4.0 * len(varying) * len(rows) * len(cols), pitch_um=pitch_um, n_genes=len(varying))
    integrals = drawn.integrate_on_grid(density, size_um, pitch_um, rows, cols)
    counts = np.tensordot(profile.T.astype(np.float32), integrals, axes=1)
    names = varying.index[varying].tolist()
    attrs = {"units": "expected counts per pixel", "pitch_um": float(pitch_um), "spatially_varying": names}
    y, x = ((np.array(indices) + 0.5) * pitch_um for indices in (rows, cols))
    coords = {"c": np.array(varying.index, dtype=str), "y": y, "x": x}
    return DataArray(counts, dims=("c", "y", "x"), coords=coords, attrs=attrs)


@checked(DataError)
def sample_truth_bins(
    bin_um: int = 8,
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    n_genes: int = 40,
    seed: int = 0,
    library_size: bool = True,
) -> pd.DataFrame:
    """Compute the Poisson means of the counts in a table of :func:`sample`.

    Parameters
    ----------
    bin_um
        Bin size of the table in µm.
    size_um, mpp, n_genes, seed
        As in :func:`sample`.
    library_size
        Means as the counts have them, with the library size of each 2 µm bin. Without, what lies in the bins: the
        integral of :func:`sample_truth` over them.

    Returns
    -------
    DataFrame
        Expected counts, bins × genes, in the order and with the names of the table.

    Raises
    ------
    DataError
        If an argument is out of range.
    """
    values = 8 * n_genes * (size_um / bin_um) ** 2
    check_free(density_bytes(size_um) + _ON_TISSUE * values, size_um=size_um, n_genes=n_genes)
    slide = drawn.DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    on_tissue, caught = slide.expected(library=library_size)
    means = (slide.lattice.gather(bin_um, on_tissue) @ caught) @ slide.panel.profile
    return pd.DataFrame(means, index=slide.lattice.bins(bin_um, on_tissue).index, columns=slide.panel.names)
