"""What is large in a Space Ranger folder, read in pieces: counts, places of bins, outlines of cells, and the image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from PIL import Image
from tifffile import TiffFile, TiffFileError, TiffPageSeries, memmap

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError

if TYPE_CHECKING:
    import dask.array as da

_PIECE_ENTRIES, _PIECE_ROWS = 2**21, 2**17
_COLUMNS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")  # behind ``barcode``
_BLOCK_CHARACTERS = 2**20
_LARGE_PIECE_BYTES = 2**28
_RGB = 3
_MISMATCH = "{} not in {}: the two files are of different bin sizes or of different runs. Restore both from one run."


@dataclass(frozen=True)
class CountMatrix:
    """An open 10x HDF5 file: its ``matrix``, features by barcodes by columns, so that barcodes are rows."""

    path: Path
    group: h5py.Group
    indptr: NDArray[np.int64]  # (rows + 1,)

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    @property
    def n_entries(self) -> int:
        return int(self.indptr[-1])

    @property
    def n_genes(self) -> int:
        return int(self.group["shape"][0])

    def barcodes(self, start: int, stop: int) -> pa.Array:
        """Names of rows, as text."""
        return pa.array(self.group["barcodes"][start:stop], pa.binary()).cast(pa.string())

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about `_PIECE_ENTRIES` and at most `_PIECE_ROWS`."""
        start = 0
        while start < self.n_rows:
            stop = int(np.searchsorted(self.indptr, self.indptr[start] + _PIECE_ENTRIES, side="right")) - 1
            stop = min(max(stop, start + 1), start + _PIECE_ROWS, self.n_rows)
            yield start, stop
            start = stop

    def entries(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Counts and genes of the rows ``start`` … ``stop − 1``."""
        span = slice(int(self.indptr[start]), int(self.indptr[stop]))
        return self.group["data"][span], self.group["indices"][span]


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of the folder for reading; DataError when it is of another kind."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be opened as HDF5 ({error}). Restore the file.") from error
    with file:
        yield file


@contextmanager
def open_matrix(path: Path) -> Iterator[CountMatrix]:
    """Open a count matrix; DataError when the file is none, is truncated or holds no row."""
    with open_h5(path) as file:
        group = file.get("matrix")
        if group is None or not {"barcodes", "data", "features", "indices", "indptr", "shape"} <= set(group):
            raise DataError(f"{path} is no count matrix of Space Ranger. Restore the file.")
        matrix = CountMatrix(path, group, group["indptr"][:].astype(np.int64))
        sizes = {len(group["data"]), len(group["indices"]), matrix.n_entries}
        if len(sizes) > 1 or not len(group["barcodes"]) == matrix.n_rows == group["shape"][1]:
            raise DataError(f"The parts of {path} do not fit one another: the file is damaged. Restore it.")
        if matrix.n_rows == 0:
            raise DataError(f"{path} holds no row: nothing lies on tissue. Leave out its bin size (`bin_um=`).")
        yield matrix


@dataclass(frozen=True)
class PlacedBins:
    """Consecutive rows of a matrix: names (m,), and each of `_COLUMNS` → (m,) numbers."""

    barcodes: pa.Array
    columns: dict[str, NDArray[Any]]

    @property
    def centres_px(self) -> NDArray[np.float64]:
        """(m, 2) x, y in pixels of the full image."""
        return np.stack([self.columns[name] for name in reversed(_COLUMNS[-2:])], axis=1).astype(np.float64)


def open_positions(path: Path) -> pq.ParquetFile:
    """Open the places of all bins; DataError when the file is of another kind."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be opened as parquet ({error}). Restore the file.") from error
    if file.schema_arrow.names[: len(_COLUMNS) + 1] != ["barcode", *_COLUMNS]:
        raise DataError(
            f"{path} has the columns {', '.join(file.schema_arrow.names)} instead of barcode, {', '.join(_COLUMNS)}. "
            "Restore the file."
        )
    return file


