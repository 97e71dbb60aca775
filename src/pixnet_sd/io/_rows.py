"""Rows of a Space Ranger folder, read a few at a time: counts, places of bins, outlines of cells.

And a folder of the same kind with one of each, which `spatialdata_io.visium_hd` makes names, columns and types of.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError

from ._folder import BinFiles, CellFiles, HDFolder

if TYPE_CHECKING:
    import h5py
    from spatialdata import SpatialData

PIECE_ENTRIES = 2**21
PIECE_ROWS = 2**17
COLUMNS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
"""Columns of the places after ``barcode``."""

_BLOCK_CHARACTERS = 2**20
_BETWEEN_FEATURES = tuple(", \t\r\n")
_MINIATURE_PX = 64


@dataclass(frozen=True)
class CountMatrix:
    """An open 10x HDF5 file: its ``matrix``, features by barcodes by columns, so that barcodes are rows."""

    path: Path
    group: h5py.Group
    indptr: NDArray[np.int64]  # (rows + 1,)

    @property
    def n_rows(self) -> int:
        """Bins or cells."""
        return len(self.indptr) - 1

    @property
    def n_entries(self) -> int:
        """Counts that are not zero."""
        return int(self.indptr[-1])

    @property
    def n_genes(self) -> int:
        """Features."""
        return int(self.group["shape"][0])

    def barcodes(self, start: int, stop: int) -> pa.Array:
        """Names of rows, as text."""
        return pa.array(self.group["barcodes"][start:stop], pa.binary()).cast(pa.string())

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about `PIECE_ENTRIES` and at most `PIECE_ROWS`."""
        start = 0
        while start < self.n_rows:
            stop = int(np.searchsorted(self.indptr, self.indptr[start] + PIECE_ENTRIES, side="right")) - 1
            stop = min(max(stop, start + 1), start + PIECE_ROWS, self.n_rows)
            yield start, stop
            start = stop

    def entries(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Counts and genes of the rows ``start`` … ``stop − 1``."""
        span = slice(int(self.indptr[start]), int(self.indptr[stop]))
        return self.group["data"][span], self.group["indices"][span]


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of the folder for reading; DataError when it is of another kind."""
    import h5py

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
    """Consecutive rows of a matrix: names (m,), and each of `COLUMNS` → (m,) numbers."""

    barcodes: pa.Array
    columns: dict[str, NDArray[Any]]

    @property
    def centres_px(self) -> NDArray[np.float64]:
        """(m, 2) x, y in pixels of the full image."""
        x, y = self.columns["pxl_col_in_fullres"], self.columns["pxl_row_in_fullres"]
        return np.stack([x, y], axis=1).astype(np.float64)


def open_positions(path: Path) -> pq.ParquetFile:
    """Open the places of all bins; DataError when the file is of another kind."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be opened as parquet ({error}). Restore the file.") from error
    if file.schema_arrow.names[: len(COLUMNS) + 1] != ["barcode", *COLUMNS]:
        raise DataError(
            f"{path} has the columns {', '.join(file.schema_arrow.names)} instead of barcode, {', '.join(COLUMNS)}. "
            "Restore the file."
        )
    return file


def check_places(matrix: CountMatrix, positions: Path) -> None:
    """Raise DataError unless the first row of a matrix has a place: so swapped files are found before any work."""
    first = matrix.barcodes(0, 1)
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=PIECE_ROWS, columns=["barcode"]):
            if pc.is_in(first, value_set=batch["barcode"])[0].as_py():
                return
    raise _mismatch(f"The first barcode of {matrix.path}, {first[0]}, is", positions)


def placed_bins(matrix: CountMatrix, positions: Path) -> Iterator[PlacedBins]:
    """The rows of a matrix with their places, in its order; DataError when a barcode has no place, or two.

    Space Ranger writes both files in the order of the lattice. Then one pass over both is enough; where the order
    differs, the rest is joined through hashes of the barcodes, which takes more memory.
    """
    at = 0
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=PIECE_ROWS):
            expected = matrix.barcodes(at, at + len(batch))
            index = pc.index_in(batch["barcode"], value_set=expected)
            rows = pc.drop_null(index).to_numpy(zero_copy_only=False)
            if not np.array_equal(rows, np.arange(len(rows))):
                break
            if len(rows):
                yield PlacedBins(expected.slice(0, len(rows)), _numbers(batch.filter(index.is_valid())))
                at += len(rows)
    if at < matrix.n_rows:
        logger.info(
            "The rows of %s are not in the order of %s: joining the last %d by hash, which takes 60 bytes each.",
            matrix.path.name,
            positions.name,
            matrix.n_rows - at,
        )
        yield from _placed_by_hash(matrix, positions, at)


def _numbers(batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
    return {name: batch[name].to_numpy(zero_copy_only=False) for name in COLUMNS}


def _placed_by_hash(matrix: CountMatrix, positions: Path, first: int) -> Iterator[PlacedBins]:
    """As `placed_bins`, for the rows from ``first`` on, whatever their order."""
    pieces = [(start, min(start + PIECE_ROWS, matrix.n_rows)) for start in range(first, matrix.n_rows, PIECE_ROWS)]
    hashes = np.concatenate([_hashes(matrix.barcodes(*piece)) for piece in pieces])
    order = np.argsort(hashes)
    hashes = hashes[order]
    n_places = np.zeros(len(hashes), np.uint8)
    columns: dict[str, NDArray[Any]] = {}
    with open_positions(positions) as file:
        for batch in file.iter_batches(batch_size=PIECE_ROWS):
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
        raise _mismatch(f"{int((n_places == 0).sum())} barcodes of {matrix.path} are", positions)
    for start, stop in pieces:
        of_piece = {name: values[start - first : stop - first] for name, values in columns.items()}
        yield PlacedBins(matrix.barcodes(start, stop), of_piece)


def _hashes(barcodes: pa.Array) -> NDArray[np.uint64]:
    return np.asarray(pd.util.hash_array(barcodes.to_numpy(zero_copy_only=False), categorize=False))


def _mismatch(what: str, positions: Path) -> DataError:
    return DataError(
        f"{what} not in {positions}: the two files are of different bin sizes or of different runs. Restore both from "
        "one run."
    )


def read_outlines(path: Path) -> dict[str, shapely.Polygon]:
    """Cell barcode → outer ring in pixels of the full image; DataError when the file is no collection of such."""
    try:
        return {
            f"cellid_{feature['properties']['cell_id']:09d}-1": shapely.Polygon(
                np.array(feature["geometry"]["coordinates"][0])
            )
            for feature in _features(path)
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a GeoJSON collection of polygons with cell_id ({type(error).__name__}: {error}). Restore "
            "the file, or move segmented_outputs away to convert without cells."
        ) from error


def _features(path: Path) -> Iterator[dict[str, Any]]:
    """Features of a GeoJSON file one at a time: the parsed file would take ten times its size."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, at = "", -1
        while at < 0:  # behind the bracket that opens the list
            block = file.read(_BLOCK_CHARACTERS)
            if not block:
                raise ValueError("no list of features")
            text += block
            key = text.find('"features"')
            at = text.find("[", key) if key >= 0 else -1
        at += 1
        while True:
            while text[at : at + 1] in _BETWEEN_FEATURES:
                at += 1
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


def read_miniature(
    files: HDFolder, target: Path, cell: tuple[str, shapely.Polygon] | None, image_dtype: np.dtype[Any]
) -> SpatialData:
    """Write a folder of one bin of each size and one cell (barcode, outline), and read it as the reader does.

    The folder has to stay until the result is written, which reads previews from it.
    """
    try:
        from spatialdata_io import visium_hd
    except ImportError as error:
        raise ImportError("Reading Space Ranger folders needs spatialdata-io: pip install 'pixnet_sd[io]'") from error
    import h5py
    from tifffile import imwrite

    target.mkdir(parents=True)
    # the feature slice file tells the layout in attributes; the rest of it is large and not read
    with open_h5(files.slice_file) as source, h5py.File(target / files.slice_file.name, "w") as copy:
        copy.attrs.update(dict(source.attrs))
    for bins in files.bins:
        _write_one_bin(bins, target / "binned_outputs" / bins.name)
    if files.cells is not None and cell is not None:
        _write_one_cell(files.cells, target / "segmented_outputs", *cell)
    for name, path in files.previews.items():
        _copy(path, target / "spatial" / name)
    image = target / "image.tif"
    imwrite(image, np.zeros((_MINIATURE_PX, _MINIATURE_PX, 3), image_dtype), photometric="rgb")
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
        first = next(file.iter_batches(batch_size=1), None)
    if first is None:
        raise DataError(f"{bins.positions} has no rows. Restore the file.")
    row = pa.Table.from_batches([first])
    row = row.set_column(0, row.schema.field(0).with_type(barcode.type), barcode)
    pq.write_table(row, target / "spatial" / bins.positions.name)


def _write_one_cell(files: CellFiles, target: Path, barcode: str, outline: shapely.Polygon) -> None:
    with open_matrix(files.matrix) as matrix:
        _write_one_row(matrix, target / files.matrix.name, barcode)
    if files.scalefactors.is_file():
        _copy(files.scalefactors, target / "spatial" / files.scalefactors.name)
    geometry = {"type": "Polygon", "coordinates": [np.asarray(outline.exterior.coords).tolist()]}
    number = int(barcode.removeprefix("cellid_").removesuffix("-1"))
    feature = {"type": "Feature", "geometry": geometry, "properties": {"cell_id": number}}
    collection = {"type": "FeatureCollection", "features": [feature]}
    (target / files.outlines.name).write_text(json.dumps(collection))


def _write_one_row(matrix: CountMatrix, target: Path, barcode: str) -> None:
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
