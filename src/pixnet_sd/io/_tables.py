"""Tables and squares of a store of one row each, filled with all rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

from pixnet_sd.store._rows import RowInfo
from pixnet_sd.store._shapes_writer import write_shapes

from ._arrays import TableArrays
from ._cells import Cells
from ._folder import BinFiles, read_scalefactors
from ._matrix import CountMatrix, open_matrix
from ._positions import placed_bins

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Progress", "fill_bins", "fill_cells"]

INSTANCE_KEY = "location_id"

Progress = Callable[[int], object]
"""Called with the number of rows that were written."""


def fill_bins(store: Path, files: BinFiles, shapes_key: str, like: gpd.GeoDataFrame, progress: Progress) -> None:
    """Fill the table of a bin size, and its shapes.

    Parameters
    ----------
    store
        Holds both elements with one bin.
    files
        Of the bin size.
    shapes_key
        Name of the shapes.
    like
        The one bin: how the reader draws it.
    progress
        Told of rows.
    """
    with open_matrix(files.matrix) as matrix:
        table = TableArrays(store / "tables" / files.name, matrix.n_rows, matrix.n_genes, matrix.n_entries)
        start = 0
        for placed in placed_bins(matrix, files.positions):
            stop = start + len(placed.barcodes)
            columns = {**placed.columns, INSTANCE_KEY: np.arange(start, stop)}
            table.add_rows(_names(placed.barcodes), columns, placed.centres_px)
            start = stop
        _copy_counts(matrix, table, np.ones(matrix.n_rows, bool), progress)
        table.finish()
        _fill_squares(store, shapes_key, like, table, files, matrix.n_rows)


def fill_cells(table_path: Path, cells: Cells, progress: Progress) -> None:
    """Fill the table of the segmented cells."""
    with open_matrix(cells.files.matrix) as matrix:
        n_entries = int(np.diff(matrix.indptr)[cells.keep].sum())
        table = TableArrays(table_path, len(cells.names), matrix.n_genes, n_entries)
        names = np.array(cells.names, dtype=object)
        table.add_rows(names, {"cell_id": names})
        _copy_counts(matrix, table, cells.keep, progress)
        table.finish()


def _names(barcodes: pa.Array) -> NDArray[Any]:
    return np.asarray(barcodes.to_numpy(zero_copy_only=False))


def _copy_counts(matrix: CountMatrix, table: TableArrays, keep: NDArray[np.bool_], progress: Progress) -> None:
    for start, stop in matrix.pieces():
        data, genes = matrix.entries(start, stop)
        sizes, kept = np.diff(matrix.indptr[start : stop + 1]), keep[start:stop]
        if not kept.all():
            entries = np.repeat(kept, sizes)
            data, genes, sizes = data[entries], genes[entries], sizes[kept]
        table.add_counts(data, genes, sizes)
        progress(stop - start)


def _fill_squares(
    store: Path, name: str, like: gpd.GeoDataFrame, table: TableArrays, files: BinFiles, n_rows: int
) -> None:
    """Write the shapes beside the store, and put their file in the place of the one bin's."""
    ring = _ring(like.geometry.iloc[0], read_scalefactors(files.scalefactors)["spot_diameter_fullres"] / 2)
    transformations = get_transformation(like, get_all=True)

    def make(centres_px: NDArray[np.float64], index: NDArray[np.int64]) -> gpd.GeoDataFrame:
        frame = gpd.GeoDataFrame(geometry=_polygons(centres_px, ring), index=pd.Index(index, name=like.index.name))
        return ShapesModel.parse(frame, transformations=transformations)

    def describe(start: int, stop: int, _: object) -> RowInfo:
        return RowInfo(np.arange(start, stop), table.centres_px(start, stop))

    scratch = store.with_name("shapes.zarr")
    write_shapes(scratch, name, describe, np.ones(n_rows, bool), make)
    inside = Path("shapes") / name / "shapes.parquet"
    (scratch / inside).replace(store / inside)
    shutil.rmtree(scratch)


def _ring(square: shapely.Polygon, radius: float) -> NDArray[np.float64]:
    """(5, 2) corners of a square about its centre, in the reader's order and without its rounding."""
    corners = np.asarray(square.exterior.coords)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    return np.sign(corners - middle) * radius


def _polygons(centres_px: NDArray[np.float64], ring: NDArray[np.float64]) -> NDArray[np.object_]:
    points = (centres_px[:, None] + ring).reshape(-1, 2)
    each = np.arange(len(centres_px) + 1)
    squares = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, (each * len(ring), each))
    return np.asarray(squares)
