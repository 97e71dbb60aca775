"""Where a store is made before it gets its name.

Tables and squares of a store of one row each, filled with all rows.

The store of a Space Ranger folder: written with one bin of each size by spatialdata, then filled.

A Space Ranger folder of any size as a SpatialData store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import get_transformation
from tqdm.dask import TqdmCallback

from pixnet_sd._arguments import checked
from pixnet_sd._notes import ATTRS_KEY
from pixnet_sd._util import bar_class, logger
from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.store import (
    DISK_MARGIN,
    RowInfo,
    TableArrays,
    consolidate,
    hold_lock,
    size_text,
    work_folder,
    write_shapes,
)

from ._cells import Cells, read_cells
from ._folder import CONVERTED_FROM, BinFiles, HDFolder, find_files, read_scalefactors
from ._image import open_image
from ._matrix import CountMatrix, check_places, open_matrix, placed_bins, read_miniature

if TYPE_CHECKING:
    import dask.array as da
    import pyarrow as pa
    from spatialdata import SpatialData

__all__ = ["Progress", "build_store", "check_absent", "convert_visium_hd", "fill_bins", "fill_cells", "scratch_folder"]


def check_absent(target: Path) -> None:
    """Raise when there is something at ``target``.

    Raises
    ------
    StoreError
        Saying so.
    """
    if target.exists():
        raise StoreError(f"{target} exists already. Give another path, or delete it first.")


@contextmanager
def scratch_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Empty folder beside ``target``, for one run at a time; gone at the end.

    Parameters
    ----------
    target
        The coming store.
    needed_bytes
        That it takes at most.

    Raises
    ------
    StoreError
        When there is too little disk, another run is at work, or reading or writing fails.
    """
    work = work_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_free(target, needed_bytes)
        with hold_lock(work / "convert.lock", wait_s=0, busy=f"Another run is writing {target}."):
            scratch = work / "convert"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        free = size_text(shutil.disk_usage(next(path for path in target.parents if path.exists())).free)
        raise StoreError(f"Making {target} failed: {error}; {free} are free there. Nothing was kept.") from error


def _check_free(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed_bytes * (1 + DISK_MARGIN) > free:
        raise StoreError(
            f"The store may take up to {size_text(needed_bytes)}, but only {size_text(free)} are free at "
            f"{target.parent}. Free some space, give a path on a larger disk, or leave out bin sizes (`bin_um=`)."
        )


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


ENTRY_BYTES, BIN_BYTES = 5, 160  # on disk at most, as compressed
PREVIEW_TOLERANCE = 0.05
"""Fraction by which the image may differ from what the previews say it should be."""


@checked(DataError)
def convert_visium_hd(
    folder: str | Path,
    store: str | Path,
    *,
    dataset_id: str | None = None,
    bin_um: int | Sequence[int] | None = None,
    image: str | Path | None = None,
    chunk_px: int = 1024,
    show_progress_bar: bool = True,
) -> None:
    """Write a Space Ranger output folder of Visium HD as a SpatialData store, without loading it.

    The store is what ``spatialdata_io.visium_hd(folder).write(store)`` gives: names, coordinate systems, counts,
    squares, cells, pixels and pyramid levels are the same. That call holds the whole slide in memory, which is tens of
    gigabytes for a full one; here memory stays below 1.5 GB, plus about 20 bytes per bin. Only the chunks of the image
    and of the tables differ, which is also what makes the store fast to read in parts.

    Parameters
    ----------
    folder
        Output folder of Space Ranger (``outs``).
    store
        Where the store is made; nothing may be there. It appears under this name when it is complete. Beside it a
        hidden folder ``.{store}.pixnet_sd`` is used meanwhile; one that a killed run has left is cleared by the next.
    dataset_id
        Prefix of element names. Default: that of ``{id}_feature_slice.h5``, or none.
    bin_um
        Bin sizes to convert, in µm. Default: all.
    image
        Full-resolution image. Default: the one in ``microscope_image/``, or ``{id}_tissue_image.*``. Tiled and
        stripped TIFF files are read in parts; others as a whole, with a warning that says what this takes.
    chunk_px
        Side of the image's chunks in pixels, at least 64.
    show_progress_bar
        Whether progress is shown.

    Raises
    ------
    DataError
        If a file is missing or damaged, or files of different runs or bin sizes are mixed.
    StoreError
        If there is something at ``store``, too little disk, or another run writes the same store.
    ImportError
        Without spatialdata-io.
    """
    source, target = Path(folder).expanduser(), Path(store).expanduser().resolve()
    check_absent(target)
    files = find_files(source, dataset_id, bin_um, image)
    for bins in files.bins:
        with open_matrix(bins.matrix) as matrix:
            check_places(matrix, bins.positions)
    with open_image(files.image, chunk_px) as pixels:
        _check_image(files, pixels.shape)
        with scratch_folder(target, _announced_bytes(files, pixels)) as scratch:
            built = build_store(files, pixels, scratch, show_progress_bar)
            check_absent(target)
            built.rename(target)
    logger.info("wrote %s", target)


def _check_image(files: HDFolder, shape: tuple[int, ...]) -> None:
    """Compare the image with the preview that Space Ranger made of it."""
    from PIL import Image

    preview = files.previews.get("tissue_hires_image.png")
    if preview is None:
        return
    with Image.open(preview) as opened:
        found = np.array(opened.size[::-1])
    scale = read_scalefactors(files.bins[0].scalefactors)["tissue_hires_scalef"]
    expected = np.array(shape[1:]) * scale
    if (np.abs(found / expected - 1) > PREVIEW_TOLERANCE).any():
        height, width = (found / scale).round().astype(int)
        raise DataError(
            f"The image {files.image} has {shape[1]} × {shape[2]} pixels, but Space Ranger was run on one of "
            f"{height} × {width}. Give that with `image=`."
        )


def _announced_bytes(files: HDFolder, pixels: da.Array) -> int:
    """Say what there is; bytes of the coming store at most."""
    n_bytes, parts = int(pixels.nbytes * 4 / 3), []
    for what, path in files.matrices().items():
        with open_matrix(path) as matrix:
            n_bytes += ENTRY_BYTES * matrix.n_entries + BIN_BYTES * matrix.n_rows
            parts.append(f"{matrix.n_rows} {what}")
    logger.info(
        "converting an image of %d × %d pixels, %s; the store takes up to %s",
        *pixels.shape[1:],
        ", ".join(parts),
        size_text(n_bytes),
    )
    return n_bytes
