"""A Space Ranger folder of Visium HD, of any size, as a SpatialData store.

``spatialdata_io.visium_hd`` reads a folder of the same kind with one bin of each size, one cell and a few pixels: so
names, coordinate systems, columns and types are its own. The store of that is then filled with all rows and pixels.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import tifffile
from numpy.typing import NDArray
from PIL import Image
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, get_table_keys
from spatialdata.transformations import get_transformation
from tqdm.dask import TqdmCallback

from pixnet_sd._arguments import checked
from pixnet_sd._util import bar_class, logger
from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.store import (
    DISK_MARGIN,
    RowInfo,
    TableArrays,
    chunks_as_given,
    consolidate,
    hold_lock,
    record,
    size_text,
    work_folder,
    write_shapes,
)

from ._folder import CONVERTED_FROM, BinFiles, CellFiles, HDFolder, find_files
from ._read import (
    CountMatrix,
    check_places,
    open_h5,
    open_image,
    open_matrix,
    open_positions,
    placed_bins,
    read_outlines,
)

_ENTRY_BYTES, _BIN_BYTES = 5, 160  # on disk at most, as compressed
_PREVIEW_TOLERANCE = 0.05  # by which the image may differ from what the previews say it should be
_IMAGE_THREADS = 4  # more would hold more bands at once
_LEVEL_FACTORS = [2, 2, 2, 2]  # the reader's

Progress = Callable[[int], object]  # called with the number of rows that were written


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
    _check_absent(target)
    files = find_files(source, dataset_id, bin_um, image)
    for bins in files.bins:
        with open_matrix(bins.matrix) as matrix:
            check_places(matrix, bins.positions)
    with open_image(files.image, chunk_px) as pixels:
        _check_image(files, pixels.shape)
        n_rows, n_bytes = _announce(files, pixels)
        with _scratch_folder(target, n_bytes) as scratch:
            built = _build_store(files, pixels, scratch, n_rows, show_progress_bar)
            _check_absent(target)
            built.rename(target)
    logger.info("wrote %s", target)


def _check_absent(target: Path) -> None:
    if target.exists():
        raise StoreError(f"{target} exists already. Give another path, or delete it first.")


def _check_image(files: HDFolder, shape: tuple[int, ...]) -> None:
    """Compare the image with the preview that Space Ranger made of it."""
    if "tissue_hires_image.png" not in files.previews:
        return
    with Image.open(files.previews["tissue_hires_image.png"]) as opened:
        preview_shape = np.array(opened.size[::-1])
    scale = files.bins[0].factors["tissue_hires_scalef"]
    if (np.abs(preview_shape / (np.array(shape[1:]) * scale) - 1) > _PREVIEW_TOLERANCE).any():
        height, width = (preview_shape / scale).round().astype(int)
        raise DataError(
            f"The image {files.image} has {shape[1]} × {shape[2]} pixels, but Space Ranger was run on one of "
            f"{height} × {width}. Give that with `image=`."
        )


def _announce(files: HDFolder, pixels: da.Array) -> tuple[int, int]:
    """Log what there is, and return the rows of all tables, and the bytes of the coming store at most."""
    n_bytes, n_rows = int(pixels.nbytes * 4 / 3), {}
    for what, path in files.matrices().items():
        with open_matrix(path) as matrix:
            n_bytes += _ENTRY_BYTES * matrix.n_entries + _BIN_BYTES * matrix.n_rows
            n_rows[what] = matrix.n_rows
    rows = ", ".join(f"{n} {what}" for what, n in n_rows.items())
    message = "converting an image of %d × %d pixels, %s; the store takes up to %s"
    logger.info(message, *pixels.shape[1:], rows, size_text(n_bytes))
    return sum(n_rows.values()), n_bytes


@contextmanager
def _scratch_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Empty folder beside ``target``, for one run at a time, gone at the end; failures become a StoreError."""
    work = work_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if needed_bytes * (1 + DISK_MARGIN) > free:
            raise StoreError(
                f"The store may take up to {size_text(needed_bytes)}, but only {size_text(free)} are free at "
                f"{target.parent}. Free some space, give a path on a larger disk, or leave out bin sizes (`bin_um=`)."
            )
        with hold_lock(work / "convert.lock", wait_s=0, busy=f"Another run is writing {target}."):
            scratch = work / "convert"
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        free = shutil.disk_usage(next(path for path in target.parents if path.exists())).free
        raise StoreError(
            f"Making {target} failed: {error}; {size_text(free)} are free there. Nothing was kept."
        ) from error


