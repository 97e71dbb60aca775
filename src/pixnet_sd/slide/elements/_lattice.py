"""Which tables hold the measured expression, and which of their rows belong to which element.

Bins as points of a lattice, from the indices in their table, without a polygon of each.

A table of Visium HD bins says in ``array_row`` and ``array_col`` where on a square lattice each bin lies. Some thousand
centres are enough to find where the lattice lies on the slide, and to see that the indices explain them.

Physical bins are the squares of that lattice, turned as it is, and so are the regions here. Readers draw them with
sides along the axes, as circles, or as label pixels, all about the same centres.

Visium HD bins: lattices of touching squares by their geometry, of which a name tells no more than the side in µm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray

from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.geometry import Lattice

from ._elements import affine_matrix, coordinate_systems, names, region_element, scale0
from ._shapes import LazyLabels, check_instances, check_unique, edge_length, label_matrix, sample_labels
from ._stored import (
    StoredShapes,
    neighbouring_shapes,
    obs_column,
    obs_names,
    sample_positions,
    sample_shapes,
    shapes_of,
    tables_of,
)

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

    from ._stored import Table

__all__ = [
    "FEWEST_BINS",
    "BinLattice",
    "Bins",
    "TableLink",
    "bin_lattice",
    "bin_size_um",
    "bins_of_element",
    "bins_of_table",
    "fit_lattice",
    "grid_pitch",
    "lattice_pitch",
    "pitch_of_element",
    "placed_regions",
    "regions_of_table",
    "same_ids",
    "table_link",
    "where_regions_are",
]

_BIN_NAME = re.compile(r"_(\d{3})um(?:_labels)?$")
_BIN_SIZES_UM = range(2, 101, 2)  # those that Space Ranger makes


@dataclass(frozen=True)
class TableLink:
    """Rows of a table that annotate one element.

    Attributes
    ----------
    table_key, element_key
        Names of the table and of the shapes or labels element.
    rows
        Positions of the rows in the table, ascending, shape (n,).
    instances
        Instance id of each of these rows.
    """

    table_key: str
    element_key: str
    rows: NDArray[np.int32]
    instances: pd.Index


def bin_size_um(element_key: str) -> int | None:
    """Side in µm that an element has if it is one of Visium HD bins, from its name; whether it is, its geometry tells.

    See `bin_lattice`.
    """
    match = _BIN_NAME.search(element_key)
    return int(match[1]) if match and int(match[1]) in _BIN_SIZES_UM else None


def _attrs(table: Table) -> dict[str, Any]:
    attrs: dict[str, Any] = table.uns.get("spatialdata_attrs", {})
    return attrs


def regions_of_table(table: Table) -> list[str]:
    """Elements that a table says it annotates."""
    region = _attrs(table).get("region")
    return [region] if isinstance(region, str) else [str(name) for name in (region if region is not None else [])]


def placed_regions(sdata: SpatialData, regions: list[str], coordinate_system: str | None) -> list[str]:
    """Those regions that are in the object and in the coordinate system."""
    shapes = shapes_of(sdata)
    there = [name for name in regions if name in shapes or name in sdata.labels]
    if coordinate_system is None:
        return there
    return [name for name in there if coordinate_system in coordinate_systems(region_element(sdata, name))]


def table_link(
    sdata: SpatialData, *, table_key: str, coordinate_system: str | None = None, element_key: str | None = None
) -> TableLink:
    """The element that a table annotates, and the rows that do.

    Parameters
    ----------
    sdata
        The object to look in.
    table_key
        Name of the table.
    coordinate_system
        Where the slide is. Of a table that annotates several elements, the rows of the one there are taken.
    element_key
        The element whose rows are wanted; where the table does not annotate it, that of the coordinate system is taken.

    Returns
    -------
    The link.

    Raises
    ------
    ElementError
        If the table has no region, the region is not there, or several are.
    DataError
        If the table has no rows for it, or an id of the table or of the shapes is missing or occurs twice.
    """
    table = tables_of(sdata)[table_key]
    if table.n_obs == 0 or table.n_vars == 0:
        raise DataError(f"Table {table_key!r} is empty: {table.n_obs} rows x {table.n_vars} genes.")
    if element_key is None or element_key not in placed_regions(sdata, regions_of_table(table), None):
        element_key = _region_of(sdata, table_key, regions_of_table(table), coordinate_system)
    attrs = _attrs(table)
    rows = np.flatnonzero(_annotates(obs_column(table, attrs["region_key"]), element_key)).astype(np.int32)
    if not len(rows):
        raise DataError(f"Table {table_key!r} has no row for its region {element_key!r}.")
    instances = obs_column(table, attrs["instance_key"])
    instances = pd.Index(instances if len(rows) == table.n_obs else instances[rows])
    check_instances(instances, table_key)
    if element_key in sdata.shapes:  # of what only the store has no id is read for this
        check_unique(sdata.shapes[element_key].index, f"Shapes {element_key!r}")
    return TableLink(table_key, element_key, rows, instances)


def _annotates(region: Any, element_key: str) -> NDArray[np.bool_]:
    """Which rows name the element; of a category's codes, for millions of names would not fit."""
    if isinstance(region, pd.Categorical):
        code = region.categories.astype(str).get_indexer(pd.Index([element_key]))[0]
        return np.asarray((region.codes == code) & (code >= 0))
    return np.asarray(pd.Series(region).astype(str) == element_key)


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
    shapes = shapes_of(sdata)
    if not any(name in shapes or name in sdata.labels for name in regions):
        found = f"Shapes: {names(shapes)}. Labels: {names(sdata.labels)}."
        raise ElementError(f"Table {table_key!r} annotates {names(regions)}, not in this SpatialData object. {found}")
    raise ElementError(
        f"Table {table_key!r} annotates {names(regions)}, but nothing in the slide's coordinate system "
        f"{coordinate_system!r}. Choose another with coordinate_system=: {where_regions_are(sdata, regions)}."
    )


