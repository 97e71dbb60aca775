"""Elements by name and place, ids of regions, and the rows of tables that annotate them.

Maps are 3 x 3 matrices of (x, y, 1); coordinates of a raster element are pixels of its scale 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
from numpy.typing import ArrayLike, NDArray
from spatialdata.transformations import get_transformation
from xarray import DataTree

from pixnet_sd._notes import memory_note, table_note
from pixnet_sd.errors import DataError, ElementError, ResolutionError

from ._stored import StoredShapes, obs_column, sample_shapes, shapes_of, tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

    from ._stored import Table

_ANISOTROPY_TOLERANCE = 1e-3
_GRID, _ENOUGH = 9, 500  # points along each side of labels, and of shapes in all
_XY = ("x", "y")
_CHUNK = 2**20


def scale0(element: Any) -> DataArray:
    """Full-resolution array of a single-scale or multiscale raster element."""
    return next(iter(element["scale0"].data_vars.values())) if isinstance(element, DataTree) else element


def coordinate_systems(element: Any) -> dict[str, Any]:
    """Coordinate systems of an element with the transformation to each, in the order of their names."""
    element = element.sample() if isinstance(element, StoredShapes) else element
    systems: dict[str, Any] = get_transformation(element, get_all=True)
    return dict(sorted(systems.items()))


def shared_systems(*elements: Any) -> list[str]:
    """Coordinate systems that all of some elements are in."""
    first, *others = map(coordinate_systems, elements)
    return [system for system in first if all(system in other for other in others)]


def names(keys: Iterable[str]) -> str:
    """Quoted, comma-separated names; the empty name, which readers do produce, stays visible."""
    return ", ".join(repr(key) for key in keys) or "none"


def region_element(sdata: SpatialData, key: str) -> Any:
    """The shapes (in memory or only in the store) or labels element of that name; `ElementError` if there is none."""
    shapes = shapes_of(sdata)
    if key in shapes:
        return shapes[key]
    if key in sdata.labels:
        return sdata.labels[key]
    raise ElementError(
        f"There is no shapes or labels element {key!r} in this SpatialData object. Shapes: {names(shapes)}. Labels: "
        f"{names(sdata.labels)}. Check shapes_key=."
    )


def written_by_pixnet(sdata: SpatialData) -> set[str]:
    """Names of the images and shapes that this package made: maps, and ``{table}_shapes`` of its tables."""
    maps = memory_note(sdata, "maps") or {}
    return {*maps, *(f"{key}_shapes" for key, table in tables_of(sdata).items() if table_note(table) is not None)}


def affine_matrix(element: Any, coordinate_system: str) -> NDArray[np.float64]:
    """Map, (3, 3), from an element's own coordinates to a coordinate system; `ElementError` if it is not in there."""
    systems = coordinate_systems(element)
    if coordinate_system not in systems:
        raise ElementError(
            f"The element has no transformation to coordinate system {coordinate_system!r}; it has {names(systems)}."
        )
    return np.asarray(systems[coordinate_system].to_affine_matrix(_XY, _XY), dtype=np.float64)


def similarity_scale(matrix: ArrayLike, what: str) -> float:
    """Length scale of a similarity, sqrt(abs(det A)); `ResolutionError`, which names ``what``, if it is none."""
    linear = np.asarray(matrix, dtype=np.float64)[:2, :2]
    if not np.isfinite(linear).all():
        raise ResolutionError(f"The transformation of {what} holds values that are not finite: {linear.tolist()}.")
    large, small = np.linalg.svd(linear, compute_uv=False)
    if small <= 0 or (large - small) / large > _ANISOTROPY_TOLERANCE:
        raise ResolutionError(
            f"The transformation of {what} scales its two axes differently or shears (singular values {large:.6g} and "
            f"{small:.6g}), so one number of micrometres per pixel does not exist. Only rotation, reflection, uniform "
            "scale and translation are supported: resample the element, or correct its transformation."
        )
    return float(np.sqrt(large * small))


def _corners_px(element: Any) -> NDArray[np.float64]:
    """Corners of a raster element, (4, 2) of (x, y)."""
    width, height = (scale0(element).sizes[axis] for axis in _XY)
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)


def moved(points: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) under a map of (x, y, 1)."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def image_extent(element: Any, coordinate_system: str) -> NDArray[np.float64]:
    """Corners of a raster element in a coordinate system, (4, 2)."""
    return moved(_corners_px(element), affine_matrix(element, coordinate_system))


