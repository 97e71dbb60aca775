"""Files of segmented cells: ``segmented_outputs`` and ``barcode_mappings.parquet``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ._barcodes import bin_barcodes, cell_barcodes
from ._cells import CellCounts, Cells, CountedCells
from ._folder import write_scalefactors
from ._lattice import BASE_UM
from ._matrix_file import MatrixFile
from ._parquet import ParquetFile, text_column
from ._slide import Band, DrawnSlide

__all__ = ["CellFiles"]

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
