"""Elements of a drawn slide as ``spatialdata_io.visium_hd`` makes them of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ._cells import CellCounts, find_cells
from ._expression import Panel
from ._lattice import BASE_UM, Bins
from ._preview import Previews, preview_px
from ._slide import Band, DrawnSlide
from ._staining import draw

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

__all__ = ["CELLS", "ElementNames", "bin_elements", "cell_elements", "image_elements"]

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
