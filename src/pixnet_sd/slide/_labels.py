"""Labels elements to regions, read lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger
from pixnet_sd.nn.regions import LabelGrid

from ._elements import coordinate_systems, scale0
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["LazyLabels", "regions_from_labels"]

_STRIP_PX = 1024
_PROBES = 8


class LazyLabels:
    """Label image (row, col) of which slices are computed when asked for; it can be pickled when the store can.

    Parameters
    ----------
    array
        Dask or NumPy array, shape (rows, columns).
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._array.shape
        return int(rows), int(columns)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        part = self._array[key]
        # One thread: windows are small, and several workers read at once.
        return np.asarray(part.compute(scheduler="synchronous") if hasattr(part, "compute") else part)


def regions_from_labels(sdata: SpatialData, key: str, coordinate_system: str) -> tuple[LabelGrid, pd.Index]:
    """Regions of a labels element in a coordinate system; label 0 is background.

    Parameters
    ----------
    sdata
        The object to look in.
    key
        Name of the labels element.
    coordinate_system
        Where the regions are wanted.

    Returns
    -------
    The regions, and the label of each, ascending.

    Raises
    ------
    DataError
        If there is no label but the background.
    """
    element = sdata.labels[key]
    labels = LazyLabels(scale0(element).transpose("y", "x").data)
    ids = _label_values(labels)
    if not len(ids):
        raise DataError(f"Labels {key!r} hold nothing but background (0).")
    to_system = affine_matrix(element, coordinate_system)
    if _maps_index_to_centre(sdata, key, coordinate_system, labels, to_system):
        logger.info("Labels %r: moved by half a label pixel, as rasterized bins need it.", key)
        to_system = to_system @ np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
    return LabelGrid(labels, ids, to_system), pd.Index(ids)


def _label_values(labels: LazyLabels) -> NDArray[np.int64]:
    strips = (np.unique(labels[top : top + _STRIP_PX]) for top in range(0, labels.shape[0], _STRIP_PX))
    values = np.unique(np.concatenate([np.empty(0, np.int64), *(strip.astype(np.int64) for strip in strips)]))
    return values[values != 0]


def _maps_index_to_centre(
    sdata: SpatialData, key: str, system: str, labels: LazyLabels, to_system: NDArray[np.float64]
) -> bool:
    """Whether the transformation takes label pixel (i, j), not (i + 0.5, j + 0.5), to the centre of a bin.

    `spatialdata.rasterize_bins` (0.7.3) fits it that way, so its labels lie half a bin off the bins that they were
    made from. The bins, where they are still there, tell.
    """
    bins = key.removesuffix("_labels")
    if bins == key or bins not in sdata.shapes or system not in coordinate_systems(sdata.shapes[bins]):
        return False
    row, col = _some_pixels(labels)
    centres = shapely.get_coordinates(shapely.centroid(sdata.shapes[bins].geometry.to_numpy()))
    to_labels = np.linalg.inv(to_system) @ affine_matrix(sdata.shapes[bins], system)
    centres = centres @ to_labels[:2, :2].T + to_labels[:2, 2]
    off = [max(np.hypot(*(centres - xy).T).min() for xy in zip(col + s, row + s, strict=True)) for s in (0.0, 0.5)]
    return bool(off[0] < 0.1 < off[1])


def _some_pixels(labels: LazyLabels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of a few pixels that are not background, from the first strip that has any."""
    for top in range(0, labels.shape[0], _STRIP_PX):
        row, col = np.nonzero(labels[top : top + _STRIP_PX])
        if len(row):
            picked = np.unique(np.linspace(0, len(row) - 1, _PROBES).astype(np.int64))
            return row[picked] + top, col[picked]
    return np.empty(0, np.int64), np.empty(0, np.int64)
