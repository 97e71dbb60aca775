"""Whether memory and disk hold a drawn slide, told with the number before any of it is drawn.

Elements of a drawn slide as ``spatialdata_io.visium_hd`` makes them of a folder.

The dense truth of a drawn slide: expected counts on a grid, in memory or from the store beside its folder.

The drawn sample as a SpatialData object, and its truth.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError

from .drawn import (
    BASE_UM,
    DENSITY_PITCH_UM,
    DENSITY_WINDOW,
    Band,
    Bins,
    CellCounts,
    DrawnSlide,
    Panel,
    Previews,
    Source,
    density_shape,
    draw,
    fill_density,
    find_cells,
    integrate_on_grid,
    preview_px,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray

__all__ = [
    "CELLS",
    "TRUTH",
    "ElementNames",
    "Truth",
    "bin_elements",
    "cell_elements",
    "check_disk",
    "check_memory",
    "density_bytes",
    "image_bytes",
    "image_elements",
    "sample",
    "sample_truth",
    "sample_truth_bins",
    "visium_hd_truth",
    "write_truth",
]


def density_bytes(size_um: float) -> float:
    """Bytes of the density of every source, 16 bits each."""
    return 2 * len(Source) * (size_um / DENSITY_PITCH_UM) ** 2


def image_bytes(size_um: float, mpp: float) -> float:
    """Bytes of an RGB image."""
    return 3 * (size_um / mpp) ** 2


def check_memory(n_bytes: float, **arguments: float) -> None:
    """Refuse what memory does not hold.

    Parameters
    ----------
    n_bytes
        Needed at the least.
    arguments
        Those that decide about it.

    Raises
    ------
    DataError
        Saying how much is needed and how much is free.
    """
    from pixnet_sd.store import available_memory

    _check(n_bytes, available_memory(), "memory", arguments)


def check_disk(n_bytes: float, path: Path, **arguments: float) -> None:
    """Refuse what the disk does not hold; `path` need not be there, others as for `check_memory`."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    _check(n_bytes, shutil.disk_usage(there).free, "disk", arguments)


def _check(needed: float, free: int, what: str, arguments: dict[str, float]) -> None:
    from pixnet_sd.store import size_text

    if needed > free:
        given = ", ".join(f"{name}={value:g}" for name, value in arguments.items())
        raise DataError(
            f"{given}: takes at least {size_text(needed)} of {what}, and {size_text(free)} are free. Draw a smaller or "
            "coarser slide."
        )


CELLS = "cell_segmentations"
"""Name of the table of cells."""

_CHUNK_PX = 512


@dataclass(frozen=True)
class ElementNames:
    """Names and transformations that follow from a dataset's id."""

    dataset_id: str
    slide: DrawnSlide

    @property
    def cells(self) -> str:
        """Shapes of the cells."""
        return f"{self.dataset_id}_{CELLS}"

    def bins(self, bin_um: int) -> str:
        """Shapes of the bins of one size."""
        return f"{self.dataset_id}_square_{bin_um:03d}um"

    def transformations(self) -> dict[str, Any]:
        """From pixels of the full image to every coordinate system."""
        from spatialdata.transformations import Identity, Scale

        scales = {
            f"{self.dataset_id}_downscaled_{name}": Scale([px / self.slide.size_px] * 2, axes=("x", "y"))
            for name, px in preview_px(self.slide.size_px).items()
        }
        return {self.dataset_id: Identity(), **scales}


def bin_elements(
    slide: DrawnSlide, bands: Sequence[Band], sizes: Sequence[int], names: ElementNames
) -> tuple[dict[str, GeoDataFrame], dict[str, AnnData]]:
    """Shapes and tables of the bins of some sizes."""
    on_tissue = np.concatenate([band.on_tissue for band in bands])
    base = slide.lattice.bins_on(BASE_UM, on_tissue)
    counts = sp.vstack([band.counts for band in bands], format="csr")
    shapes, tables = {}, {}
    for size in sizes:
        bins = slide.lattice.bins_on(size, on_tissue)
        region = names.bins(size)
        shapes[region] = _squares(bins, slide.mpp, names)
        tables[f"square_{size:03d}um"] = _bin_table(bins, bins.gather(base) @ counts, slide, region)
    return shapes, tables


def _squares(bins: Bins, mpp: float, names: ElementNames) -> GeoDataFrame:
    """Squares along the image's axes about turned centres: so the reader makes them, by buffering points."""
    import shapely
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    x, y, half = bins.x_um / mpp, bins.y_um / mpp, bins.bin_um / mpp / 2
    index = pd.Index(np.arange(len(bins)), name="location_id")
    squares = GeoDataFrame(geometry=shapely.box(x - half, y - half, x + half, y + half), index=index)
    return ShapesModel.parse(squares, transformations=names.transformations())


