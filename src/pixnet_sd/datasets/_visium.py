"""A drawn slide as the output folder of Space Ranger for Visium: spots of 55 µm on a hexagonal pitch of 100 µm."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet_sd._arguments import checked
from pixnet_sd._errors import DataError

from ._barcodes import spot_barcodes
from ._counts import draw_counts, library_size
from ._expression import DENSITY_PITCH_UM
from ._folder import new_folder, write_image, write_scalefactors
from ._integrals import integrate_disks
from ._matrix_file import MatrixFile
from ._noise import Grid
from ._room import check_disk, check_memory, density_bytes, image_bytes
from ._slide import DrawnSlide

__all__ = ["write_visium"]

_SPOT_UM, _PITCH_UM = 55.0, 100.0


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
        write_scalefactors(folder / "spatial", slide, spot_um=_SPOT_UM, bin_um=None)
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
        room_um = slide.size_um - _SPOT_UM
        row, col = (part.ravel() for part in np.indices((int(room_um // row_um) + 1, int(room_um // col_um) + 1)))
        row, col = row[(row + col) % 2 == 0], col[(row + col) % 2 == 0]
        barcodes = spot_barcodes(np.arange(len(row)))
        spots = cls(barcodes, row, col, _SPOT_UM / 2 + col * col_um, _SPOT_UM / 2 + row * row_um)
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
        made = integrate_disks(slide.density.astype(np.float32), self.x_um, self.y_um, _SPOT_UM / 2)
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
