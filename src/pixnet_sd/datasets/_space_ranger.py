"""Parquet tables written a few rows at a time, and columns of names that no Python text is made for.

Count matrices in the HDF5 format of Space Ranger, written a few rows at a time.

Files of segmented cells: ``segmented_outputs`` and ``barcode_mappings.parquet``.

Files of a Space Ranger output folder that say where things lie: images, scale factors, transformations.

A drawn slide as the output folder of Space Ranger for Visium: spots of 55 µm on a hexagonal pitch of 100 µm.

A drawn slide as the output folder of Space Ranger for Visium HD, written in streams.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError, StoreError

from ._sample import TRUTH, check_disk, check_memory, density_bytes, image_bytes, write_truth
from .drawn import (
    BASE_UM,
    DENSITY_PITCH_UM,
    WINDOW_PX,
    Band,
    CellCounts,
    Cells,
    CountedCells,
    DrawnSlide,
    Grid,
    Panel,
    Previews,
    bin_barcodes,
    cell_barcodes,
    draw,
    draw_counts,
    find_cells,
    integrate_disks,
    library_size,
    preview_px,
    spot_barcodes,
)

if TYPE_CHECKING:
    import h5py
    import pyarrow as pa

__all__ = [
    "CellFiles",
    "MatrixFile",
    "ParquetFile",
    "new_folder",
    "text_column",
    "write_feature_slice",
    "write_image",
    "write_scalefactors",
    "write_visium",
    "write_visium_hd",
]


def text_column(names: NDArray[np.bytes_], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Bytes of equal length as a text column, with nulls where ``missing`` holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    offsets = np.arange(len(names) + 1, dtype=np.int32) * names.dtype.itemsize
    buffers = (pa.py_buffer(part) for part in (offsets, np.ascontiguousarray(names)))
    text = pa.StringArray.from_buffers(len(names), *buffers)
    return text if missing is None else pc.if_else(pa.array(missing), pa.scalar(None, pa.string()), text)


class ParquetFile:
    """A context in which row groups are appended to a parquet file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._writer: Any = None

    def append(self, columns: dict[str, Any]) -> None:
        """Write rows; the first ones decide the types."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        table = pa.table(columns)
        if self._writer is None:
            self._writer = ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


_CHUNK = 1 << 16


class MatrixFile:
    """``filtered_feature_bc_matrix.h5``: a context in which rows are appended; read by ``scanpy.read_10x_h5``.

    Beside what Space Ranger writes, its features have ``spatially_varying``, which scanpy puts into ``var``.
    """

    def __init__(self, path: Path, panel: Panel, library_id: str) -> None:
        import h5py

        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(path, "w")
        self._file.attrs.update(
            {"filetype": "matrix", "version": 2, "chemistry_description": "drawn", "software_version": "pixnet_sd"}
        )
        self._file.attrs["library_ids"] = np.array([library_id.encode() or b"drawn"])
        self._n_genes = len(panel.names)
        self._matrix = self._file.create_group("matrix")
        self._write_features(panel)
        self._data = self._growing("data", "i4")
        self._indices = self._growing("indices", "i8")
        self._indptr = self._growing("indptr", "i8")
        self._barcodes: h5py.Dataset | None = None
        _append(self._indptr, np.zeros(1, dtype=np.int64))

    def append(self, barcodes: NDArray[np.bytes_], counts: sp.csr_matrix) -> None:
        """Write rows, (n, genes)."""
        if not counts.has_sorted_indices:
            counts = counts.sorted_indices()
        if self._barcodes is None:
            self._barcodes = self._growing("barcodes", barcodes.dtype)
        start = len(self._data)
        _append(self._barcodes, barcodes)
        _append(self._data, counts.data.astype(np.int32))
        _append(self._indices, counts.indices.astype(np.int64))
        _append(self._indptr, counts.indptr[1:].astype(np.int64) + start)

    def close(self) -> None:
        """Write the shape and close the file."""
        if self._barcodes is None:
            self._barcodes = self._growing("barcodes", "S1")
        self._matrix["shape"] = np.array([self._n_genes, len(self._barcodes)], dtype=np.int32)
        self._file.close()

    def __enter__(self) -> MatrixFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write_features(self, panel: Panel) -> None:
        features = self._matrix.create_group("features")
        columns = panel.var
        features["name"] = np.array(panel.names, dtype="S")
        features["id"] = np.array(columns["gene_ids"], dtype="S")
        features["feature_type"] = np.array(columns["feature_types"], dtype="S")
        features["genome"] = np.array(columns["genome"], dtype="S")
        features["spatially_varying"] = panel.varying
        features["_all_tag_keys"] = np.array([b"genome"])

    def _growing(self, name: str, dtype: Any) -> h5py.Dataset:
        return self._matrix.create_dataset(
            name,
            (0,),
            maxshape=(None,),
            dtype=dtype,
            chunks=(_CHUNK,),
            compression="gzip",
            compression_opts=1,
            shuffle=True,
        )


def _append(dataset: h5py.Dataset, values: NDArray[Any]) -> None:
    start = len(dataset)
    dataset.resize((start + len(values),))
    dataset[start:] = values


_SPOT_UM = 8.0  # of the format's scale factors; cells have outlines


class CellFiles(ExitStack):
    """A context that takes in one band after another and writes the cells that they complete."""

    def __init__(self, folder: Path, cells: Cells, slide: DrawnSlide, bin_um: tuple[int, ...], dataset_id: str) -> None:
        super().__init__()
        self._cells, self._slide = cells, slide
        self._sums = CellCounts(cells, len(slide.panel.names))
        self._bin_um = sorted({BASE_UM, *bin_um})
        outputs = folder / "segmented_outputs"
        write_scalefactors(outputs / "spatial", slide, spot_um=_SPOT_UM, bin_um=None)
        self._counts = self.enter_context(
            MatrixFile(outputs / "filtered_feature_cell_matrix.h5", slide.panel, dataset_id)
        )
        self._cell_outlines = self.enter_context(_GeoJson(outputs / "cell_segmentations.geojson"))
        self._nucleus_outlines = self.enter_context(_GeoJson(outputs / "nucleus_segmentations.geojson"))
        self._mappings = self.enter_context(ParquetFile(folder / "barcode_mappings.parquet"))

    def append(self, band: Band) -> None:
        """Write the mapping of a band's bins, and the cells that are complete."""
        owner, in_nucleus = self._cells.of_bins(band.first_row, band.on_tissue)
        row, col = np.nonzero(band.on_tissue)
        self._mappings.append(self._mapping(row + band.first_row, col, owner, in_nucleus))
        self._write(self._sums.add(band, owner))
        if band.first_row + len(band.on_tissue) == self._slide.lattice.n_base:
            self._write(self._sums.rest())

    def _mapping(
        self, row: NDArray[np.int64], col: NDArray[np.int64], owner: NDArray[np.int64], in_nucleus: NDArray[np.bool_]
    ) -> dict[str, object]:
        columns: dict[str, object] = {}
        for um in self._bin_um:
            step = um // BASE_UM
            columns[f"square_{um:03d}um"] = text_column(bin_barcodes(um, row // step, col // step))
        cell_id = text_column(cell_barcodes(np.maximum(owner, 0) + 1), missing=owner < 0)
        return columns | {"cell_id": cell_id, "in_nucleus": in_nucleus, "in_cell": owner >= 0}

    def _write(self, cells: CountedCells) -> None:
        self._counts.append(cells.barcodes, cells.counts)
        for file, nucleus in ((self._cell_outlines, False), (self._nucleus_outlines, True)):
            file.append(cells.numbers, self._cells.outlines_px(cells.which, self._slide.mpp, nucleus=nucleus))


class _GeoJson:
    """A context in which polygons are appended to a feature collection."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write('{"type": "FeatureCollection", "features": [')
        self._separator = "\n"

    def append(self, numbers: NDArray[np.int64], outlines_px: NDArray[np.float64]) -> None:
        for number, outline in zip(numbers.tolist(), outlines_px.tolist(), strict=True):
            feature = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [outline]},
                "properties": {"cell_id": number},
            }
            self._file.write(self._separator + json.dumps(feature))
            self._separator = ",\n"

    def __enter__(self) -> _GeoJson:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.write("\n]}\n")
        self._file.close()


_FIDUCIAL_UM = 165.0  # read by nobody here, but part of the format


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Folder to write into, which gets its name only when everything in it is complete."""
    if path.exists():
        raise StoreError(f"{path} exists already. Give another path, or delete it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        partial.chmod(0o755)  # a temporary folder is closed to others
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_image(path: Path, slide: DrawnSlide, n_workers: int | None) -> Previews:
    """Full-resolution image as a tiled BigTIFF, window by window; returns its previews."""
    from tifffile import TiffWriter

    previews = Previews.blank(slide.size_px)

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for grid, pixels in draw(slide.tissue, slide.size_px, slide.mpp, n_workers):
            previews.add(grid, pixels)
            yield pixels

    with TiffWriter(path, bigtiff=True) as file:
        file.write(
            tiles(),
            shape=(slide.size_px, slide.size_px, 3),
            dtype=np.uint8,
            tile=(WINDOW_PX, WINDOW_PX),
            photometric="rgb",
            resolution=(1e4 / slide.mpp, 1e4 / slide.mpp),
            resolutionunit="CENTIMETER",
            metadata=None,
        )
    return previews


def write_scalefactors(spatial: Path, slide: DrawnSlide, *, spot_um: float, bin_um: float | None) -> None:
    """``scalefactors_json.json``."""
    spatial.mkdir(parents=True, exist_ok=True)
    factors: dict[str, float] = {
        "spot_diameter_fullres": spot_um / slide.mpp,
        "fiducial_diameter_fullres": _FIDUCIAL_UM / slide.mpp,
    }
    for name, px in preview_px(slide.size_px).items():
        factors[f"tissue_{name}_scalef"] = px / slide.size_px
    if bin_um is not None:
        factors |= {"bin_size_um": float(bin_um), "microns_per_pixel": slide.mpp}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))


def write_feature_slice(path: Path, slide: DrawnSlide) -> None:
    """``feature_slice.h5`` with its metadata only: layout of the lattice and how it lies on the image."""
    import h5py

    n_base = slide.lattice.n_base
    to_image = _spots_to_image(slide)
    to_spots = np.linalg.inv(to_image)
    layout = {
        "slide_name": "drawn",
        "file_format": "1.0",
        "nrows": n_base,
        "ncols": n_base,
        "spot_pitch": float(BASE_UM),
        "transform": np.diag([BASE_UM, BASE_UM, 1.0]).ravel().tolist(),
    }
    matrices = {
        "microscope_colrow_to_spot_colrow": to_spots,
        "spot_colrow_to_microscope_colrow": to_image,
        "cytassist_colrow_to_spot_colrow": to_spots,
        "spot_colrow_to_cytassist_colrow": to_image,
    }
    metadata: dict[str, Any] = {
        "nrows": n_base,
        "ncols": n_base,
        "hd_layout_json": json.dumps(layout),
        "transform_matrices": {name: matrix.tolist() for name, matrix in matrices.items()},
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "feature_slice", "version": "0.1.0", "metadata_json": json.dumps(metadata)})


