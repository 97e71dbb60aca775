"""The store of a Space Ranger folder: written with one bin of each size by spatialdata, then filled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation
from tqdm.dask import TqdmCallback

from pixnet_sd._progress import bar_class
from pixnet_sd._space_ranger import CONVERTED_FROM
from pixnet_sd.store._commit import consolidate
from pixnet_sd.store._provenance import ATTRS_KEY

from ._cells import Cells, read_cells
from ._folder import HDFolder
from ._matrix import open_matrix
from ._miniature import read_miniature
from ._tables import fill_bins, fill_cells

if TYPE_CHECKING:
    import dask.array as da
    from spatialdata import SpatialData

__all__ = ["build_store"]

IMAGE_THREADS = 4  # more would hold more bands at once
LEVEL_FACTORS = [2, 2, 2, 2]  # the reader's


def build_store(files: HDFolder, pixels: da.Array, scratch: Path, show_progress_bar: bool) -> Path:
    """Make the store in an empty folder.

    Parameters
    ----------
    files
        What is converted.
    pixels
        (3, height, width) the full image in chunks.
    scratch
        The folder.
    show_progress_bar
        Whether progress is shown.

    Returns
    -------
    The store, complete with metadata, in ``scratch``.
    """
    cells = None if files.cells is None else read_cells(files.cells)
    first = None if cells is None else (cells.names[0], cells.outlines[0])
    sdata = read_miniature(files, scratch / "miniature", first, pixels.dtype)
    store = scratch / "store.zarr"
    image_key = next(key for key in sdata.images if key.endswith("_full_image"))
    like = sdata.images.pop(image_key)
    if cells is not None:
        shapes_key = _region(sdata, _cells_key(sdata, files))
        sdata.shapes[shapes_key] = cells.element(sdata.shapes[shapes_key])
    sdata.attrs[ATTRS_KEY] = {CONVERTED_FROM: files.states()}
    sdata.write(store)
    _fill(store, sdata, files, cells, show_progress_bar)
    sdata.images[image_key] = _full_image(pixels, like)
    _write_image(sdata, image_key, show_progress_bar)
    consolidate(store)
    return store


def _fill(store: Path, sdata: SpatialData, files: HDFolder, cells: Cells | None, show_progress_bar: bool) -> None:
    """Give tables and squares all their rows."""
    bar_of = bar_class()
    with bar_of(total=_count_rows(files), desc="counts", unit="row", disable=not show_progress_bar) as bar:
        for bins in files.bins:
            shapes_key = _region(sdata, bins.name)
            fill_bins(store, bins, shapes_key, sdata.shapes[shapes_key], bar.update)
        if cells is not None:
            fill_cells(store / "tables" / _cells_key(sdata, files), cells, bar.update)


def _cells_key(sdata: SpatialData, files: HDFolder) -> str:
    """Name of the table that is of no bins."""
    (key,) = set(sdata.tables) - {bins.name for bins in files.bins}
    return key


def _region(sdata: SpatialData, table_key: str) -> str:
    """Name of the shapes that a table annotates."""
    return str(sdata.tables[table_key].uns["spatialdata_attrs"]["region"])


def _full_image(pixels: da.Array, like: Any) -> Any:
    """The full image, with the transformations of the miniature's, still to be read."""
    return Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        scale_factors=LEVEL_FACTORS,
        chunks=pixels.chunksize,
        c_coords=like["scale0"]["image"].coords["c"].values.tolist(),
        transformations=get_transformation(like, get_all=True),
    )


def _write_image(sdata: SpatialData, key: str, show_progress_bar: bool) -> None:
    """Compute all levels in one pass, with few threads: each holds a band of the image."""
    threads = min(IMAGE_THREADS, os.cpu_count() or 1)
    with (
        dask.config.set(scheduler="threads", num_workers=threads),
        TqdmCallback(tqdm_class=bar_class(), desc="image", unit="task", disable=not show_progress_bar),
    ):
        sdata.write_element(key)


def _count_rows(files: HDFolder) -> int:
    total = 0
    for path in files.matrices().values():
        with open_matrix(path) as matrix:
            total += matrix.n_rows
    return total