def check_places(matrix: CountMatrix, positions: Path) -> None:
    """Raise DataError unless the first row of a matrix has a place: so swapped files are found before any work."""
    first = matrix.barcodes(0, 1)
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=_PIECE_ROWS, columns=["barcode"]):
            if pc.is_in(first, value_set=batch["barcode"])[0].as_py():
                return
    raise DataError(_MISMATCH.format(f"The first barcode of {matrix.path}, {first[0]}, is", positions))


def placed_bins(matrix: CountMatrix, positions: Path) -> Iterator[PlacedBins]:
    """The rows of a matrix with their places, in its order; DataError when a barcode has no place, or two."""
    # Space Ranger writes both files in the order of the lattice: one pass is enough, hashes join what differs
    at = 0
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=_PIECE_ROWS):
            expected = matrix.barcodes(at, at + len(batch))
            index = pc.index_in(batch["barcode"], value_set=expected)
            rows = pc.drop_null(index).to_numpy(zero_copy_only=False)
            if not np.array_equal(rows, np.arange(len(rows))):
                break
            if len(rows):
                yield PlacedBins(expected.slice(0, len(rows)), _numbers(batch.filter(index.is_valid())))
                at += len(rows)
    if at < matrix.n_rows:
        message = "The rows of %s are not in the order of %s: joining the last %d by hash, which takes 60 bytes each."
        logger.info(message, matrix.path.name, positions.name, matrix.n_rows - at)
        yield from _placed_by_hash(matrix, positions, at)


def _numbers(batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
    return {name: batch[name].to_numpy(zero_copy_only=False) for name in _COLUMNS}


def _placed_by_hash(matrix: CountMatrix, positions: Path, first: int) -> Iterator[PlacedBins]:
    """As `placed_bins`, for the rows from ``first`` on, whatever their order."""
    pieces = [(start, min(start + _PIECE_ROWS, matrix.n_rows)) for start in range(first, matrix.n_rows, _PIECE_ROWS)]
    unsorted = np.concatenate([_hashes(matrix.barcodes(*piece)) for piece in pieces])
    order = np.argsort(unsorted)
    hashes = unsorted[order]
    n_places = np.zeros(len(hashes), np.uint8)
    columns: dict[str, NDArray[Any]] = {}
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=_PIECE_ROWS):
            wanted = _hashes(batch["barcode"])
            slot = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            hit = hashes[slot] == wanted
            rows = order[slot[hit]]
            np.add.at(n_places, rows, 1)
            for name, values in _numbers(batch).items():
                columns.setdefault(name, np.zeros(len(hashes), values.dtype))[rows] = values[hit]
    if (n_places > 1).any() or (hashes[1:] == hashes[:-1]).any():
        raise DataError(
            f"Barcodes come more than once in {matrix.path} or {positions}: a file is damaged. Restore both."
        )
    if (n_places == 0).any():
        raise DataError(_MISMATCH.format(f"{int((n_places == 0).sum())} barcodes of {matrix.path} are", positions))
    for start, stop in pieces:
        of_piece = {name: values[start - first : stop - first] for name, values in columns.items()}
        yield PlacedBins(matrix.barcodes(start, stop), of_piece)


def _hashes(barcodes: pa.Array) -> NDArray[np.uint64]:
    return np.asarray(pd.util.hash_array(barcodes.to_numpy(zero_copy_only=False), categorize=False))


def read_outlines(path: Path) -> dict[str, shapely.Polygon]:
    """Cell barcode → outer ring in pixels of the full image; DataError when the file is no collection of such."""
    try:
        rings = ((f["properties"]["cell_id"], f["geometry"]["coordinates"][0]) for f in _features(path))
        return {f"cellid_{number:09d}-1": shapely.Polygon(np.array(ring)) for number, ring in rings}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a GeoJSON collection of polygons with cell_id ({type(error).__name__}: {error}). Restore "
            "the file, or move segmented_outputs away to convert without cells."
        ) from error