def where_regions_are(sdata: SpatialData, regions: Iterable[str]) -> str:
    """Elements with the coordinate systems that each is in."""
    return ", ".join(
        f"{key!r} is in {names(coordinate_systems(region_element(sdata, key)))}"
        for key in placed_regions(sdata, list(regions), None)
    )


_INDICES = ("array_row", "array_col")
_RESIDUAL = 0.1  # of the pitch: an index that does not explain the centres is not their lattice
_SQUARE = 0.05  # by how much axes may differ in length or from a right angle, and a bin's side from the pitch
_CHUNK = 2**20
FEWEST_BINS = 9  # fewer points lie on some lattice by chance


@dataclass(frozen=True, eq=False)
class Bins:
    """Bins that a table measures, in row-major order of their lattice.

    Attributes
    ----------
    lattice
        n squares, in the coordinates that were asked for.
    rows
        Row of the table of each bin, shape (n,).
    instances
        Instance id of each bin.
    """

    lattice: Lattice
    rows: NDArray[np.int32]
    instances: pd.Index


def bins_of_table(
    sdata: SpatialData, link: TableLink, *, coordinate_system: str, from_system: ArrayLike
) -> Bins | None:
    """Bins that the rows of a table annotate, if its indices are those of a lattice of touching squares.

    Parameters
    ----------
    sdata
        The object to look in.
    link
        The table, its element, and the rows that annotate it.
    coordinate_system
        Coordinate system that the element shares with the slide.
    from_system
        Map of (x, y, 1) from there to the pixels wanted, shape (3, 3).

    Returns
    -------
    The bins; None if the table has no indices, or they do not explain where a sample of the bins lies.
    """
    row, col = _indices(sdata, link)
    if row is None or col is None:
        return None
    to_centre, side = _fit(sdata, link, row, col)
    if to_centre is None or not _is_square(to_centre, side):
        return None
    to_element = to_centre @ np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
    order = _row_major(row, col)
    if order is not None:
        row, col = row[order], col[order]
    if ((row[1:] == row[:-1]) & (col[1:] == col[:-1])).any():
        return None
    matrix = np.asarray(from_system, np.float64) @ _to_system(sdata, link.element_key, coordinate_system) @ to_element
    rows, instances = (link.rows, link.instances) if order is None else (link.rows[order], link.instances[order])
    return Bins(Lattice(row, col, matrix), rows, instances)


