"""Names of regions: what a table can hold, each once.

Shapely geometries to regions, without a Python loop over them.

Labels elements to regions, read lazily.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Circles, LabelGrid, Polygons
from pixnet_sd.slide.image import check_sources, guards_of, stored_array

from ._elements import affine_matrix, coordinate_systems, scale0
from ._stored import sample_positions, sample_shapes, shapes_of

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = [
    "LazyLabels",
    "are_ascending",
    "check_instances",
    "check_unique",
    "edge_length",
    "label_ids",
    "label_matrix",
    "plain_ids",
    "polygons_from_shapely",
    "regions_from_labels",
    "regions_from_shapes",
    "sample_labels",
]

_CHUNK = 2**20
_NAMES = {
    "floating": "numbers with a fraction, or missing",
    "mixed-integer": "numbers and text mixed, or missing",
    "mixed-integer-float": "numbers with and without a fraction",
    "mixed": "of several kinds, or missing",
    "boolean": "True and False",
}
"""What `pandas.api.types.infer_dtype` calls them; others are said as they are called."""


def are_ascending(ids: pd.Index) -> bool:
    """Whether these are ascending integers: so bins are numbered, and looking for doublets costs more than they do."""
    values = ids.to_numpy()
    return bool(np.issubdtype(values.dtype, np.integer) and (values[1:] > values[:-1]).all())


def plain_ids(ids: pd.Index, what: str, element_key: str) -> pd.Index:
    """Ids of an element as a table can hold them: whole numbers or text, each once, the index itself without a name.

    Parameters
    ----------
    ids
        As the element has them.
    what
        Kind of the element, for messages.
    element_key
        Its name.

    Raises
    ------
    DataError
        They are anything else, or not unique. Told here, before a network has run for them.
    """
    if isinstance(ids, pd.CategoricalIndex):
        ids = ids.astype(ids.categories.dtype)
    kind = _kind(ids)
    name = f"{what} {element_key!r}"
    if kind not in ("integer", "string", "empty") or (kind == "string" and not _can_be_written(ids)):
        raise DataError(
            f"{name}: a table names regions by whole numbers or by text, and the ids of these are "
            f"{_NAMES.get(kind, kind)} (first: {ids[:1].tolist()[0]!r}). {_remedy(ids, kind, element_key)}"
        )
    if kind == "integer":
        ids = ids.astype(np.uint64 if ids.max() > np.iinfo(np.int64).max else np.int64)
    check_unique(ids, name)
    return pd.Index(ids.array, name=None)


def _kind(ids: pd.Index) -> str:
    """What all of them are, in pandas' words."""
    if isinstance(ids, pd.MultiIndex):
        return "a MultiIndex"
    kind = pd.api.types.infer_dtype(ids, skipna=False)
    return "numbers, some of them missing" if kind == "integer" and ids.hasnans else kind


