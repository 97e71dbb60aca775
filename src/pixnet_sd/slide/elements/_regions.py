"""Regions of any element in the pixels of a slide; Visium HD bins as points of a lattice, without a polygon of each.

``array_row`` and ``array_col`` of a table say where on a square lattice each bin lies; some thousand centres tell where
the lattice lies, and that the indices explain them. Bins are its squares, turned as it is, although readers draw them
along the axes, as circles or as label pixels. A name (``_008um``) tells the side in µm; geometry, whether it is a bin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import shapely
from geopandas import GeoDataFrame
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons

from ._elements import (
    TableLink,
    affine_matrix,
    check_unique,
    plain_ids,
    region_element,
    same_ids,
    similarity_scale,
    table_link,
)
from ._shapes import (
    HALF_PIXEL_BACK,
    edge_lengths,
    label_ids,
    label_matrix,
    lazy_labels,
    regions_from_shapes,
    sample_labels,
)
from ._stored import (
    StoredShapes,
    neighbouring_shapes,
    obs_column,
    sample_positions,
    sample_shapes,
    shapes_of,
    tables_of,
)

_MANY_SHAPES = 1_000_000
_BIN_NAME = re.compile(r"_(\d{3})um(?:_labels)?$")
_BIN_SIZES_UM = range(2, 101, 2)  # those that Space Ranger makes
_INDICES = ("array_row", "array_col")
_FEWEST_BINS = 9  # fewer points lie on some lattice by chance
_RESIDUAL = 0.1  # of the pitch: an index that does not explain the centres is not their lattice
_SQUARE = 0.05  # by how much axes may differ in length or from a right angle, and a bin's side from the pitch
_TOLERANCE = 0.05  # of a side: what neighbours may be off
_OFF_LATTICE = 0.1  # of a side: what a neighbour may lie beside a lattice point
_TOUCHING = 0.5  # share of bins that touch another
_ALONG = 0.05  # share of the touching pairs that each axis has at least
_NEIGHBOURS = 8
_SQUARE_BINS = 16.0  # perimeter² / area
_MOST_INDEXED = 2**18  # shapes up to which the indices of a table cost nothing
_STRIPS = 16  # pairs of rows of label pixels that are looked at


def regions_of(
    sdata: SpatialData, element_key: str, *, coordinate_system: str, from_system: ArrayLike
) -> tuple[Lattice | Circles | Polygons | LabelGrid, pd.Index]:
    """Regions of a shapes or labels element, and their ids in the same order: the index of shapes, values of labels.

    They are in the pixels to which ``from_system``, (3, 3), maps the coordinate system. Bins of which a table tells the
    lattice are its squares in row-major order; the rest is taken as drawn, in its own order.
    """
    element = region_element(sdata, element_key)
    to_system = affine_matrix(element, coordinate_system)
    similarity_scale(to_system, f"element {element_key!r}")
    is_labels = element_key in sdata.labels
    drawn = label_ids(sdata, element_key) if is_labels else element.index
    ids = plain_ids(drawn, "Labels" if is_labels else "Shapes", element_key)
    for link in _links(sdata, element_key, coordinate_system):
        if same_ids(ids, link.instances):
            bins = bins_of_table(sdata, link, coordinate_system=coordinate_system, from_system=from_system)
            if bins is not None:
                return bins.lattice, bins.instances
    if is_labels:
        matrix = label_matrix(sdata, element_key, coordinate_system)
        return LabelGrid(lazy_labels(element), ids.to_numpy(), matrix).transform(from_system), ids
    if len(element) > _MANY_SHAPES:
        logger.warning(
            "shapes %r: %.1f million shapes are taken as polygons, which takes gigabytes; no table has the "
            "array_row and array_col that would tell their lattice.",
            *(element_key, len(element) / 1e6),
        )
    shapes = element.load() if isinstance(element, StoredShapes) else element
    regions = regions_from_shapes(shapes, f"Shapes {element_key!r}")
    return regions.transform(np.asarray(from_system, dtype=np.float64) @ to_system), ids


class Bins(NamedTuple):
    """Bins that a table measures, in row-major order of their lattice: squares, rows of the table, instance ids."""

    lattice: Lattice
    rows: NDArray[np.int32]
    instances: pd.Index


def bins_of_table(
    sdata: SpatialData, link: TableLink, *, coordinate_system: str, from_system: ArrayLike
) -> Bins | None:
    """Bins that rows of a table annotate; None if it has no indices that explain where a sample of the bins lies."""
    fitted = _fitted(sdata, link)
    if fitted is None:
        return None
    (to_centre, row, col), rows, instances = fitted, link.rows, link.instances
    after = row[1:] > row[:-1]
    after |= (row[1:] == row[:-1]) & (col[1:] >= col[:-1])
    if not after.all():
        order = np.lexsort((col, row)).astype(np.int32)
        row, col, rows, instances = row[order], col[order], rows[order], instances[order]
    if ((row[1:] == row[:-1]) & (col[1:] == col[:-1])).any():
        return None
    if link.element_key in sdata.labels:
        to_system = label_matrix(sdata, link.element_key, coordinate_system)
    else:
        to_system = affine_matrix(shapes_of(sdata)[link.element_key], coordinate_system)
    matrix = np.asarray(from_system, np.float64) @ to_system @ to_centre @ HALF_PIXEL_BACK
    return Bins(Lattice(row, col, matrix), rows, instances)


def _links(sdata: SpatialData, element_key: str, coordinate_system: str | None) -> Iterator[TableLink]:
    """Tables with lattice indices that annotate an element."""
    for key, table in tables_of(sdata).items():
        if not set(_INDICES) <= set(table.obs.columns):
            continue
        with suppress(ElementError, DataError):
            link = table_link(sdata, table_key=key, coordinate_system=coordinate_system, element_key=element_key)
            if link.element_key == element_key:
                yield link


def _fitted(
    sdata: SpatialData, link: TableLink
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]] | None:
    """Map of (column, row, 1) to centres, and row and column of each row of a link; None if of no touching squares."""
    table, indices = tables_of(sdata)[link.table_key], []
    if not set(_INDICES) <= set(table.obs.columns):
        return None
    for name in _INDICES:
        column = pd.Series(obs_column(table, name))
        if not pd.api.types.is_numeric_dtype(column) or column.isna().any():
            return None
        index = column.to_numpy().astype(np.int32)
        if not np.array_equal(index, column.to_numpy()):
            return None
        indices.append(index if len(link.rows) == len(index) else index[link.rows])
    row, col = indices
    if link.element_key in sdata.labels:
        labels, xy = sample_labels(sdata.labels[link.element_key])
        ids, side = pd.Index(labels), 1.0
    else:
        shapes = sample_shapes(shapes_of(sdata)[link.element_key])
        check_unique(shapes.index, f"Shapes {link.element_key!r}")
        ids, side = shapes.index, float(np.median(edge_lengths(shapes)))
        xy = shapely.get_coordinates(shapely.centroid(shapes.geometry.to_numpy()))
    which = ids.get_indexer(link.instances)  # the other way round would index millions
    place = np.flatnonzero(which >= 0)
    matrix = fit_lattice(np.stack([col[place], row[place]], axis=1), xy[which[place]])
    if matrix is None:
        return None
    x, y = matrix[:2, 0], matrix[:2, 1]
    a, b = np.hypot(*x), np.hypot(*y)
    is_square = abs(a / b - 1) < _SQUARE and abs(x @ y) < _SQUARE * a * b and abs(side / np.sqrt(a * b) - 1) < _SQUARE
    return (matrix, row, col) if is_square else None


def fit_lattice(col_row: ArrayLike, xy: ArrayLike) -> NDArray[np.float64] | None:
    """Map of (column, row, 1) to centres, (n, 2), by least squares; None if one is a tenth of the pitch off it."""
    points, centres = np.asarray(col_row, np.float64), np.asarray(xy, np.float64)
    design = np.column_stack([points, np.ones(len(points))])
    solution, _, rank, _ = np.linalg.lstsq(design, centres, rcond=None)
    if rank < 3:
        return None
    matrix = np.eye(3)
    matrix[:2] = solution.T
    residual = float(np.abs(design @ solution - centres).max())
    return matrix if residual <= _RESIDUAL * _pitch(matrix) else None


def _pitch(matrix: NDArray[np.float64]) -> float:
    """Distance of neighbouring points."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def bin_size_um(element_key: str) -> int | None:
    """Side in µm that an element of Visium HD bins has, from its name; whether it is one, `bin_lattice` tells."""
    match = _BIN_NAME.search(element_key)
    return int(match[1]) if match and int(match[1]) in _BIN_SIZES_UM else None