def _spots_to_image(slide: DrawnSlide) -> NDArray[np.float64]:
    """Affine (3, 3) from (array_col, array_row) of 2 µm bins to the pixels of their centres."""
    x, y = slide.lattice.centres_um(BASE_UM, np.array([0, 0, 1]), np.array([0, 1, 0]))
    points = np.stack([x, y]) / slide.mpp
    matrix = np.eye(3)
    matrix[:2] = np.stack([points[:, 1] - points[:, 0], points[:, 2] - points[:, 0], points[:, 0]], axis=1)
    return matrix


_SPOT_UM_VISIUM, _PITCH_UM = 55.0, 100.0


@checked(DataError)
def write_visium(
    path: str | Path,
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    n_genes: int = 40,
    dataset_id: str = "sample",
    seed: int = 0,
) -> Path:
    """Write the tissue of :func:`sample` as Visium sees it, in spots of 55 µm, 100 µm apart.

    ``spatialdata_io.visium(path, fullres_image_file="{id}_tissue_image.tif")`` reads the folder. Image and densities
    are those of :func:`sample` for the same arguments; counts are Poisson draws around the integral over each disk
    times the spot's library size.

    Parameters
    ----------
    path
        Folder to make. It appears under this name when it is complete.
    size_um
        Side of the square slide in µm, at least 100; a capture area has 6500. The densities are held in memory, 20
        bytes per µm².
    mpp, n_genes, seed
        As in :func:`sample`.
    dataset_id
        Prefix of files and of element names; with an empty one the reader must be told a ``dataset_id``.

    Returns
    -------
    Path
        The folder: ``{id}_filtered_feature_bc_matrix.h5`` with the spots on tissue, ``{id}_tissue_image.tif``, and
        ``spatial/`` with ``tissue_positions.csv``, scale factors and previews.

    Raises
    ------
    DataError
        If an argument is out of range.
    StoreError
        If there is something at ``path`` already.
    """
    check_memory(density_bytes(size_um), size_um=size_um)
    check_disk(image_bytes(size_um, mpp), Path(path), size_um=size_um, mpp=mpp)
    slide = DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    spots = _Spots.on(slide)
    prefix = f"{dataset_id}_" if dataset_id else ""
    with new_folder(Path(path)) as folder:
        previews = write_image(folder / f"{prefix}tissue_image.tif", slide, None)
        previews.save(folder / "spatial")
        write_scalefactors(folder / "spatial", slide, spot_um=_SPOT_UM_VISIUM, bin_um=None)
        spots.positions(slide).to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
        with MatrixFile(folder / f"{prefix}filtered_feature_bc_matrix.h5", slide.panel, dataset_id) as file:
            found = spots.subset(spots.on_tissue(slide))
            file.append(found.barcodes, draw_counts(found.caught(slide), slide.panel, (seed, 8)))
    return Path(path)