def _bin_table(bins: Bins, counts: sp.csr_matrix, slide: DrawnSlide, region: str) -> AnnData:
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
    table = _table(counts, obs, slide.panel)
    table.obsm["spatial"] = np.stack([bins.x_um, bins.y_um], axis=1) / slide.mpp
    return TableModel.parse(table, region=region, region_key="region", instance_key="location_id")


def cell_elements(slide: DrawnSlide, bands: Sequence[Band], names: ElementNames) -> tuple[GeoDataFrame, AnnData]:
    """Shapes and table of the cells."""
    import shapely
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel, TableModel

    cells = find_cells(slide)
    sums = CellCounts(cells, len(slide.panel.names))
    parts = [sums.add(band, cells.of_bins(band.first_row, band.on_tissue)[0]) for band in bands] + [sums.rest()]
    index = [name.decode() for part in parts for name in part.barcodes.tolist()]
    outlines = cells.outlines_px(np.concatenate([part.which for part in parts]), slide.mpp, nucleus=False)
    shapes = GeoDataFrame({"cell_id": index, "geometry": shapely.polygons(outlines)}, index=index)
    obs = pd.DataFrame({"cell_id": index, "region": pd.Categorical([names.cells] * len(index))}, index=index)
    table = _table(sp.vstack([part.counts for part in parts], format="csr"), obs, slide.panel)
    return (
        ShapesModel.parse(shapes, transformations=names.transformations()),
        TableModel.parse(table, region=names.cells, region_key="region", instance_key="cell_id"),
    )


def _table(counts: sp.csr_matrix, obs: pd.DataFrame, panel: Panel) -> AnnData:
    from anndata import AnnData

    return AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(panel.var, index=panel.names))


def image_elements(slide: DrawnSlide, names: ElementNames) -> dict[str, Any]:
    """Full image and previews."""
    from spatialdata.transformations import Identity

    full = np.empty((slide.size_px, slide.size_px, 3), dtype=np.uint8)
    previews = Previews.blank(slide.size_px)
    for grid, pixels in draw(slide.tissue, slide.size_px, slide.mpp):
        full[grid.row0 : grid.row0 + grid.n_rows, grid.col0 : grid.col0 + grid.n_cols] = pixels
        previews.add(grid, pixels)
    dataset_id, to_preview = names.dataset_id, names.transformations()
    scales = [2] * int(np.clip(np.log2(slide.size_px / 64), 1, 4))
    images = {f"{dataset_id}_full_image": _image(full, {dataset_id: Identity()}, scales)}
    for name, small in previews.pixels().items():
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


TRUTH = "truth.zarr"
"""Name of the store in the folder of a slide."""


@checked(DataError)
def visium_hd_truth(
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    pitch_um: float = 2.0,
    window_um: tuple[float, float, float, float] | None = None,
) -> DataArray:
    """Read the expected counts of a slide that :func:`write_visium_hd` wrote; values as of :func:`sample_truth`.

    Only the part of the store that the window needs is read: 20 bytes per µm², and 4 bytes per gene and pixel come
    back, so take a large slide by windows.

    Parameters
    ----------
    path
        The folder.
    genes
        Names of genes, in the order wanted; all if None.
    pitch_um
        Side of a pixel in µm.
    window_um
        Smallest x, smallest y, largest x, largest y from the full image's upper left corner, in µm. All pixels that it
        meets are given; the whole slide if None.

    Returns
    -------
    DataArray
        float32, dims ``c`` (genes), ``y``, ``x`` (pixel centres in µm), and ``attrs`` as of :func:`sample_truth`.

    Raises
    ------
    DataError
        If there is no truth at ``path``, a gene is unknown, or the window does not meet the slide.
    """
    truth = _open(Path(path))
    columns = slice(None) if genes is None else _columns(genes, truth.names)
    rows, cols = truth.pixels(pitch_um, window_um)
    n_genes = len(truth.names[columns])
    check_memory(4.0 * n_genes * len(rows) * len(cols), pitch_um=pitch_um, n_genes=n_genes)
    return truth.expected(pitch_um, rows, cols, columns)