@dataclass(frozen=True)
class BinLattice:
    """A lattice of touching squares."""

    key: str  # the shapes or labels element
    size_um: int  # side of a square, from that name
    pitch: float  # side in the element's own coordinates
    how: str  # it was found, for a message


def bin_lattice(sdata: SpatialData, key: str, *, exact: bool = False) -> BinLattice | None:
    """Lattice of an element named as bins are, if it is one; ``exact`` to more than a thousandth, by all indices."""
    size = bin_size_um(key)
    if size is None:
        return None
    if key in sdata.labels:
        return BinLattice(key, size, 1.0, f"{size} µm label pixels of {key!r}") if _one_pixel_each(sdata, key) else None
    shapes = shapes_of(sdata).get(key)
    if shapes is None or len(shapes) < _FEWEST_BINS:
        return None
    check_unique((shapes.sample() if isinstance(shapes, StoredShapes) else shapes).index, f"Shapes {key!r}")
    indexed_first = exact or len(shapes) <= _MOST_INDEXED
    for is_indexed in (indexed_first, not indexed_first):
        pitch = _indexed_pitch(sdata, key) if is_indexed else _drawn_pitch(neighbouring_shapes(shapes))
        if pitch is not None:
            method = "lattice pitch" if is_indexed else "neighbour distance"
            return BinLattice(key, size, pitch, f"{method} of the {size} µm bins {key!r}")
    return None