@dataclass(frozen=True)
class _Spots:
    """Spots in the order of their barcodes, arrays (n,)."""

    barcodes: NDArray[np.bytes_]
    array_row: NDArray[np.int64]
    array_col: NDArray[np.int64]
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]

    @classmethod
    def on(cls, slide: DrawnSlide) -> _Spots:
        """All spots that lie on the slide as a whole; in odd rows the odd columns, as the format counts."""
        row_um, col_um = _PITCH_UM * np.sqrt(3) / 2, _PITCH_UM / 2
        room_um = slide.size_um - _SPOT_UM_VISIUM
        row, col = (part.ravel() for part in np.indices((int(room_um // row_um) + 1, int(room_um // col_um) + 1)))
        row, col = row[(row + col) % 2 == 0], col[(row + col) % 2 == 0]
        barcodes = spot_barcodes(np.arange(len(row)))
        spots = cls(barcodes, row, col, _SPOT_UM_VISIUM / 2 + col * col_um, _SPOT_UM_VISIUM / 2 + row * row_um)
        return spots.subset(np.argsort(barcodes))

    def subset(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> _Spots:
        """Some of the spots."""
        return _Spots(*(getattr(self, field.name)[which] for field in fields(self)))

    def on_tissue(self, slide: DrawnSlide) -> NDArray[np.bool_]:
        """Whether the centre of each lies on tissue."""
        side = int(np.ceil(slide.size_um / DENSITY_PITCH_UM))
        edge_um = slide.tissue.edge_um(Grid(0, 0, side, side, DENSITY_PITCH_UM))
        return np.asarray(edge_um[np.floor(self.y_um).astype(np.int64), np.floor(self.x_um).astype(np.int64)] > 0)

    def caught(self, slide: DrawnSlide) -> NDArray[np.float64]:
        """Integral of every source over each times its library size, (n, sources)."""
        made = integrate_disks(slide.density.astype(np.float32), self.x_um, self.y_um, _SPOT_UM_VISIUM / 2)
        library = library_size(slide.tissue, self.array_row, self.array_col, self.x_um, self.y_um)
        return made * library[:, None]

    def positions(self, slide: DrawnSlide) -> pd.DataFrame:
        """``tissue_positions.csv``."""
        return pd.DataFrame(
            {
                "barcode": [name.decode() for name in self.barcodes.tolist()],
                "in_tissue": self.on_tissue(slide).astype(np.int64),
                "array_row": self.array_row,
                "array_col": self.array_col,
                "pxl_row_in_fullres": self.y_um / slide.mpp,
                "pxl_col_in_fullres": self.x_um / slide.mpp,
            }
        )


@checked(DataError)
def write_visium_hd(
    path: str | Path,
    *,
    size_um: float = 1000.0,
    mpp: float = 0.5,
    bin_um: Sequence[int] = (2, 8, 16),
    n_genes: int = 40,
    dataset_id: str = "sample",
    cells: bool = True,
    seed: int = 0,
    n_workers: int | None = None,
) -> Path:
    """Write the slide of :func:`sample` as an output folder of Space Ranger, of any size, with its truth beside it.

    ``spatialdata_io.visium_hd(path)`` reads the folder as it reads a real one, and finds the same pixels, counts and
    cells as :func:`sample` gives for the same arguments. Everything is written as it is drawn: memory stays below
    1.5 GB also for a whole capture area.

    Parameters
    ----------
    path
        Folder to make. It appears under this name when it is complete.
    size_um
        Side of the square slide in µm, at least 100. Bins on tissue: 0.17 million of 2 µm at 1000, 4.4 million at 4500,
        10 million at 6700, which is a whole capture area. On large slides more than nine bins in ten lie on tissue.
    mpp
        µm per pixel of the full image, which takes 3 · (size_um / mpp)² bytes.
    bin_um
        Bin sizes in µm, out of 2, 4, 8 and 16.
    n_genes
        Number of genes; a real panel has 18,000. See :func:`sample`.
    dataset_id
        Prefix of files and of element names; may be empty.
    cells
        Write segmented cells and nuclei too.
    seed
        Another seed draws other tissue.
    n_workers
        Threads that draw; one per processor if None. The result does not depend on it.

    Returns
    -------
    Path
        The folder: ``{id}_feature_slice.h5`` (metadata only), ``{id}_tissue_image.tif``,
        ``binned_outputs/square_002um/`` and so on with counts, positions, scale factors and previews, with ``cells``
        ``segmented_outputs/`` and ``barcode_mappings.parquet``; and ``truth.zarr``, see :func:`visium_hd_truth`.

    Raises
    ------
    DataError
        If an argument is out of range.
    StoreError
        If there is something at ``path`` already.
    """
    check_disk(image_bytes(size_um, mpp), Path(path), size_um=size_um, mpp=mpp)
    slide = DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    sizes = tuple(sorted(set(bin_um)))
    prefix = f"{dataset_id}_" if dataset_id else ""
    with new_folder(Path(path)) as folder:
        write_feature_slice(folder / f"{prefix}feature_slice.h5", slide)
        previews = write_image(folder / f"{prefix}tissue_image.tif", slide, n_workers)
        for size in sizes:
            spatial = _bin_folder(folder, size) / "spatial"
            write_scalefactors(spatial, slide, spot_um=size, bin_um=size)
            previews.save(spatial)
        density = write_truth(folder / TRUTH, slide, n_workers)
        with ExitStack() as stack:
            outputs: list[_BinFiles | CellFiles] = [
                stack.enter_context(_BinFiles(folder, size, slide, dataset_id)) for size in sizes
            ]
            if cells:
                found = find_cells(slide, n_workers)
                outputs.append(stack.enter_context(CellFiles(folder, found, slide, sizes, dataset_id)))
            for band in slide.bands(density, n_workers):
                for output in outputs:
                    output.append(band)
    return Path(path)


def _bin_folder(folder: Path, bin_um: int) -> Path:
    return folder / "binned_outputs" / f"square_{bin_um:03d}um"


class _BinFiles(ExitStack):
    """Counts and positions of the bins of one size."""

    def __init__(self, folder: Path, bin_um: int, slide: DrawnSlide, dataset_id: str) -> None:
        super().__init__()
        self._bin_um, self._slide = bin_um, slide
        of_size = _bin_folder(folder, bin_um)
        self._counts = self.enter_context(
            MatrixFile(of_size / "filtered_feature_bc_matrix.h5", slide.panel, dataset_id)
        )
        self._positions = self.enter_context(ParquetFile(of_size / "spatial" / "tissue_positions.parquet"))

    def append(self, band: Band) -> None:
        """Write the bins of a band."""
        lattice, size = self._slide.lattice, self._bin_um
        base = lattice.bins(BASE_UM, band.on_tissue, band.first_row)
        whole, first_row = lattice.whole(size, band.on_tissue), band.first_row * BASE_UM // size
        bins = lattice.bins(size, whole, first_row)
        self._counts.append(bins.barcodes, bins.gather(base) @ band.counts)
        self._positions.append(self._all_positions(whole, first_row))

    def _all_positions(self, whole: NDArray[np.bool_], first_row: int) -> dict[str, object]:
        """Every bin of a few rows of the lattice, on tissue or not."""
        row, col = (part.ravel() for part in np.indices(whole.shape))
        row = row + first_row
        x, y = self._slide.lattice.centres_um(self._bin_um, row, col)
        return {
            "barcode": text_column(bin_barcodes(self._bin_um, row, col)),
            "in_tissue": whole.ravel().astype(np.int64),
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": y / self._slide.mpp,
            "pxl_col_in_fullres": x / self._slide.mpp,
        }