def _can_be_written(ids: pd.Index) -> bool:
    """Whether text is text: Python's can hold halves of characters, which no file can."""
    try:
        for start in range(0, len(ids), _CHUNK):
            pa.array(ids[start : start + _CHUNK].to_numpy(), type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        return False
    return True


def _remedy(ids: pd.Index, kind: str, element_key: str) -> str:
    element = f"sdata[{element_key!r}]"
    if kind == "floating" and np.isfinite(values := ids.to_numpy(np.float64)).all() and (values % 1 == 0).all():
        change = f"{element}.index = {element}.index.astype(int)"
    elif kind == "string":
        change = f"{element}.index = [name.encode(errors='replace').decode() for name in {element}.index]"
    else:
        change = f"{element}.index = {element}.index.map(str)"
    return f"Give each its own: {change}, and the ids in its tables alike."


def check_unique(ids: pd.Index, what: str) -> None:
    """Refuse ids of which one occurs twice; pandas keeps the answer, so asking again costs nothing.

    Raises
    ------
    DataError
        Saying how many and which.
    """
    try:
        if are_ascending(ids) or ids.is_unique:
            return
    except TypeError as error:
        raise DataError(f"{what}: ids such as {ids[0]!r} are neither numbers nor text.") from error
    twice = ids.duplicated()
    raise DataError(
        f"{what}: {int(twice.sum())} of {len(ids)} ids occurred before (first {ids[twice].tolist()[0]!r}), so rows of "
        "a table cannot be matched. Make the index unique."
    )


def check_instances(instances: pd.Index, table_key: str) -> None:
    """Refuse instance ids of a table that are missing, no ids, or not unique.

    Raises
    ------
    DataError
        Saying how many and which.
    """
    if are_ascending(instances):
        return
    missing = int(np.count_nonzero(instances.isna()))
    if missing:
        raise DataError(f"Table {table_key!r} has {missing} rows without an instance id.")
    if not _are_hashable(instances):
        raise DataError(f"Table {table_key!r} has instance ids that are neither numbers nor text.")
    twice = instances.duplicated()
    if twice.any():
        raise DataError(
            f"Table {table_key!r} has {int(twice.sum())} rows whose instance id occurred before "
            f"(first {instances[twice].tolist()[0]!r}): one row a region is needed."
        )


def _are_hashable(ids: pd.Index) -> bool:
    return pd.api.types.infer_dtype(ids, skipna=False) not in ("mixed", "bytes", "complex")


_POINT, _POLYGON, _MULTIPOLYGON = 0, 3, 6
_FIRST = 5


def regions_from_shapes(shapes: GeoDataFrame, what: str) -> Circles | Polygons:
    """Circles (points with a radius) or polygons of a shapes element, in its own coordinates and order.

    Parameters
    ----------
    shapes
        The element.
    what
        Its name, for messages.

    Returns
    -------
    One region a row.

    Raises
    ------
    DataError
        If the element is empty, mixes kinds, or holds geometries that are missing, empty, invalid or not finite.
    """
    geometry = shapes.geometry.to_numpy()
    if not len(geometry):
        raise DataError(f"{what} is empty.")
    index = shapes.index
    _refuse(shapely.is_missing(geometry) | shapely.is_empty(geometry), index, what, "missing or empty", "Drop them.")
    kind = shapely.get_type_id(geometry)
    if (kind == _POINT).all():
        return _circles(shapes, geometry, what)
    other = ~np.isin(kind, (_POLYGON, _MULTIPOLYGON))
    _refuse(other, index, what, "neither polygons nor multipolygons", "Keep one kind: circles or polygons.")
    _refuse(~_finite(geometry), index, what, "with coordinates that are NaN or infinite", "Drop or correct them.")
    invalid = ~shapely.is_valid(geometry)
    _refuse(invalid, index, what, "invalid (self-intersecting?)", "Repair them, for instance with geometry.buffer(0).")
    return polygons_from_shapely(geometry)


def _refuse(bad: NDArray[np.bool_], index: pd.Index, what: str, fault: str, remedy: str) -> None:
    if bad.any():
        first = ", ".join(repr(name) for name in index[bad][:_FIRST].tolist())
        raise DataError(f"{what}: {int(bad.sum())} of {len(bad)} geometries are {fault} (first: {first}). {remedy}")


def _finite(geometry: NDArray[Any]) -> NDArray[np.bool_]:
    coordinates, owner = shapely.get_coordinates(geometry, return_index=True)
    finite = np.ones(len(geometry), dtype=bool)
    finite[owner[~np.isfinite(coordinates).all(axis=1)]] = False
    return finite


def _circles(shapes: GeoDataFrame, geometry: NDArray[Any], what: str) -> Circles:
    if "radius" not in shapes:
        raise DataError(f"{what} holds points without a column 'radius', so their extent is unknown.")
    radius = shapes["radius"].to_numpy(dtype=np.float64)
    bad = ~_finite(geometry)
    _refuse(bad, shapes.index, what, "with coordinates that are NaN or infinite", "Drop or correct them.")
    unsized = np.asarray(~((radius > 0) & np.isfinite(radius)))
    _refuse(unsized, shapes.index, what, "circles without a positive radius", "Drop or correct them.")
    return Circles(shapely.get_coordinates(geometry), radius)


def edge_length(shapes: GeoDataFrame) -> float:
    """Median side of squares, or width of circles, in their own units."""
    if "radius" in shapes:
        return float(2 * np.median(shapes["radius"]))
    return float(np.sqrt(np.median(shapely.area(shapes.geometry.to_numpy()))))


def polygons_from_shapely(geometry: NDArray[Any]) -> Polygons:
    """Polygons and multipolygons, with their holes, as regions.

    Parameters
    ----------
    geometry
        Valid polygons and multipolygons, shape (n,).

    Returns
    -------
    One region a geometry: outer rings wound one way, holes the other, none repeating its first vertex.
    """
    rings, region = _rings(geometry)
    vertices, ring = shapely.get_coordinates(rings, return_index=True)
    last = np.append(ring[1:] != ring[:-1], True)
    sizes = np.bincount(ring[~last], minlength=len(rings))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Polygons(vertices[~last], offsets, region, len(geometry))


def _rings(geometry: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All rings, outer ones wound one way and holes the other, and the geometry that each belongs to."""
    if (shapely.get_type_id(geometry) == _POLYGON).all() and not shapely.get_num_interior_rings(geometry).any():
        return shapely.get_exterior_ring(geometry), np.arange(len(geometry))  # millions of bins: half the time
    parts, region = shapely.get_parts(shapely.orient_polygons(geometry), return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    return rings, region[part].astype(np.int64)


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
