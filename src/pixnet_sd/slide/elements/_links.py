"""Ids of regions, and the rows of tables that annotate them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from pixnet_sd.errors import DataError, ElementError

from ._elements import coordinate_systems, names, region_element
from ._stored import obs_column, shapes_of, tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ._stored import Table

_CHUNK = 2**20
_KINDS = {  # what `pandas.api.types.infer_dtype` calls ids; others are said as they are called
    "floating": "numbers with a fraction, or missing",
    "mixed-integer": "numbers and text mixed, or missing",
    "mixed-integer-float": "numbers with and without a fraction",
    "mixed": "of several kinds, or missing",
    "boolean": "True and False",
}


def plain_ids(ids: pd.Index, what: str, element_key: str) -> pd.Index:
    """Ids of an element as a table can hold them: whole numbers or text, each once, the index itself without a name.

    `DataError`, with a line that mends them, if they are anything else: told before a network has run for them.
    """
    if isinstance(ids, pd.CategoricalIndex):
        ids = ids.astype(ids.categories.dtype)
    inferred = "a MultiIndex" if isinstance(ids, pd.MultiIndex) else pd.api.types.infer_dtype(ids, skipna=False)
    if inferred == "integer" and ids.hasnans:
        inferred = "numbers, some of them missing"
    if inferred not in ("integer", "string", "empty") or (inferred == "string" and not _can_be_written(ids)):
        raise DataError(
            f"{what} {element_key!r}: a table names regions by whole numbers or by text, and the ids of these are "
            f"{_KINDS.get(inferred, inferred)} (first: {ids[:1].tolist()[0]!r}). Give each its own: "
            f"{_remedy(ids, inferred, f'sdata[{element_key!r}]')}, and the ids in its tables alike."
        )
    if inferred == "integer":
        ids = ids.astype(np.uint64 if ids.max() > np.iinfo(np.int64).max else np.int64)
    check_unique(ids, f"{what} {element_key!r}")
    return pd.Index(ids.array, name=None)


def _can_be_written(ids: pd.Index) -> bool:
    """Whether text is text: Python's can hold halves of characters, which no file can."""
    try:
        for start in range(0, len(ids), _CHUNK):
            pa.array(ids[start : start + _CHUNK].to_numpy(), type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        return False
    return True


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
    if len(one) != len(other):
        return False
    return bool(np.array_equal(one.to_numpy(), other.to_numpy()) or one.isin(other).all())


@dataclass(frozen=True)
class TableLink:
    """Rows of a table, ascending, that annotate one shapes or labels element, and the instance id of each."""

    table_key: str
    element_key: str
    rows: NDArray[np.int32]
    instances: pd.Index


def regions_of_table(table: Table) -> list[str]:
    """Elements that a table says it annotates."""
    region = table.uns.get("spatialdata_attrs", {}).get("region")
    return [region] if isinstance(region, str) else [str(name) for name in (region if region is not None else [])]


def placed_regions(sdata: SpatialData, regions: Iterable[str], coordinate_system: str | None) -> list[str]:
    """Those regions that are in the object and, if one is given, in the coordinate system."""
    elements = {**sdata.labels, **shapes_of(sdata)}
    present = [name for name in regions if name in elements]
    if coordinate_system is None:
        return present
    return [name for name in present if coordinate_system in coordinate_systems(elements[name])]


def where_regions_are(sdata: SpatialData, regions: Iterable[str]) -> str:
    """Elements with the coordinate systems that each is in, for a message."""
    present = placed_regions(sdata, regions, None)
    return ", ".join(f"{key!r} is in {names(coordinate_systems(region_element(sdata, key)))}" for key in present)


def table_link(
    sdata: SpatialData, *, table_key: str, coordinate_system: str | None = None, element_key: str | None = None
) -> TableLink:
    """Find the element that a table annotates, and the rows that do.

    Of a table that annotates several elements, the rows of `element_key` are taken, or of the one element in the
    coordinate system. `ElementError`: the table has no region, the region is not there, or several are; `DataError`: it
    has no rows for it, or an id of the table or of the shapes is missing or occurs twice.
    """
    table = tables_of(sdata)[table_key]
    if table.n_obs == 0 or table.n_vars == 0:
        raise DataError(f"Table {table_key!r} is empty: {table.n_obs} rows x {table.n_vars} genes.")
    regions = regions_of_table(table)
    if element_key is None or element_key not in placed_regions(sdata, regions, None):
        element_key = _region_of(sdata, table_key, regions, coordinate_system)
    attrs = table.uns["spatialdata_attrs"]
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
    if not placed_regions(sdata, regions, None):
        raise ElementError(
            f"Table {table_key!r} annotates {names(regions)}, not in this SpatialData object. Shapes: "
            f"{names(shapes_of(sdata))}. Labels: {names(sdata.labels)}."
        )
    raise ElementError(
        f"Table {table_key!r} annotates {names(regions)}, but nothing in the slide's coordinate system "
        f"{coordinate_system!r}. Choose another with coordinate_system=: {where_regions_are(sdata, regions)}."
    )
