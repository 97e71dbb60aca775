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

from ._chunks import check_sources, guards_of
from ._elements import coordinate_systems, scale0
from ._image import stored_array
from ._shapes import edge_length
from ._stored_shapes import sample_positions, sample_shapes, shapes_of
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["LazyLabels", "label_ids", "label_matrix", "regions_from_labels", "sample_labels"]

_STRIP_PX = 1024
_SAMPLED_ROWS = 32
_TOLERANCE = 0.1  # label px


class LazyLabels:
    """Label image (row, col) of which slices are computed when asked for; it can be pickled when the store can.

    Parameters
    ----------
    array
        Dask or NumPy array, shape (rows, columns).
    """

    def __init__(self, array: Any) -> None:
        self._array, self._guards = array, guards_of(array)
        self._stored = stored_array(array)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the labels."""
        return np.dtype(self._array.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._array.shape
        return int(rows), int(columns)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        slices = key if isinstance(key, tuple) else (key,)
        if self._stored is not None and self._guards and all(isinstance(part, slice) for part in slices):
            slices = (*slices, slice(None))[:2]
            spans = [range(size)[part] for part, size in zip(slices, self.shape, strict=True)]
            if all(span.step == 1 for span in spans):
                box = (slice(spans[0].start, spans[0].stop), slice(spans[1].start, spans[1].stop))
                return self._guards[0].read(self._stored, box)
        part = self._array[key]
        # One thread: windows are small, and several workers read at once.
        found = np.asarray(part.compute(scheduler="synchronous") if hasattr(part, "compute") else part)
        check_sources(self._guards)
        return found


def regions_from_labels(sdata: SpatialData, key: str, ids: pd.Index, coordinate_system: str) -> LabelGrid:
    """Regions of a labels element in a coordinate system.

    Parameters
    ----------
    sdata
        The object to look in.
    key
        Name of the labels element.
    ids
        Labels of the regions.
    coordinate_system
        Where the regions are wanted.
    """
    return LabelGrid(_lazy(sdata.labels[key]), ids.to_numpy(), label_matrix(sdata, key, coordinate_system))


def label_ids(sdata: SpatialData, key: str) -> pd.Index:
    """Values of a labels element above the background's 0, ascending; negative ones are background too.

    Raises
    ------
    DataError
        If there is none, or they are not whole numbers.
    """
    labels = _lazy(sdata.labels[key])
    if labels.dtype.kind not in "biu":
        raise DataError(
            f"Labels {key!r} are of dtype {labels.dtype}, and regions are told by whole numbers. Make them such, for "
            "instance with element.astype('int32') where NaN and background are 0."
        )
    strips = (np.unique(labels[top : top + _STRIP_PX]) for top in range(0, labels.shape[0], _STRIP_PX))
    values = np.unique(np.concatenate([np.empty(0, np.int64), *(strip.astype(np.int64) for strip in strips)]))
    if (values < 0).any():
        logger.info("Labels %r: negative values, such as %d, are taken as background.", key, values[0])
    if not (values > 0).any():
        raise DataError(f"Labels {key!r} hold nothing but background (0 or less).")
    return pd.Index(values[values > 0])


def _lazy(element: Any) -> LazyLabels:
    return LazyLabels(scale0(element).transpose("y", "x").data)


def label_matrix(sdata: SpatialData, key: str, coordinate_system: str) -> NDArray[np.float64]:
    """Map of (x, y, 1) from the pixels of a labels element, pixel i covering [i, i + 1), to a coordinate system.

    The element's own transformation, but for labels that `spatialdata.rasterize_bins` made: as of version 0.8 it takes
    pixel (i, j), not (i + 0.5, j + 0.5), to the centre of a bin, so that the labels lie half a bin off the bins that
    they were made from. The bins, where they are still there, tell.
    """
    to_system = affine_matrix(sdata.labels[key], coordinate_system)
    if not _maps_index_to_centre(sdata, key, coordinate_system, to_system):
        return to_system
    logger.info("Labels %r: moved by half a label pixel, as rasterized bins need it.", key)
    return np.asarray(to_system @ np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]]))


def _maps_index_to_centre(sdata: SpatialData, key: str, system: str, to_system: NDArray[np.float64]) -> bool:
    """Whether bins of which these are the labels are a pixel wide and centred on whole label coordinates."""
    shapes = shapes_of(sdata).get(key.removesuffix("_labels"))
    if shapes is None or not key.endswith("_labels") or system not in coordinate_systems(shapes):
        return False
    sample = sample_shapes(shapes)
    xy = shapely.get_coordinates(shapely.centroid(sample.geometry.to_numpy()))
    to_labels = np.linalg.inv(to_system) @ affine_matrix(shapes, system)
    xy = xy @ to_labels[:2, :2].T + to_labels[:2, 2]
    side_px = edge_length(sample) * np.sqrt(abs(np.linalg.det(to_labels[:2, :2])))
    return bool(abs(side_px - 1) < _TOLERANCE and np.abs(xy - np.rint(xy)).max() < _TOLERANCE)


def sample_labels(element: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels of some pixels and the pixels' centres, from a few rows spread over a labels element.

    Parameters
    ----------
    element
        The labels element.

    Returns
    -------
    Labels, each once, shape (n,), and centres (x, y) in label pixels, shape (n, 2).
    """
    labels = _lazy(element)
    tops = np.unique(np.linspace(0, labels.shape[0] - 1, _SAMPLED_ROWS).astype(np.int64))
    rows = np.concatenate([labels[top : top + 1] for top in tops])
    row, col = np.nonzero(rows > 0)
    picked = sample_positions(len(row)) if len(row) else np.empty(0, np.int64)
    ids, first = np.unique(rows[row, col][picked].astype(np.int64), return_index=True)
    picked = picked[first]
    return ids, np.stack([col[picked], tops[row[picked]]], axis=1) + 0.5