def _features(path: Path) -> Iterator[dict[str, Any]]:
    """Features of a GeoJSON file one at a time: the parsed file would take ten times its size."""
    decoder, opening, between = json.JSONDecoder(), re.compile(r'"features"[^\[]*\['), re.compile(r"[,\s]*")
    with path.open(encoding="utf-8") as file:
        text = ""
        while not (found := opening.search(text)):
            block = file.read(_BLOCK_CHARACTERS)
            if not block:
                raise ValueError("no list of features")
            text += block
        at = found.end()
        while True:
            at = between.match(text, at).end()  # type: ignore[union-attr]  # also of nothing
            if text.startswith("]", at):
                return
            try:
                feature, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                block = file.read(max(_BLOCK_CHARACTERS, len(text) - at))
                if not block:
                    raise
                text, at = text[at:] + block, 0
            else:
                yield feature


@contextmanager
def open_image(path: Path, chunk_px: int) -> Iterator[da.Array]:
    """Open an RGB image, TIFF or what Pillow reads, (3, height, width) in chunks, valid as long as the context."""
    try:
        tiff = TiffFile(path)
    except TiffFileError:
        yield _chunked(_whole(path), channels_last=True, chunk_px=chunk_px)
        return
    with tiff:
        series = tiff.series[0]
        channels_last = series.axes[-1] in "SC"
        _check_rgb(path, series.shape, channels_last=channels_last)
        yield _chunked(_rows(path, series), channels_last=channels_last, chunk_px=chunk_px)


def _check_rgb(path: Path, shape: tuple[int, ...], *, channels_last: bool) -> None:
    if len(shape) != _RGB or shape[-1 if channels_last else 0] != _RGB:
        raise DataError(
            f"The image {path} has the shape {shape}, which is not RGB. Save it with three channels and give it with "
            "`image=`."
        )


def _chunked(pixels: Any, *, channels_last: bool, chunk_px: int) -> da.Array:
    """Chunk pixels; bands are read one at a time and then cut: a strip of a TIFF file spans the whole width."""
    import dask.array as da

    band = (chunk_px, -1, -1) if channels_last else (-1, chunk_px, -1)
    array = da.from_array(pixels, chunks=band, name=False, lock=True)
    array = array.transpose(2, 0, 1) if channels_last else array
    return array.astype(array.dtype.newbyteorder("=")).rechunk((_RGB, *np.minimum(chunk_px, array.shape[1:]).tolist()))


def _rows(path: Path, series: TiffPageSeries) -> Any:
    """Array of the finest level, of which rows can be read."""
    import zarr

    pixels: Any = zarr.open_array(series.aszarr(level=0), mode="r")
    piece = int(np.prod(pixels.chunks)) * pixels.dtype.itemsize
    if piece > _LARGE_PIECE_BYTES:
        if series.dataoffset is not None:
            return _RawPixels(path)
        _warn_of_size(path, "is compressed in pieces", piece)
    return pixels


class _RawPixels:
    """An uncompressed image in one piece, mapped anew for each part of it: what was read is not held any longer."""

    ndim = 3

    def __init__(self, path: Path) -> None:
        pixels = memmap(path, mode="r")
        self._path, self.shape, self.dtype = path, pixels.shape, pixels.dtype

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        return np.array(memmap(self._path, mode="r")[key])


def _whole(path: Path) -> NDArray[Any]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The image {path} cannot be read ({error}). Save it as a tiled TIFF and give it with `image=`."
        ) from error
    _check_rgb(path, pixels.shape, channels_last=True)
    _warn_of_size(path, "can only be read as a whole", pixels.nbytes)
    return pixels


def _warn_of_size(path: Path, what: str, n_bytes: int) -> None:
    from pixnet_sd.store import size_text  # only here: it loads spatialdata

    warn(f"The image {path} {what}, which takes {size_text(n_bytes)} of memory. Save it as a tiled TIFF to avoid that.")
