"""A folder of the same kind with one bin of each size, one cell and a few pixels, for the reader to read.

What `spatialdata_io.visium_hd` makes of it has the names, coordinate systems, columns and types of the full thing.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pixnet_sd._errors import DataError

from ._folder import BinFiles, CellFiles, HDFolder
from ._matrix import CountMatrix, open_h5, open_matrix
from ._positions import open_positions

if TYPE_CHECKING:
    import shapely
    from spatialdata import SpatialData

__all__ = ["read_miniature"]

_SIDE_PX = 64


def read_miniature(
    files: HDFolder, target: Path, cell: tuple[str, shapely.Polygon] | None, image_dtype: np.dtype[Any]
) -> SpatialData:
    """Write the miniature and read it.

    Parameters
    ----------
    files
        The full folder.
    target
        Folder to make; has to stay until the result is written, which reads previews from it.
    cell
        Barcode and outline of one cell, if there are any.
    image_dtype
        Of the full image.

    Raises
    ------
    DataError
        When the reader refuses it.
    ImportError
        Without spatialdata-io.
    """
    visium_hd = _reader()
    target.mkdir(parents=True)
    _copy_attributes(files.slice_file, target / files.slice_file.name)
    for bins in files.bins:
        _write_bins(bins, target / "binned_outputs" / bins.name)
    if files.cells is not None and cell is not None:
        _write_cell(files.cells, target / "segmented_outputs", *cell)
    for name, path in files.previews.items():
        _copy(path, target / "spatial" / name)
    image = _write_image(target / "image.tif", image_dtype)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds
            return visium_hd(
                target, dataset_id=files.dataset_id, load_segmentations_only=False, fullres_image_file=image
            )
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(
            f"spatialdata_io.visium_hd cannot read a folder like {files.slice_file.parent} "
            f"({type(error).__name__}: {error}). Restore the folder, or update spatialdata-io."
        ) from error


def _reader() -> Any:
    try:
        from spatialdata_io import visium_hd
    except ImportError as error:
        raise ImportError("Reading Space Ranger folders needs spatialdata-io: pip install 'pixnet_sd[io]'") from error
    return visium_hd


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _copy_attributes(path: Path, target: Path) -> None:
    """The feature slice file tells the layout in attributes; the rest of it is large and not read."""
    import h5py

    with open_h5(path) as source, h5py.File(target, "w") as copy:
        copy.attrs.update(dict(source.attrs))


def _write_bins(bins: BinFiles, target: Path) -> None:
    _copy(bins.scalefactors, target / "spatial" / bins.scalefactors.name)
    with open_matrix(bins.matrix) as matrix:
        _write_matrix(matrix, target / bins.matrix.name, matrix.barcodes(0, 1)[0].as_py())
        barcode = matrix.barcodes(0, 1)
    with open_positions(bins.positions) as file:
        first = next(file.iter_batches(batch_size=1), None)
    if first is None:
        raise DataError(f"{bins.positions} has no rows. Restore the file.")
    row = pa.Table.from_batches([first])
    row = row.set_column(0, row.schema.field(0).with_type(barcode.type), barcode)
    pq.write_table(row, target / "spatial" / bins.positions.name)


def _write_matrix(matrix: CountMatrix, target: Path, barcode: str) -> None:
    import h5py

    target.parent.mkdir(parents=True, exist_ok=True)
    group = matrix.group
    with h5py.File(target, "w") as file:
        file.attrs.update(dict(group.file.attrs))
        copy = file.create_group("matrix")
        group.copy("features", copy)
        copy["barcodes"] = np.array([barcode.encode()])
        copy["data"] = np.ones(1, group["data"].dtype)
        copy["indices"] = np.zeros(1, group["indices"].dtype)
        copy["indptr"] = np.array([0, 1], group["indptr"].dtype)
        copy["shape"] = np.array([matrix.n_genes, 1], group["shape"].dtype)


def _write_cell(cells: CellFiles, target: Path, barcode: str, outline: shapely.Polygon) -> None:
    import json

    with open_matrix(cells.matrix) as matrix:
        _write_matrix(matrix, target / cells.matrix.name, barcode)
    if cells.scalefactors.is_file():
        _copy(cells.scalefactors, target / "spatial" / cells.scalefactors.name)
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [np.asarray(outline.exterior.coords).tolist()]},
        "properties": {"cell_id": int(barcode.removeprefix("cellid_").removesuffix("-1"))},
    }
    collection = {"type": "FeatureCollection", "features": [feature]}
    (target / cells.outlines.name).write_text(json.dumps(collection))


def _write_image(path: Path, dtype: np.dtype[Any]) -> Path:
    from tifffile import imwrite

    imwrite(path, np.zeros((_SIDE_PX, _SIDE_PX, 3), dtype), photometric="rgb")
    return path
