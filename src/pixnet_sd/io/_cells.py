"""Outlines of cells from GeoJSON, one feature at a time: the parsed file would take ten times its size.

Segmented cells: those of the matrix that have an outline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import shapely
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

from pixnet_sd.errors import DataError

from ._folder import CellFiles
from ._matrix import open_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Cells", "read_cells", "read_outlines"]

_BLOCK_CHARACTERS = 2**20
_BETWEEN = tuple(", \t\r\n")


def read_outlines(path: Path) -> dict[str, shapely.Polygon]:
    """Cell barcode → outer ring in pixels of the full image.

    Raises
    ------
    DataError
        When the file is no collection of polygons with a ``cell_id``.
    """
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
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, at = _after_opening(file), 0
        while True:
            while text[at : at + 1] in _BETWEEN:
                at += 1
            if text.startswith("]", at):
                return
            try:
                feature, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                more = file.read(max(_BLOCK_CHARACTERS, len(text) - at))
                if not more:
                    raise
                text, at = text[at:] + more, 0
            else:
                yield feature


def _after_opening(file: Any) -> str:
    """Text from behind the bracket that opens the list of features."""
    text = ""
    while True:
        key = text.find('"features"')
        bracket = text.find("[", key) if key >= 0 else -1
        if bracket >= 0:
            return text[bracket + 1 :]
        more = file.read(_BLOCK_CHARACTERS)
        if not more:
            raise ValueError("no list of features")
        text += more


@dataclass(frozen=True)
class Cells:
    """Cells of a folder.

    Attributes
    ----------
    files
        Where they come from.
    keep
        (n,) which rows of the matrix have an outline.
    names
        Barcodes of these.
    outlines
        Polygons of these, in pixels of the full image.
    """

    files: CellFiles
    keep: NDArray[np.bool_]
    names: list[str]
    outlines: list[shapely.Polygon]

    def element(self, like: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
        """Shapes of all cells, as the reader made them of one (``like``)."""
        frame = gpd.GeoDataFrame({"cell_id": self.names, "geometry": self.outlines}, index=self.names)
        return ShapesModel.parse(frame, transformations=get_transformation(like, get_all=True))


def read_cells(files: CellFiles) -> Cells:
    """Read names and outlines; counts stay on disk.

    Raises
    ------
    DataError
        When no cell has an outline, or a file is damaged.
    """
    outlines = read_outlines(files.outlines)
    with open_matrix(files.matrix) as matrix:
        names = matrix.barcodes(0, matrix.n_rows).to_pylist()
    keep = np.array([name in outlines for name in names], dtype=bool)
    if not keep.any():
        raise DataError(
            f"None of the {len(names)} cells of {files.matrix} has an outline in {files.outlines.name}: the two are of "
            "different runs. Restore both, or move segmented_outputs away to convert without cells."
        )
    kept = [name for name in names if name in outlines]
    return Cells(files, keep, kept, [outlines[name] for name in kept])