@dataclass(frozen=True)
class Truth:
    """What expected counts are made of."""

    size_um: float
    names: NDArray[np.str_]
    varying: NDArray[np.bool_]
    profile: NDArray[np.float64]  # (sources, genes)
    density: Any  # (sources, rows, cols), an array or a zarr array

    @classmethod
    def of(cls, slide: DrawnSlide) -> Truth:
        """Truth of a slide in memory."""
        panel = slide.panel
        return cls(slide.size_um, np.array(panel.names), panel.varying, panel.profile, slide.density)

    def pixels(self, pitch_um: float, window_um: tuple[float, float, float, float] | None) -> tuple[range, range]:
        """Rows and columns of the pixels that a window meets; DataError if there are none."""
        if pitch_um > self.size_um:
            raise DataError(f"pitch_um={pitch_um:g}: give at most the slide's side, {self.size_um:g} µm.")
        side = int(np.ceil(self.size_um / pitch_um - 1e-6))
        left, top, right, bottom = window_um or (0.0, 0.0, self.size_um, self.size_um)
        rows, cols = (
            range(max(int(np.floor(low / pitch_um + 1e-6)), 0), min(int(np.ceil(high / pitch_um - 1e-6)), side))
            for low, high in ((top, bottom), (left, right))
        )
        if not rows or not cols:
            raise DataError(f"window_um={window_um} does not meet the slide, which is {self.size_um:g} µm a side.")
        return rows, cols

    def expected(
        self, pitch_um: float, rows: range, cols: range, columns: slice | NDArray[np.int64] = slice(None)
    ) -> DataArray:
        """Expected counts of some pixels and genes."""
        from xarray import DataArray

        made = integrate_on_grid(self.density, self.size_um, pitch_um, rows, cols)
        values = np.tensordot(self.profile[:, columns].T.astype(np.float32), made, axes=1)
        names, varying = self.names[columns], self.varying[columns]
        attrs = {
            "units": "expected counts per pixel",
            "pitch_um": float(pitch_um),
            "spatially_varying": names[varying].tolist(),
        }
        y, x = ((np.array(part) + 0.5) * pitch_um for part in (rows, cols))
        return DataArray(values, dims=("c", "y", "x"), coords={"c": names, "y": y, "x": x}, attrs=attrs)


def write_truth(path: Path, slide: DrawnSlide, n_workers: int | None) -> Any:
    """Write the store, window by window; returns the density of every source, a zarr array."""
    group = zarr.create_group(path, zarr_format=3)
    group.attrs.update(
        {
            "size_um": slide.size_um,
            "genes": slide.panel.names,
            "spatially_varying": slide.panel.varying.tolist(),
            "sources": [source.name.lower() for source in Source],
        }
    )
    group.create_array("profile", data=slide.panel.profile)
    density = group.create_array(
        "density",
        shape=density_shape(slide.size_um),
        chunks=(len(Source), DENSITY_WINDOW, DENSITY_WINDOW),
        dtype="float16",
        dimension_names=("source", "y", "x"),
    )
    return fill_density(slide.tissue, density, n_workers)


def _open(path: Path) -> Truth:
    if not (path / TRUTH).is_dir():
        raise DataError(f"No {TRUTH} in {path}. Give a folder that datasets.write_visium_hd wrote.")
    attrs: dict[str, Any] = dict(zarr.open_group(path / TRUTH, mode="r").attrs)
    profile, density = (zarr.open_array(path / TRUTH / name, mode="r") for name in ("profile", "density"))
    varying = np.array(attrs["spatially_varying"], dtype=bool)
    return Truth(attrs["size_um"], np.array(attrs["genes"]), varying, np.asarray(profile[:]), density)


def _columns(genes: Sequence[str], names: NDArray[np.str_]) -> NDArray[np.int64]:
    number = {name: k for k, name in enumerate(names.tolist())}
    unknown = [gene for gene in genes if gene not in number]
    if unknown:
        raise DataError(f"Genes that the slide does not have: {', '.join(unknown[:5])}. It has {len(number)} others.")
    return np.array([number[gene] for gene in genes], dtype=np.int64)


_BIN_BYTES = 100  # of a bin's polygon and counts, at the least
_ON_TISSUE = 0.5  # of the bins, at the least


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
    from spatialdata import SpatialData

    sizes = tuple(sorted(set(bin_um)))
    bins_bytes = sum(_BIN_BYTES * (size_um / um) ** 2 for um in sizes)
    check_memory(density_bytes(size_um) + image_bytes(size_um, mpp) + bins_bytes, size_um=size_um, mpp=mpp)
    slide = DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    names = ElementNames(dataset_id, slide)
    bands = list(slide.bands(slide.density))
    shapes, tables = bin_elements(slide, bands, sizes, names)
    if cells:
        shapes[names.cells], tables[CELLS] = cell_elements(slide, bands, names)
    return SpatialData(images=image_elements(slide, names), shapes=shapes, tables=tables)


@checked(DataError)
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
    values = 4 * n_genes * (size_um / pitch_um) ** 2
    check_memory(density_bytes(size_um) + values, size_um=size_um, pitch_um=pitch_um, n_genes=n_genes)
    truth = Truth.of(DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed))
    return truth.expected(pitch_um, *truth.pixels(pitch_um, None))


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
    check_memory(density_bytes(size_um) + _ON_TISSUE * values, size_um=size_um, n_genes=n_genes)
    slide = DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    expected = slide.expected()
    base, bins = (slide.lattice.bins_on(um, expected.on_tissue) for um in (BASE_UM, bin_um))
    caught = expected.sources * expected.library[:, None] if library_size else expected.sources
    means = (bins.gather(base) @ caught) @ slide.panel.profile
    return pd.DataFrame(means, index=bins.names, columns=slide.panel.names)
