"""Drawn slides as output folders of Space Ranger: Visium, and Visium HD in streams with its truth beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray
from pyarrow.parquet import ParquetWriter
from tifffile import TiffWriter
from xarray import DataArray

from pixnet_sd._arguments import checked
from pixnet_sd.errors import DataError, StoreError

from . import drawn
from ._sample import check_free, density_bytes, truth_map

_TRUTH = "truth.zarr"
_CHUNK = 1 << 16
_SPOT_UM, _PITCH_UM = 55.0, 100.0  # of Visium
_CELL_SPOT_UM, _FIDUCIAL_UM = 8.0, 165.0  # part of the format, read by nobody here: cells have outlines
_POSITIONS = pa.schema(
    [("barcode", pa.string())]
    + [(name, pa.int64()) for name in ("in_tissue", "array_row", "array_col")]
    + [(name, pa.float64()) for name in ("pxl_row_in_fullres", "pxl_col_in_fullres")]
)


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
    path = Path(path).expanduser()
    check_free(density_bytes(size_um), size_um=size_um)
    check_free(3 * (size_um / mpp) ** 2, path, size_um=size_um, mpp=mpp)
    slide = drawn.DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    prefix = f"{dataset_id}_" if dataset_id else ""
    with _new_folder(path) as folder:
        previews = _write_image(folder / f"{prefix}tissue_image.tif", slide, None)
        previews.save(folder / "spatial")
        _write_scalefactors(folder / "spatial", slide, spot_um=_SPOT_UM)
        spots = _spots(slide)
        spots.to_csv(folder / "spatial" / "tissue_positions.csv", index=False, columns=_POSITIONS.names)
        covered = spots[spots["in_tissue"] == 1]
        row, col, x_um, y_um = (covered[name].to_numpy() for name in ("array_row", "array_col", "x_um", "y_um"))
        integrals = drawn.integrate_shapes(slide.density.astype(np.float32), x_um, y_um, _SPOT_UM, disk=True)
        caught = integrals * drawn.library_size(slide.tissue, row, col, x_um, y_um)[:, None]
        with _matrix_file(folder / f"{prefix}filtered_feature_bc_matrix.h5", slide.panel, dataset_id) as append:
            append(covered["barcode"].to_numpy().astype("S"), drawn.draw_counts(caught, slide.panel, (seed, 8)))
    return path


def _spots(slide: drawn.DrawnSlide) -> pd.DataFrame:
    """Positions of all spots that lie on the slide as a whole, by barcode, with their centres in µm too."""
    row_um, col_um = _PITCH_UM * np.sqrt(3) / 2, _PITCH_UM / 2
    room_um = slide.size_um - _SPOT_UM
    row, col = (index.ravel() for index in np.indices((int(room_um // row_um) + 1, int(room_um // col_um) + 1)))
    row, col = row[(row + col) % 2 == 0], col[(row + col) % 2 == 0]  # in odd rows odd columns: so the format counts
    barcodes = drawn.spot_barcodes(np.arange(len(row))).astype(str)
    x_um, y_um = _SPOT_UM / 2 + col * col_um, _SPOT_UM / 2 + row * row_um
    side = int(np.ceil(slide.size_um))
    grid = drawn.Grid(0, 0, side, side)
    in_tissue = (slide.tissue.edge_um(grid)[grid.pixel(x_um, y_um)] > 0).astype(np.int64)
    columns = (barcodes, in_tissue, row, col, y_um / slide.mpp, x_um / slide.mpp)
    frame = pd.DataFrame(dict(zip(_POSITIONS.names, columns, strict=True))).assign(x_um=x_um, y_um=y_um)
    return frame.sort_values("barcode")


@checked(DataError)
def write_visium_hd(  # noqa: PLR0913
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
    path = Path(path).expanduser()
    check_free(3 * (size_um / mpp) ** 2, path, size_um=size_um, mpp=mpp)
    slide = drawn.DrawnSlide.of(size_um=size_um, mpp=mpp, n_genes=n_genes, seed=seed)
    sizes = sorted(set(bin_um))
    prefix = f"{dataset_id}_" if dataset_id else ""
    with _new_folder(path) as folder:
        _write_feature_slice(folder / f"{prefix}feature_slice.h5", slide)
        previews = _write_image(folder / f"{prefix}tissue_image.tif", slide, n_workers)
        bin_folders = {um: folder / "binned_outputs" / f"square_{um:03d}um" for um in sizes}
        for um, of_bins in bin_folders.items():
            _write_scalefactors(of_bins / "spatial", slide, spot_um=um, bin_um=um)
            previews.save(of_bins / "spatial")
        density = _write_truth(folder / _TRUTH, slide, n_workers)
        with ExitStack() as files:
            writers = [files.enter_context(_bin_files(bin_folders[um], um, slide, dataset_id)) for um in sizes]
            if cells:
                writers.append(files.enter_context(_cell_files(folder, slide, sizes, dataset_id, n_workers)))
            for band in slide.bands(density, n_workers):
                for write in writers:
                    write(band)
    return path


@contextmanager
def _bin_files(
    folder: Path, bin_um: int, slide: drawn.DrawnSlide, dataset_id: str
) -> Iterator[Callable[[drawn.Band], None]]:
    """Counts and positions of the bins of one size; yields what writes those of a band."""
    lattice = slide.lattice

    def write(band: drawn.Band) -> None:
        whole = lattice.whole(bin_um, band.on_tissue)
        row, col = (index.ravel() for index in np.indices(whole.shape))
        row = row + band.first_row * drawn.BASE_UM // bin_um
        x_um, y_um = lattice.centres_um(bin_um, row, col)
        barcodes = drawn.bin_barcodes(bin_um, row, col)
        columns = (_text(barcodes), whole.ravel().astype(np.int64), row, col, y_um / slide.mpp, x_um / slide.mpp)
        positions.write_table(pa.table(dict(zip(_POSITIONS.names, columns, strict=True))))
        append(barcodes[whole.ravel()], lattice.gather(bin_um, band.on_tissue) @ band.counts)

    with (
        _matrix_file(folder / "filtered_feature_bc_matrix.h5", slide.panel, dataset_id) as append,
        ParquetWriter(folder / "spatial" / "tissue_positions.parquet", _POSITIONS) as positions,
    ):
        yield write


@contextmanager
def _cell_files(
    folder: Path, slide: drawn.DrawnSlide, sizes: Sequence[int], dataset_id: str, n_workers: int | None
) -> Iterator[Callable[[drawn.Band], None]]:
    """``segmented_outputs`` and ``barcode_mappings.parquet``; yields what writes the cells that a band completes."""
    cells = slide.cells(n_workers)
    sums = drawn.CellCounts(cells, len(slide.panel.names))
    outputs = folder / "segmented_outputs"
    _write_scalefactors(outputs / "spatial", slide, spot_um=_CELL_SPOT_UM)
    names = {um: f"square_{um:03d}um" for um in sorted({drawn.BASE_UM, *sizes})}
    texts = dict.fromkeys((*names.values(), "cell_id"), pa.string())
    schema = pa.schema({**texts, "in_nucleus": pa.bool_(), "in_cell": pa.bool_()})

    def write(band: drawn.Band) -> None:
        owner, in_nucleus = cells.of_bins(band.first_row, band.on_tissue)
        row, col = np.nonzero(band.on_tissue)
        row_um, col_um = (row + band.first_row) * drawn.BASE_UM, col * drawn.BASE_UM
        columns = {name: _text(drawn.bin_barcodes(um, row_um // um, col_um // um)) for um, name in names.items()}
        columns["cell_id"] = _text(drawn.cell_barcodes(np.maximum(owner, 0)), missing=owner < 0)
        mappings.write_table(pa.table(columns | {"in_nucleus": in_nucleus, "in_cell": owner >= 0}))
        which, counts = sums.add(band, owner)
        append(drawn.cell_barcodes(which), counts)
        for outline, nucleus in ((cell_outline, False), (nucleus_outline, True)):
            outline(which + 1, cells.outlines_px(which, slide.mpp, nucleus=nucleus))

    with (
        _matrix_file(outputs / "filtered_feature_cell_matrix.h5", slide.panel, dataset_id) as append,
        _geojson_file(outputs / "cell_segmentations.geojson") as cell_outline,
        _geojson_file(outputs / "nucleus_segmentations.geojson") as nucleus_outline,
        ParquetWriter(folder / "barcode_mappings.parquet", schema) as mappings,
    ):
        yield write


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Folder to write into, which gets its name only when everything in it is complete."""
    if path.exists():
        raise StoreError(f"{path} exists already. Give another path, or delete it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as closed:
        folder = Path(closed) / path.name  # in it, as a temporary folder is closed to others
        folder.mkdir()
        yield folder
        folder.rename(path)


@contextmanager
def _matrix_file(
    path: Path, panel: drawn.Panel, library_id: str
) -> Iterator[Callable[[NDArray[np.bytes_], sp.csr_matrix], None]]:
    """Count matrix as ``scanpy.read_10x_h5`` reads it; yields what appends barcodes and their counts (n, genes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        about = {"filetype": "matrix", "version": 2, "chemistry_description": "drawn", "software_version": "pixnet_sd"}
        file.attrs.update({**about, "library_ids": np.array([library_id.encode() or b"drawn"])})
        matrix = file.create_group("matrix")
        features, var = matrix.create_group("features"), panel.var.reset_index(names="name")
        keys = {"id": "gene_ids", "feature_type": "feature_types", "genome": "genome", "name": "name"}
        features.update({name: np.array(var[key], dtype="S") for name, key in keys.items()})
        # Space Ranger writes no "spatially_varying", which scanpy puts into ``var``
        features.update(spatially_varying=panel.varying, _all_tag_keys=np.array([b"genome"]))
        _append(matrix, "indptr", np.zeros(1, dtype=np.int64))

        def append(barcodes: NDArray[np.bytes_], counts: sp.csr_matrix) -> None:
            counts = counts.sorted_indices()
            _append(matrix, "indptr", counts.indptr[1:] + matrix["indptr"][-1])
            _append(matrix, "data", counts.data.astype(np.int32))
            _append(matrix, "indices", counts.indices.astype(np.int64))
            _append(matrix, "barcodes", barcodes)

        yield append
        matrix["shape"] = np.array([len(panel.names), len(matrix["barcodes"])], dtype=np.int32)


def _append(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    """Append to a dataset, which the first values make."""
    if name not in group:
        storage = {"chunks": (_CHUNK,), "compression": "gzip", "compression_opts": 1, "shuffle": True}
        group.create_dataset(name, (0,), maxshape=(None,), dtype=values.dtype, **storage)
    dataset, start = group[name], len(group[name])
    dataset.resize((start + len(values),))
    dataset[start:] = values


@contextmanager
def _geojson_file(path: Path) -> Iterator[Callable[[NDArray[np.int64], NDArray[np.float64]], None]]:
    """Feature collection; yields what appends numbers of cells and their polygons (n, corners, 2)."""
    separators = chain(["\n"], repeat(",\n"))
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')

        def append(numbers: NDArray[np.int64], outlines_px: NDArray[np.float64]) -> None:
            for number, outline in zip(numbers.tolist(), outlines_px.tolist(), strict=True):
                geometry = {"type": "Polygon", "coordinates": [outline]}
                feature = {"type": "Feature", "geometry": geometry, "properties": {"cell_id": number}}
                file.write(next(separators) + json.dumps(feature))

        yield append
        file.write("\n]}\n")


def _text(names: NDArray[np.bytes_], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Names as a text column, null where ``missing``; no Python text is made for them."""
    return pa.array(names, pa.binary(), mask=missing).cast(pa.string())


def _write_image(path: Path, slide: drawn.DrawnSlide, n_workers: int | None) -> drawn.Previews:
    """Full-resolution image as a tiled BigTIFF, window by window; returns its previews."""
    previews = drawn.Previews(slide.size_px)

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for grid, pixels in drawn.draw(slide.tissue, slide.size_px, slide.mpp, n_workers):
            previews.add(grid, pixels)
            yield pixels

    shape, tile = (slide.size_px, slide.size_px, 3), (drawn.WINDOW_PX, drawn.WINDOW_PX)
    scale: dict[str, Any] = {"resolution": (1e4 / slide.mpp, 1e4 / slide.mpp), "resolutionunit": "CENTIMETER"}
    with TiffWriter(path, bigtiff=True) as file:
        file.write(tiles(), shape=shape, dtype=np.uint8, tile=tile, photometric="rgb", metadata=None, **scale)
    return previews


def _write_scalefactors(spatial: Path, slide: drawn.DrawnSlide, *, spot_um: float, bin_um: float | None = None) -> None:
    spatial.mkdir(parents=True, exist_ok=True)
    diameters_um = {"spot_diameter_fullres": spot_um, "fiducial_diameter_fullres": _FIDUCIAL_UM}
    factors = {name: um / slide.mpp for name, um in diameters_um.items()}
    factors |= {f"tissue_{name}_scalef": px / slide.size_px for name, px in drawn.preview_px(slide.size_px).items()}
    if bin_um is not None:
        factors |= {"bin_size_um": float(bin_um), "microns_per_pixel": slide.mpp}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))


