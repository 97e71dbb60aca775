"""Bins as points of a lattice, from the indices in their table, without a polygon of each.

A table of Visium HD bins says in ``array_row`` and ``array_col`` where on a square lattice each bin lies. Some thousand
centres are enough to find where the lattice lies on the slide, and to see that the indices explain them.

Physical bins are the squares of that lattice, turned as it is, and so are the regions here. Readers draw them with
sides along the axes, as circles, or as label pixels, all about the same centres.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray

from pixnet_sd._errors import DataError, ElementError
from pixnet_sd.nn.lattice import Lattice

from ._ids import check_unique
from ._labels import label_matrix, sample_labels
from ._shapes import edge_length
from ._stored_shapes import sample_shapes, shapes_of
from ._stored_table import obs_column, obs_names, tables_of
from ._tables import TableLink, table_link
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ._stored_table import Table

__all__ = [
    "FEWEST_BINS",
    "Bins",
    "bins_of_element",
    "bins_of_table",
    "fit_lattice",
    "lattice_pitch",
    "pitch_of_element",
    "same_ids",
]

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
