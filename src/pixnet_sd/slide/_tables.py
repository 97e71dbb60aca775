"""Which tables hold the measured expression, and which of their rows belong to which element."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet_sd._errors import DataError, ElementError

from ._elements import coordinate_systems, names, region_element
from ._ids import check_instances, check_unique
from ._stored_shapes import shapes_of
from ._stored_table import obs_column, tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ._stored_table import Table

__all__ = ["TableLink", "bin_size_um", "placed_regions", "regions_of_table", "table_link", "where_regions_are"]

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