def _write_feature_slice(path: Path, slide: drawn.DrawnSlide) -> None:
    """``feature_slice.h5`` with its metadata only: size of the lattice, and affines between its bins and pixels."""
    x_um, y_um = slide.lattice.centres_um(drawn.BASE_UM, np.array([0, 0, 1]), np.array([0, 1, 0]))
    origin, right, below = np.stack([x_um, y_um], axis=1) / slide.mpp
    to_image = np.eye(3)
    to_image[:2] = np.stack([right - origin, below - origin, origin], axis=1)
    matrices = {}
    for system in ("microscope", "cytassist"):
        matrices[f"{system}_colrow_to_spot_colrow"] = np.linalg.inv(to_image).tolist()
        matrices[f"spot_colrow_to_{system}_colrow"] = to_image.tolist()
    size = {"nrows": slide.lattice.n_base, "ncols": slide.lattice.n_base}
    to_um = np.diag([drawn.BASE_UM, drawn.BASE_UM, 1.0]).ravel().tolist()
    layout = {"slide_name": "drawn", "file_format": "1.0", **size}
    layout |= {"spot_pitch": float(drawn.BASE_UM), "transform": to_um}
    metadata = json.dumps({**size, "hd_layout_json": json.dumps(layout), "transform_matrices": matrices})
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "feature_slice", "version": "0.1.0", "metadata_json": metadata})