def on_image(sdata: SpatialData, keys: Iterable[str], *, image_key: str, coordinate_system: str) -> list[str]:
    """Those elements of which some regions lie on an image; all of them if none does, for that is another error."""
    keys = list(keys)
    image = sdata.images[image_key]
    width, height = _corners_px(image)[2]
    to_system = affine_matrix(image, coordinate_system)
    if abs(np.linalg.det(to_system)) == 0 or not np.isfinite(to_system).all():
        return keys
    touching = []
    for key in keys:
        element = region_element(sdata, key)
        if key in sdata.labels:  # a grid of points
            size = _corners_px(element)[2]
            points = np.stack(np.meshgrid(*np.linspace(0, size, _GRID).T), axis=-1).reshape(-1, 2)
        else:  # centres of some
            geometry = sample_shapes(element).geometry.to_numpy()
            geometry = geometry[:: max(1, len(geometry) // _ENOUGH)]
            known = geometry[~(shapely.is_missing(geometry) | shapely.is_empty(geometry))]
            points = shapely.get_coordinates(shapely.centroid(known))
        x, y = moved(points, np.linalg.inv(to_system) @ affine_matrix(element, coordinate_system)).T
        if ((x >= 0) & (x <= width) & (y >= 0) & (y <= height)).any():
            touching.append(key)
    return touching or keys


def moved_px(image: Any, element: Any, systems: Sequence[str]) -> dict[str, float]:
    """By system, how many px of an image an element lies from where the first system puts it, where this is most."""
    corners = _corners_px(image)
    maps = {system: np.linalg.pinv(affine_matrix(image, system)) @ affine_matrix(element, system) for system in systems}
    places = moved(corners, np.asarray(np.linalg.pinv(maps[systems[0]]), np.float64))
    return {system: float(np.hypot(*(moved(places, matrix) - corners).T).max()) for system, matrix in maps.items()}


def plain_ids(ids: pd.Index, what: str, element_key: str) -> pd.Index:
    """Ids of an element as a table can hold them: whole numbers or text, each once; else `DataError` with a remedy."""
    if isinstance(ids, pd.CategoricalIndex):
        ids = ids.astype(ids.categories.dtype)
    inferred = "a MultiIndex" if isinstance(ids, pd.MultiIndex) else pd.api.types.infer_dtype(ids, skipna=False)
    if inferred == "integer" and ids.hasnans:
        inferred = "numbers"
    can_be_held = inferred in ("integer", "string", "empty")
    try:  # text of Python can hold halves of characters, which no file can
        for start in range(0, len(ids) if inferred == "string" else 0, _CHUNK):
            pa.array(ids[start : start + _CHUNK].to_numpy(), type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        can_be_held = False
    if not can_be_held:
        raise DataError(
            f"{what} {element_key!r}: a table names regions by whole numbers or by text, and the ids of these are "
            f"{inferred}, or some are missing (first: {ids[:1].tolist()[0]!r}). Give each its own: "
            f"{_remedy(ids, inferred, f'sdata[{element_key!r}]')}, and the ids in its tables alike."
        )
    if inferred == "integer":
        ids = ids.astype(np.uint64 if ids.max() > np.iinfo(np.int64).max else np.int64)
    check_unique(ids, f"{what} {element_key!r}")
    return pd.Index(ids.array, name=None)


def _remedy(ids: pd.Index, inferred: str, element: str) -> str:
    if inferred == "floating" and np.isfinite(values := ids.to_numpy(np.float64)).all() and (values % 1 == 0).all():
        return f"{element}.index = {element}.index.astype(int)"
    if inferred == "string":
        return f"{element}.index = [name.encode(errors='replace').decode() for name in {element}.index]"
    return f"{element}.index = {element}.index.map(str)"


def _are_ascending(ids: pd.Index) -> bool:
    """Whether these are ascending integers: so bins are numbered, and looking for doublets costs more than they do."""
    values = ids.to_numpy()
    return bool(np.issubdtype(values.dtype, np.integer) and (values[1:] > values[:-1]).all())


def check_unique(ids: pd.Index, what: str) -> None:
    """Refuse ids of which one occurs twice; pandas keeps the answer, so asking again costs nothing."""
    try:
        if _are_ascending(ids) or ids.is_unique:
            return
    except TypeError as error:
        raise DataError(f"{what}: ids such as {ids[0]!r} are neither numbers nor text.") from error
    twice = ids.duplicated()
    raise DataError(
        f"{what}: {int(twice.sum())} of {len(ids)} ids occurred before (first {ids[twice].tolist()[0]!r}), so regions "
        "and rows of a table cannot be matched. Make them unique."
    )


def check_instances(instances: pd.Index, table_key: str) -> None:
    """Refuse instance ids of a table that are missing, no ids, or not unique."""
    if _are_ascending(instances):
        return
    missing = int(np.count_nonzero(instances.isna()))
    if missing:
        raise DataError(f"Table {table_key!r} has {missing} rows without an instance id.")
    if pd.api.types.infer_dtype(instances, skipna=False) in ("mixed", "bytes", "complex"):
        raise DataError(f"Table {table_key!r} has instance ids that are neither numbers nor text.")
    check_unique(instances, f"Table {table_key!r}")


def same_ids(one: pd.Index, other: pd.Index) -> bool:
    """Whether two lists without doublets name the same regions, in any order."""
    return len(one) == len(other) and bool(np.array_equal(one.to_numpy(), other.to_numpy()) or one.isin(other).all())


@dataclass(frozen=True)
class TableLink:
    """Rows of a table that annotate one shapes or labels element."""

    table_key: str
    element_key: str
    rows: NDArray[np.int32]  # ascending
    instances: pd.Index  # id of each


def regions_of_table(table: Table) -> list[str]:
    """Elements that a table says it annotates."""
    region = table.uns.get("spatialdata_attrs", {}).get("region")
    return [region] if isinstance(region, str) else [str(name) for name in (region if region is not None else [])]


def placed_regions(sdata: SpatialData, regions: Iterable[str], coordinate_system: str | None) -> list[str]:
    """Those regions that are in the object and, if one is given, in the coordinate system."""
    elements = {**sdata.labels, **shapes_of(sdata)}
    return [
        name
        for name in regions
        if name in elements and (coordinate_system is None or coordinate_system in coordinate_systems(elements[name]))
    ]


def where_regions_are(sdata: SpatialData, regions: Iterable[str]) -> str:
    """Elements with the coordinate systems that each is in, for a message."""
    present = placed_regions(sdata, regions, None)
    return ", ".join(f"{key!r} is in {names(coordinate_systems(region_element(sdata, key)))}" for key in present)


def table_link(
    sdata: SpatialData, *, table_key: str, coordinate_system: str | None = None, element_key: str | None = None
) -> TableLink:
    """Find the element that a table annotates, of several `element_key` or that in the system, and the rows that do."""
    table = tables_of(sdata)[table_key]
    if table.n_obs == 0 or table.n_vars == 0:
        raise DataError(f"Table {table_key!r} is empty: {table.n_obs} rows x {table.n_vars} genes.")
    regions = regions_of_table(table)
    if element_key is None or element_key not in placed_regions(sdata, regions, None):
        element_key = _region_of(sdata, table_key, regions, coordinate_system)
    attrs = table.uns["spatialdata_attrs"]
    region = pd.Categorical(obs_column(table, attrs["region_key"]))  # millions of names would not fit
    code = region.categories.astype(str).get_indexer(pd.Index([element_key]))[0]
    rows = np.flatnonzero((region.codes == code) & (code >= 0)).astype(np.int32)
    if not len(rows):
        raise DataError(f"Table {table_key!r} has no row for its region {element_key!r}.")
    instances = obs_column(table, attrs["instance_key"])
    instances = pd.Index(instances if len(rows) == table.n_obs else instances[rows])
    check_instances(instances, table_key)
    if element_key in sdata.shapes:  # of what only the store has no id is read for this
        check_unique(sdata.shapes[element_key].index, f"Shapes {element_key!r}")
    return TableLink(table_key, element_key, rows, instances)


def _region_of(sdata: SpatialData, table_key: str, regions: list[str], coordinate_system: str | None) -> str:
    if not regions:
        raise ElementError(
            f"Table {table_key!r} annotates no region (no region in uns['spatialdata_attrs']). Link it with "
            "TableModel.parse(table, region=, region_key=, instance_key=)."
        )
    placed = placed_regions(sdata, regions, coordinate_system)
    if len(placed) == 1:
        return placed[0]
    if placed:
        raise ElementError(
            f"Table {table_key!r} annotates several elements on this slide: {names(placed)}. Split it by region, or "
            "give each its own coordinate system, and choose with coordinate_system=."
        )
    if not placed_regions(sdata, regions, None):
        raise ElementError(
            f"Table {table_key!r} annotates {names(regions)}, not in this SpatialData object. Shapes: "
            f"{names(shapes_of(sdata))}. Labels: {names(sdata.labels)}."
        )
    raise ElementError(
        f"Table {table_key!r} annotates {names(regions)}, but nothing in the slide's coordinate system "
        f"{coordinate_system!r}. Choose another with coordinate_system=: {where_regions_are(sdata, regions)}."
    )
