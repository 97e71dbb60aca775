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

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["TableLink", "bin_size_um", "select_tables", "table_link"]

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
    rows: NDArray[np.int64]
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
    annotated = {key: _annotated(sdata, key, coordinate_system) for key in sdata.tables if not _is_pixnet(sdata, key)}
    candidates = {key: elements for key, elements in annotated.items() if elements}
    sizes = {key: max(bin_size_um(name) or 0 for name in elements) for key, elements in candidates.items()}
    bins = sorted((key for key in candidates if sizes[key]), key=lambda key: (sizes[key], key))
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


def _named_tables(sdata: SpatialData, keys: list[str]) -> list[str]:
    missing = [key for key in keys if key not in sdata.tables]
    if missing or not keys:
        raise ElementError(f"There is no table {names(missing)}. Tables: {names(sdata.tables)}.")
    return keys


def _is_pixnet(sdata: SpatialData, key: str) -> bool:
    return "pixnet_sd" in sdata.tables[key].uns


def _attrs(table: AnnData) -> dict[str, Any]:
    attrs: dict[str, Any] = table.uns.get("spatialdata_attrs", {})
    return attrs


def _regions(table: AnnData) -> list[str]:
    region = _attrs(table).get("region")
    return [region] if isinstance(region, str) else [str(name) for name in (region if region is not None else [])]


def _placed(sdata: SpatialData, regions: list[str], coordinate_system: str | None) -> list[str]:
    """Those regions that are in the object and in the coordinate system."""
    there = [name for name in regions if name in sdata.shapes or name in sdata.labels]
    if coordinate_system is None:
        return there
    return [name for name in there if coordinate_system in coordinate_systems(region_element(sdata, name))]


def _annotated(sdata: SpatialData, key: str, coordinate_system: str | None) -> list[str]:
    return _placed(sdata, _regions(sdata.tables[key]), coordinate_system)


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
        If the table has no rows for it, or an instance id is missing or occurs twice.
    """
    table = sdata.tables[table_key]
    if table.n_obs == 0 or table.n_vars == 0:
        raise DataError(f"Table {table_key!r} is empty: {table.n_obs} rows x {table.n_vars} genes.")
    element_key = _region_of(sdata, table_key, coordinate_system)
    attrs = _attrs(table)
    region = np.asarray(table.obs[attrs["region_key"]].astype(str))
    rows = np.flatnonzero(region == element_key).astype(np.int64)
    if not len(rows):
        raise DataError(f"Table {table_key!r} has no row for its region {element_key!r}.")
    instances = pd.Index(table.obs[attrs["instance_key"]].iloc[rows])
    _check_instances(instances, table_key)
    return TableLink(table_key, element_key, rows, instances)


def _region_of(sdata: SpatialData, table_key: str, coordinate_system: str | None) -> str:
    regions = _regions(sdata.tables[table_key])
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
    absent = [name for name in regions if name not in sdata.shapes and name not in sdata.labels]
    if len(absent) == len(regions):
        found = f"Shapes: {names(sdata.shapes)}. Labels: {names(sdata.labels)}."
        raise ElementError(f"Table {table_key!r} annotates {names(regions)}, not in this SpatialData object. {found}")
    raise ElementError(
        f"Table {table_key!r} annotates {names(regions)}, but nothing in the slide's coordinate system "
        f"{coordinate_system!r}."
    )


def _check_instances(instances: pd.Index, table_key: str) -> None:
    missing, twice = int(np.count_nonzero(instances.isna())), instances.duplicated()
    if missing:
        raise DataError(f"Table {table_key!r} has {missing} rows without an instance id.")
    if twice.any():
        raise DataError(
            f"Table {table_key!r} has {int(twice.sum())} rows whose instance id occurred before "
            f"(first {instances[twice].tolist()[0]!r}): one row a region is needed."
        )