def bins_of_element(
    sdata: SpatialData, element_key: str, ids: pd.Index | None, *, coordinate_system: str, from_system: ArrayLike
) -> Bins | None:
    """All bins of an element, from a table that annotates every one of them.

    Parameters
    ----------
    sdata
        The object to look in.
    element_key
        Name of the shapes or labels.
    ids
        Names of all of its regions; None if they are too dear to be had, and the table's are all that is wanted.
    coordinate_system, from_system
        As in `bins_of_table`.

    Returns
    -------
    The bins; None if there is no such table.
    """
    for link in _links(sdata, element_key, coordinate_system):
        if ids is None or same_ids(ids, link.instances):
            bins = bins_of_table(sdata, link, coordinate_system=coordinate_system, from_system=from_system)
            if bins is not None:
                return bins
    return None


def pitch_of_element(sdata: SpatialData, element_key: str) -> float | None:
    """Pitch of a shapes element's lattice of touching squares, in its own units, from a table with indices."""
    for link in _links(sdata, element_key, None):
        row, col = _indices(sdata, link)
        if row is not None and col is not None and len(row) >= FEWEST_BINS:
            matrix, side = _fit(sdata, link, row, col)
            return None if matrix is None or not _is_square(matrix, side) else lattice_pitch(matrix)
    return None


def _links(sdata: SpatialData, element_key: str, coordinate_system: str | None) -> Iterator[TableLink]:
    """Tables with lattice indices that annotate an element."""
    for key, table in tables_of(sdata).items():
        if not set(_INDICES) <= obs_names(table):
            continue
        try:
            link = table_link(sdata, table_key=key, coordinate_system=coordinate_system, element_key=element_key)
        except (ElementError, DataError):
            continue
        if link.element_key == element_key:
            yield link


def _indices(sdata: SpatialData, link: TableLink) -> tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]:
    table = tables_of(sdata)[link.table_key]
    if not set(_INDICES) <= obs_names(table):
        return None, None
    row, col = (_index_column(table, name, link.rows) for name in _INDICES)
    return row, col


def same_ids(one: pd.Index, other: pd.Index) -> bool:
    """Whether two lists without doublets name the same regions, in any order."""
    if len(one) != len(other):
        return False
    return bool(np.array_equal(one.to_numpy(), other.to_numpy()) or one.isin(other).all())


