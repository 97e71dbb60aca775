"""Segmented cells: those of the matrix that have an outline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import geopandas as gpd
import numpy as np
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

from pixnet_sd._errors import DataError

from ._folder import CellFiles
from ._matrix import open_matrix
from ._outlines import read_outlines

if TYPE_CHECKING:
    import shapely
    from numpy.typing import NDArray

__all__ = ["Cells", "read_cells"]


@dataclass(frozen=True)
class Cells:
    """Cells of a folder.

    Attributes
    ----------
    files
        Where they come from.
    keep
        (n,) which rows of the matrix have an outline.
    names
        Barcodes of these.
    outlines
        Polygons of these, in pixels of the full image.
    """

    files: CellFiles
    keep: NDArray[np.bool_]
    names: list[str]
    outlines: list[shapely.Polygon]

    def element(self, like: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
        """Shapes of all cells, as the reader made them of one (``like``)."""
        frame = gpd.GeoDataFrame({"cell_id": self.names, "geometry": self.outlines}, index=self.names)
        return ShapesModel.parse(frame, transformations=get_transformation(like, get_all=True))


def read_cells(files: CellFiles) -> Cells:
    """Read names and outlines; counts stay on disk.

    Raises
    ------
    DataError
        When no cell has an outline, or a file is damaged.
    """
    outlines = read_outlines(files.outlines)
    with open_matrix(files.matrix) as matrix:
        names = matrix.barcodes(0, matrix.n_rows).to_pylist()
    keep = np.array([name in outlines for name in names], dtype=bool)
    if not keep.any():
        raise DataError(
            f"None of the {len(names)} cells of {files.matrix} has an outline in {files.outlines.name}: the two are of "
            "different runs. Restore both, or move segmented_outputs away to convert without cells."
        )
    kept = [name for name in names if name in outlines]
    return Cells(files, keep, kept, [outlines[name] for name in kept])
