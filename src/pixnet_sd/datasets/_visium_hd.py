"""A drawn slide as the output folder of Space Ranger for Visium HD, written in streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._arguments import checked
from pixnet_sd._errors import DataError

from ._barcodes import bin_barcodes
from ._cell_files import CellFiles
from ._cells import find_cells
from ._folder import new_folder, write_feature_slice, write_image, write_scalefactors
from ._lattice import BASE_UM
from ._matrix_file import MatrixFile
from ._parquet import ParquetFile, text_column
from ._room import check_disk, image_bytes
from ._slide import Band, DrawnSlide
from ._truth import TRUTH, write_truth

__all__ = ["write_visium_hd"]


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