def _read_cells(files: CellFiles) -> gpd.GeoDataFrame:
    """Outlines of those cells of the matrix that have one, in its order, in pixels of the full image."""
    outlines = read_outlines(files.outlines)
    with open_matrix(files.matrix) as matrix:
        names = matrix.barcodes(0, matrix.n_rows).to_pylist()
    kept = [name for name in names if name in outlines]
    if not kept:
        raise DataError(
            f"None of the {len(names)} cells of {files.matrix} has an outline in {files.outlines.name}: the two are of "
            "different runs. Restore both, or move segmented_outputs away to convert without cells."
        )
    return gpd.GeoDataFrame({"cell_id": kept, "geometry": [outlines[name] for name in kept]}, index=kept)


def _build_store(files: HDFolder, pixels: da.Array, scratch: Path, n_rows: int, show_progress_bar: bool) -> Path:
    """Make the store, complete with metadata, in an empty folder; ``pixels`` (3, height, width) are chunked."""
    cells = None if files.cells is None else _read_cells(files.cells)
    sdata = _read_miniature(files, scratch / "miniature", cells, pixels.dtype)
    store = scratch / "store.zarr"
    image_key = next(key for key in sdata.images if key.endswith("_full_image"))
    reader_image = sdata.images.pop(image_key)
    if cells is not None:
        (cells_key,) = set(sdata.tables) - {bins.name for bins in files.bins}
        region, _, _ = get_table_keys(sdata.tables[cells_key])
        transformations = get_transformation(sdata.shapes[region], get_all=True)
        sdata.shapes[region] = ShapesModel.parse(cells, transformations=transformations)
    record(sdata, CONVERTED_FROM, None, files.states())
    with chunks_as_given():
        sdata.write(store)
    with bar_class()(total=n_rows, desc="counts", unit="row", disable=not show_progress_bar) as bar:
        for bins in files.bins:
            region, _, _ = get_table_keys(sdata.tables[bins.name])
            _fill_bins(store, bins, region, sdata.shapes[region], bar.update)
        if files.cells is not None and cells is not None:
            _fill_cells(store / "tables" / cells_key, files.cells, cells.index.to_numpy(object), bar.update)
    sdata.images[image_key] = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        scale_factors=_LEVEL_FACTORS,
        chunks=pixels.chunksize,
        c_coords=reader_image["scale0"]["image"].coords["c"].values.tolist(),
        transformations=get_transformation(reader_image, get_all=True),
    )
    # all levels in one pass, with few threads: each holds a band of the image
    with (
        dask.config.set(scheduler="threads", num_workers=min(_IMAGE_THREADS, os.cpu_count() or 1)),
        TqdmCallback(tqdm_class=bar_class(), desc="image", unit="task", disable=not show_progress_bar),
    ):
        sdata.write_element(image_key)
    consolidate(store)
    return store


def _fill_bins(store: Path, files: BinFiles, shapes_key: str, one: gpd.GeoDataFrame, progress: Progress) -> None:
    """Give the table and the shapes of a bin size, which hold ``one`` bin, all of them."""
    with open_matrix(files.matrix) as matrix:
        table = TableArrays(store / "tables" / files.name, matrix.n_rows, matrix.n_genes, matrix.n_entries)
        start = 0
        for placed in placed_bins(matrix, files.positions):
            stop = start + len(placed.barcodes)
            columns = {**placed.columns, "location_id": np.arange(start, stop)}
            table.add_rows(np.asarray(placed.barcodes.to_numpy(zero_copy_only=False)), columns, placed.centres_px)
            start = stop
        _copy_counts(matrix, table, np.ones(matrix.n_rows, bool), progress)

    def describe(start: int, stop: int, _: object) -> RowInfo:
        return RowInfo(np.arange(start, stop), table.centres_px(start, stop))

    radius = files.factors["spot_diameter_fullres"] / 2
    # written beside the store, then put in the place of the one bin's
    beside, file = store.with_name("shapes.zarr"), Path("shapes") / shapes_key / "shapes.parquet"
    write_shapes(beside, shapes_key, describe, start, partial(_squares, one=one, radius=radius))
    (beside / file).replace(store / file)
    shutil.rmtree(beside)


def _fill_cells(folder: Path, files: CellFiles, names: NDArray[Any], progress: Progress) -> None:
    """Give the table in a folder, which holds one cell, all those named (n,)."""
    with open_matrix(files.matrix) as matrix:
        keep = pd.Index(matrix.barcodes(0, matrix.n_rows).to_pylist()).isin(names)
        n_entries = int(np.diff(matrix.indptr)[keep].sum())
        table = TableArrays(folder, len(names), matrix.n_genes, n_entries)
        table.add_rows(names, {"cell_id": names})
        _copy_counts(matrix, table, keep, progress)