def _indexed_pitch(sdata: SpatialData, element_key: str) -> float | None:
    """Pitch of shapes in their own units, from the first table with indices that explain them."""
    links = (link for link in _links(sdata, element_key, None) if len(link.rows) >= _FEWEST_BINS)
    fitted = next(filter(None, (_fitted(sdata, link) for link in links)), None)
    return None if fitted is None else _pitch(fitted[0])


def _drawn_pitch(shapes: GeoDataFrame) -> float | None:
    """Pitch of shapes that are squares, or circles as wide, of one size and touching on a square lattice."""
    if len(shapes) < _FEWEST_BINS:
        return None
    sample = shapes.iloc[sample_positions(len(shapes))]
    sides, side = edge_lengths(sample), float(np.median(edge_lengths(shapes)))
    if not (sides.min() > 0 and sides.max() / sides.min() - 1 < _TOLERANCE):
        return None
    if "radius" not in sample:
        squareness = (shapely.length(sample.geometry.to_numpy()) / sides) ** 2 / _SQUARE_BINS
        if np.abs(squareness - 1).max() > _TOLERANCE:
            return None
    xy = shapely.get_coordinates(shapely.centroid(shapes.geometry.to_numpy()))
    if not np.isfinite(xy).all():
        return None
    centres = xy[sample_positions(len(xy))]
    distance, which = cKDTree(xy).query(centres, k=min(_NEIGHBOURS + 1, len(xy)))
    step = (xy[which[:, 1:]] - centres[:, None]) @ np.array([1, 1j])
    touches = np.abs(distance[:, 1:] / side - 1) < _TOLERANCE
    # half may lack neighbours
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


def _one_pixel_each(sdata: SpatialData, key: str) -> bool:
    """Whether every region of a labels element is one pixel and touches others."""
    labels = lazy_labels(sdata.labels[key])
    tops = np.unique(sample_positions(max(1, labels.shape[0] - 1), _STRIPS) // 2 * 2)
    rows = np.concatenate([labels[top : top + 2] for top in tops])
    filled = rows[rows != 0]
    if len(filled) < _FEWEST_BINS or len(np.unique(filled)) < len(filled):
        return False
    touching = (rows[:, 1:] != 0) & (rows[:, :-1] != 0)
    return bool(touching.sum() >= _TOUCHING * len(filled) / 2)
