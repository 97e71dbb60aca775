"""Which tables hold the measured expression, and which of their rows belong to which element."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet_sd._errors import DataError, ElementError
from pixnet_sd._logging import logger

from ._elements import coordinate_systems, names, region_element
from ._ids import check_instances, check_unique
from ._stored_shapes import shapes_of
from ._stored_table import obs_column, tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ._stored_table import Table

__all__ = ["TableLink", "bin_size_um", "measured_tables", "select_tables", "table_link"]

_BIN_NAME = re.compile(r"_(\d{3})um(?:_labels)?$")


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
    """Side of a Visium HD bin in µm, from the name that spatialdata_io.visium_hd gives; None for another name."""
    match = _BIN_NAME.search(element_key)
    return int(match[1]) if match and int(match[1]) > 0 else None


def select_tables(
    sdata: SpatialData,
    *,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
) -> list[str]:
    """Tables with measured expression: those named, else all Visium HD bins, else the only table with a region.

    Parameters
    ----------
    sdata
        The object to look in.
    table_key
        One name or several.
    coordinate_system
        Where the slide is: tables that annotate nothing there are not found by themselves.

    Returns
    -------
    Names of tables, bins in order of their size.

    Raises
    ------
    ElementError
        If a named table is missing, none is found, or several are that are not bins of one assay.
    """
    if table_key is not None:
        return _named_tables(sdata, [table_key] if isinstance(table_key, str) else list(table_key))
    annotated = _annotated(sdata, coordinate_system)
    candidates = measured_tables(sdata, coordinate_system=coordinate_system)
    bins = [key for key, size in candidates.items() if size]
    if bins:
        logger.info("Visium HD bins taken as measured expression: tables %s.", names(bins))
        return bins
    if len(candidates) == 1:
        return list(candidates)
    if candidates:
        raise ElementError(f"Several tables annotate regions: {names(candidates)}. Name one with table_key=.")
    where = "" if coordinate_system is None else f" in coordinate system {coordinate_system!r}"
    raise ElementError(
        f"No table annotates shapes or labels{where}. Tables: {names(annotated)}. Link a table with TableModel.parse("
        "table, region=, region_key=, instance_key=)."
    )


def measured_tables(sdata: SpatialData, *, coordinate_system: str | None = None) -> dict[str, int]:
    """Tables that annotate something and hold no predictions, with the size of Visium HD bins in µm.

    Parameters
    ----------
    sdata
        The object to look in.
    coordinate_system
        Only tables that annotate something there are taken.

    Returns
    -------
    Bins in order of their size, and 0 for everything else.
    """
    found = {key: elements for key, elements in _annotated(sdata, coordinate_system).items() if elements}
    sizes = {key: max(bin_size_um(name) or 0 for name in elements) for key, elements in found.items()}
    return dict(sorted(sizes.items(), key=lambda item: (item[1], item[0])))


def _annotated(sdata: SpatialData, coordinate_system: str | None) -> dict[str, list[str]]:
    """Tables without predictions, and the elements there that each annotates."""
    tables = {key: table for key, table in tables_of(sdata).items() if "pixnet_sd" not in table.uns}
    return {key: _placed(sdata, _regions(table), coordinate_system) for key, table in tables.items()}


def _named_tables(sdata: SpatialData, keys: list[str]) -> list[str]:
    tables = tables_of(sdata)
    missing = [key for key in keys if key not in tables]
    if missing or not keys:
        raise ElementError(f"There is no table {names(missing)}. Tables: {names(tables)}. Check table_key=.")
    return keys


def _attrs(table: Table) -> dict[str, Any]:
    attrs: dict[str, Any] = table.uns.get("spatialdata_attrs", {})
    return attrs


def _regions(table: Table) -> list[str]:
    region = _attrs(table).get("region")
    return [region] if isinstance(region, str) else [str(name) for name in (region if region is not None else [])]


def _placed(sdata: SpatialData, regions: list[str], coordinate_system: str | None) -> list[str]:
    """Those regions that are in the object and in the coordinate system."""
    shapes = shapes_of(sdata)
    there = [name for name in regions if name in shapes or name in sdata.labels]
    if coordinate_system is None:
        return there
    return [name for name in there if coordinate_system in coordinate_systems(region_element(sdata, name))]


def table_link(sdata: SpatialData, *, table_key: str, coordinate_system: str | None = None) -> TableLink:
    """The element that a table annotates, and the rows that do.

    Parameters
    ----------
    sdata
        The object to look in.
    table_key
        Name of the table.
    coordinate_system
        Where the slide is. Of a table that annotates several elements, the rows of the one there are taken.

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
    element_key = _region_of(sdata, table_key, _regions(table), coordinate_system)
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
    placed = _placed(sdata, regions, coordinate_system)
    if len(placed) == 1:
        return placed[0]
    if placed:
        raise ElementError(
            f"Table {table_key!r} annotates several elements on this slide: {names(placed)}. Split it by region, or "
            "give each its own coordinate system."
        )
    shapes = shapes_of(sdata)
    if not any(name in shapes or name in sdata.labels for name in regions):
        found = f"Shapes: {names(shapes)}. Labels: {names(sdata.labels)}."
        raise ElementError(f"Table {table_key!r} annotates {names(regions)}, not in this SpatialData object. {found}")
    raise ElementError(
        f"Table {table_key!r} annotates {names(regions)}, but nothing in the slide's coordinate system "
        f"{coordinate_system!r}."
    )