def _squares(
    centres_px: NDArray[np.float64], index: NDArray[np.int64], one: gpd.GeoDataFrame, radius: float
) -> gpd.GeoDataFrame:
    """Squares about centres (m, 2), with corners in the order of the reader's ``one`` and without its rounding."""
    corners = np.asarray(one.geometry.iloc[0].exterior.coords)
    ring = np.sign(corners - (corners.min(axis=0) + corners.max(axis=0)) / 2) * radius
    points = (centres_px[:, None] + ring).reshape(-1, 2)
    each = np.arange(len(centres_px) + 1)
    squares = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, (each * len(ring), each))
    frame = gpd.GeoDataFrame(geometry=squares, index=pd.Index(index, name=one.index.name))
    return ShapesModel.parse(frame, transformations=get_transformation(one, get_all=True))


def _copy_counts(matrix: CountMatrix, table: TableArrays, keep: NDArray[np.bool_], progress: Progress) -> None:
    """Append the counts of the rows in ``keep`` (n,), which completes the table."""
    for start, stop in matrix.pieces():
        data, genes = matrix.entries(start, stop)
        sizes, kept = np.diff(matrix.indptr[start : stop + 1]), keep[start:stop]
        if not kept.all():
            entries = np.repeat(kept, sizes)
            data, genes, sizes = data[entries], genes[entries], sizes[kept]
        table.add_counts(data, genes, sizes)
        progress(stop - start)
    table.finish()


def _read_miniature(
    files: HDFolder, target: Path, cells: gpd.GeoDataFrame | None, image_dtype: np.dtype[Any]
) -> SpatialData:
    """Write a folder of one bin of each size and the first cell, and read it; previews are read from it later."""
    try:
        from spatialdata_io import visium_hd
    except ImportError as error:
        raise ImportError("Reading Space Ranger folders needs spatialdata-io: pip install 'pixnet_sd[io]'") from error
    target.mkdir()
    # the feature slice file tells the layout in attributes; the rest of it is large and not read
    with open_h5(files.slice_file) as source, h5py.File(target / files.slice_file.name, "w") as copy:
        copy.attrs.update(dict(source.attrs))
    for bins in files.bins:
        _write_one_bin(bins, target / "binned_outputs" / bins.name)
    if files.cells is not None and cells is not None:
        _write_one_cell(files.cells, target / "segmented_outputs", *cells.iloc[0])
    for name, path in files.previews.items():
        _copy(path, target / "spatial" / name)
    image = target / "image.tif"
    tifffile.imwrite(image, np.zeros((64, 64, 3), image_dtype), photometric="rgb")
    options = {"dataset_id": files.dataset_id, "load_segmentations_only": False, "fullres_image_file": image}
    try:
        with redirect_stdout(io.StringIO()):  # it prints what it finds
            return visium_hd(target, **options)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(
            f"spatialdata_io.visium_hd cannot read a folder like {files.slice_file.parent} "
            f"({type(error).__name__}: {error}). Restore the folder, or update spatialdata-io."
        ) from error


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _write_one_bin(bins: BinFiles, target: Path) -> None:
    _copy(bins.scalefactors, target / "spatial" / bins.scalefactors.name)
    with open_matrix(bins.matrix) as matrix:
        barcode = matrix.barcodes(0, 1)
        _write_one_row(matrix, target / bins.matrix.name, barcode[0].as_py())
    with open_positions(bins.positions) as file:
        row = pa.Table.from_batches([next(file.iter_batches(batch_size=1))])  # `check_places` has found some
    row = row.set_column(0, row.schema.field(0).with_type(barcode.type), barcode)
    pq.write_table(row, target / "spatial" / bins.positions.name)


def _write_one_cell(files: CellFiles, target: Path, barcode: str, outline: shapely.Polygon) -> None:
    with open_matrix(files.matrix) as matrix:
        _write_one_row(matrix, target / files.matrix.name, barcode)
    if files.scalefactors.is_file():
        _copy(files.scalefactors, target / "spatial" / files.scalefactors.name)
    number = int(barcode.removeprefix("cellid_").removesuffix("-1"))
    one = gpd.GeoDataFrame({"cell_id": [number], "geometry": [outline]})
    (target / files.outlines.name).write_text(one.to_json())


def _write_one_row(matrix: CountMatrix, target: Path, barcode: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    group = matrix.group
    with h5py.File(target, "w") as file:
        file.attrs.update(dict(group.file.attrs))
        copy = file.create_group("matrix")
        group.copy("features", copy)
        copy["barcodes"] = np.array([barcode.encode()])
        for name, values in {"data": [1], "indices": [0], "indptr": [0, 1], "shape": [matrix.n_genes, 1]}.items():
            copy[name] = np.array(values, group[name].dtype)