def _write_truth(path: Path, slide: drawn.DrawnSlide, n_workers: int | None) -> Any:
    """Write the density of every source window by window, and the genes' rates; returns the density, a zarr array."""
    attributes = {
        "size_um": slide.size_um,
        "genes": slide.panel.names,
        "spatially_varying": slide.panel.varying.tolist(),
        "sources": [source.name.lower() for source in drawn.Source],
    }
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    group.create_array("profile", data=slide.panel.profile)
    shape, chunks = drawn.density_shape(slide.size_um), (len(drawn.Source), drawn.DENSITY_WINDOW, drawn.DENSITY_WINDOW)
    names = ("source", "y", "x")
    density = group.create_array("density", shape=shape, chunks=chunks, dtype="float16", dimension_names=names)
    return drawn.fill_density(slide.tissue, density, n_workers)


@checked(DataError)
def visium_hd_truth(
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    pitch_um: float = 2.0,
    window_um: tuple[float, float, float, float] | None = None,
) -> DataArray:
    """Read the expected counts of a slide that :func:`write_visium_hd` wrote; values as of :func:`sample_truth`.

    Only the part of the store that the window needs is read: 20 bytes per µm², and 4 bytes per gene and pixel come
    back, so take a large slide by windows.

    Parameters
    ----------
    path
        The folder.
    genes
        Names of genes, in the order wanted; all if None.
    pitch_um
        Side of a pixel in µm.
    window_um
        Smallest x, smallest y, largest x, largest y from the full image's upper left corner, in µm. All pixels that it
        meets are given; the whole slide if None.

    Returns
    -------
    DataArray
        float32, dims ``c`` (genes), ``y``, ``x`` (pixel centres in µm), and ``attrs`` as of :func:`sample_truth`.

    Raises
    ------
    DataError
        If there is no truth at ``path``, a gene is unknown, or the window does not meet the slide.
    """
    store = Path(path).expanduser() / _TRUTH
    if not store.is_dir():
        raise DataError(f"No {_TRUTH} in {path}. Give a folder that datasets.write_visium_hd wrote.")
    attrs: dict[str, Any] = dict(zarr.open_group(store, mode="r").attrs)
    density, profile = (zarr.open_array(store / name, mode="r") for name in ("density", "profile"))
    varying = pd.Series(attrs["spatially_varying"], attrs["genes"])
    columns = np.arange(len(varying)) if genes is None else varying.index.get_indexer(pd.Index(genes))
    if (columns < 0).any():
        unknown = pd.Index(genes or ())[columns < 0]
        raise DataError(f"Genes that the slide does not have: {', '.join(unknown[:5])}. It has {len(varying)} others.")
    rates = np.asarray(profile[:])[:, columns]
    return truth_map(density, attrs["size_um"], varying.iloc[columns], rates, pitch_um, window_um)