def _index_column(table: Table, name: str, rows: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Lattice indices of some rows; None where they are not whole numbers."""
    column = pd.Series(obs_column(table, name))
    if not pd.api.types.is_numeric_dtype(column) or column.isna().any():
        return None
    values = column.to_numpy()
    index = values.astype(np.int32)
    if not np.array_equal(index, values):
        return None
    return index if len(rows) == len(index) else index[rows]


def _row_major(row: NDArray[np.int32], col: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Order of the points by row, then column; None if they are in it."""
    after = row[1:] > row[:-1]
    after |= (row[1:] == row[:-1]) & (col[1:] >= col[:-1])
    return None if after.all() else np.lexsort((col, row)).astype(np.int32)


def _to_system(sdata: SpatialData, element_key: str, coordinate_system: str) -> NDArray[np.float64]:
    if element_key in sdata.labels:
        return label_matrix(sdata, element_key, coordinate_system)
    return affine_matrix(shapes_of(sdata)[element_key], coordinate_system)


def _fit(
    sdata: SpatialData, link: TableLink, row: NDArray[np.int32], col: NDArray[np.int32]
) -> tuple[NDArray[np.float64] | None, float]:
    """Map of (column, row, 1) to centres in the element's coordinates, and the side of its regions there."""
    ids, xy, side = _sample(sdata, link.element_key)
    place, which = _look_up(ids, link.instances)
    return fit_lattice(np.stack([col[place], row[place]], axis=1), xy[which]), side


def _sample(sdata: SpatialData, element_key: str) -> tuple[pd.Index, NDArray[np.float64], float]:
    """Ids and centres of some regions, and their side (their width, of circles)."""
    if element_key in sdata.labels:
        ids, xy = sample_labels(sdata.labels[element_key])
        return pd.Index(ids), xy, 1.0
    shapes = sample_shapes(shapes_of(sdata)[element_key])
    check_unique(shapes.index, f"Shapes {element_key!r}")
    xy = shapely.get_coordinates(shapely.centroid(shapes.geometry.to_numpy()))
    return shapes.index, xy, edge_length(shapes)


def _look_up(ids: pd.Index, instances: pd.Index) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where those of the sampled ids that are among the instances are, and which these are."""
    places, found = [], []
    for start in range(0, len(instances), _CHUNK):
        which = ids.get_indexer(instances[start : start + _CHUNK])
        place = np.flatnonzero(which >= 0)
        places.append(place + start)
        found.append(which[place])
    return np.concatenate(places), np.concatenate(found)


def _is_square(matrix: NDArray[np.float64], side: float) -> bool:
    """Whether a lattice's cells are squares of that side: those of Visium spots, which do not touch, are not."""
    x, y = matrix[:2, 0], matrix[:2, 1]
    a, b = np.hypot(*x), np.hypot(*y)
    return bool(abs(a / b - 1) < _SQUARE and abs(x @ y) < _SQUARE * a * b and abs(side / np.sqrt(a * b) - 1) < _SQUARE)


def fit_lattice(col_row: ArrayLike, xy: ArrayLike) -> NDArray[np.float64] | None:
    """Map of (column, row, 1) to the centres of a lattice's points, by least squares.

    Parameters
    ----------
    col_row
        Indices, shape (n, 2).
    xy
        Centres, shape (n, 2).

    Returns
    -------
    Matrix, shape (3, 3); None if the indices do not span the plane or leave a centre more than a tenth of the pitch
    off.
    """
    points, centres = np.asarray(col_row, np.float64), np.asarray(xy, np.float64)
    design = np.column_stack([points, np.ones(len(points))])
    solution, _, rank, _ = np.linalg.lstsq(design, centres, rcond=None)
    if rank < 3:
        return None
    matrix = np.eye(3)
    matrix[:2] = solution.T
    residual = float(np.abs(design @ solution - centres).max())
    return matrix if residual <= _RESIDUAL * lattice_pitch(matrix) else None


def lattice_pitch(matrix: NDArray[np.float64]) -> float:
    """Distance of neighbouring points: sqrt(abs(det A))."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


_TOLERANCE = 0.05  # of a side: what neighbours may be off
_OFF_LATTICE = 0.1  # of a side: what a neighbour may lie beside a lattice point
_TOUCHING = 0.5  # share of bins that touch another
_ALONG = 0.05  # share of the touching pairs that each axis has at least
_NEIGHBOURS = 8
_SQUARE_BINS = 16.0  # perimeter² / area
_MOST_INDEXED = 2**18  # shapes up to which the indices of a table cost nothing
_STRIPS = 16


@dataclass(frozen=True)
class BinLattice:
    """A lattice of touching squares.

    Attributes
    ----------
    key
        Name of the shapes or labels element.
    size_um
        Side of a square, from that name.
    pitch
        Side in the element's own coordinates.
    how
        How it was found, for a message.
    """

    key: str
    size_um: int
    pitch: float
    how: str


def bin_lattice(sdata: SpatialData, key: str, *, exact: bool = False) -> BinLattice | None:
    """The lattice of an element that is named as Visium HD bins are (``_008um``), if it is one of touching squares.

    Parameters
    ----------
    sdata
        The object to look in.
    key
        Name of a shapes or labels element.
    exact
        Whether the pitch is wanted to more than a thousandth, which takes all indices of a table.

    Returns
    -------
    The lattice; None for circles of interest, cells, fields of view and whatever else may be named so.
    """
    size = bin_size_um(key)
    if size is None:
        return None
    if key in sdata.labels:
        side = _one_pixel_each(sdata, key)
        return None if side is None else BinLattice(key, size, side, f"{size} µm label pixels of {key!r}")
    shapes = shapes_of(sdata)
    if key not in shapes or len(shapes[key]) < FEWEST_BINS:
        return None
    drawn = shapes[key]
    check_unique((drawn.sample if isinstance(drawn, StoredShapes) else drawn).index, f"Shapes {key!r}")
    indexed_first = exact or len(shapes[key]) <= _MOST_INDEXED
    for is_indexed in (indexed_first, not indexed_first):
        pitch = pitch_of_element(sdata, key) if is_indexed else _drawn_pitch(neighbouring_shapes(shapes[key]))
        if pitch is not None:
            what = "lattice pitch" if is_indexed else "neighbour distance"
            return BinLattice(key, size, pitch, f"{what} of the {size} µm bins {key!r}")
    return None


def _drawn_pitch(shapes: GeoDataFrame) -> float | None:
    """Pitch of shapes that are squares, or circles as wide, of one size and touching on a square lattice."""
    geometry = shapes.geometry.to_numpy()
    if len(geometry) < FEWEST_BINS or not _are_equal_squares(shapes):
        return None
    return grid_pitch(shapely.get_coordinates(shapely.centroid(geometry)), edge_length(shapes))


def _are_equal_squares(shapes: GeoDataFrame) -> bool:
    some = shapes.iloc[sample_positions(len(shapes))]
    if "radius" in some:
        side = 2 * some["radius"].to_numpy(np.float64)
    else:
        geometry = some.geometry.to_numpy()
        area = shapely.area(geometry)
        if not (area > 0).all() or np.abs(shapely.length(geometry) ** 2 / area / _SQUARE_BINS - 1).max() > _TOLERANCE:
            return False
        side = np.sqrt(area)
    return bool(side.min() > 0 and side.max() / side.min() - 1 < _TOLERANCE)


def grid_pitch(xy: NDArray[np.float64], side: float) -> float | None:
    """Distance of neighbours, if points lie on a square lattice whose pitch is the side of what is drawn about them.

    Parameters
    ----------
    xy
        Points, shape (n, 2); gaps do not matter as long as half of them have a neighbour.
    side
        Side of a square.
    """
    from scipy.spatial import cKDTree

    if not np.isfinite(xy).all():
        return None
    some = xy[sample_positions(len(xy))]
    distance, which = cKDTree(xy).query(some, k=min(_NEIGHBOURS + 1, len(xy)))
    step = (xy[which[:, 1:]] - some[:, None]) @ np.array([1, 1j])
    touches = np.abs(distance[:, 1:] / side - 1) < _TOLERANCE
    if touches.any(axis=1).mean() < _TOUCHING or distance[:, 1].min() < side * (1 - _TOLERANCE):
        return None
    pitch = float(np.abs(step[touches]).mean())
    quarter = ((step[touches] / np.abs(step[touches])) ** 4).mean()  # turns by 90° coincide
    grid = step * np.exp(-0.25j * np.angle(quarter)) / pitch
    along = np.abs(grid[touches].real).round().mean()
    if not _ALONG < along < 1 - _ALONG:
        return None
    near = grid[distance[:, 1:] < 2.5 * side]
    off = np.maximum(np.abs(near.real - near.real.round()), np.abs(near.imag - near.imag.round()))
    return pitch if np.mean(off < _OFF_LATTICE) > 1 - _ALONG / 5 else None


def _one_pixel_each(sdata: SpatialData, key: str) -> float | None:
    """1, the side of a label pixel, if every region of a labels element is one pixel and touches others."""
    labels = LazyLabels(scale0(sdata.labels[key]).transpose("y", "x").data)
    tops = np.unique(np.linspace(0, max(0, labels.shape[0] - 2), _STRIPS).astype(int) // 2 * 2)
    rows = np.concatenate([labels[top : top + 2] for top in tops])
    filled = rows[rows != 0]
    if len(filled) < FEWEST_BINS or len(np.unique(filled)) < len(filled):
        return None
    touching = (rows[:, 1:] != 0) & (rows[:, :-1] != 0)
    return 1.0 if touching.sum() >= _TOUCHING * len(filled) / 2 else None
