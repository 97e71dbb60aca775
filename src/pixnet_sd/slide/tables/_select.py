"""Which tables hold the measured expression of a slide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._notes import table_note
from pixnet_sd._util import logger
from pixnet_sd.errors import ElementError
from pixnet_sd.slide import other_slides, size_of_bins
from pixnet_sd.slide.elements import (
    BinLattice,
    Table,
    bin_lattice,
    coordinate_systems,
    names,
    on_image,
    placed_regions,
    region_element,
    regions_of_table,
    tables_of,
    where_regions_are,
)

if TYPE_CHECKING:
    from spatialdata import SpatialData


_APART = "give each sample its own coordinate system and choose with coordinate_system="
_SAMPLE_VALUES, _SAMPLE_ROWS = 20_000, 100  # of X, looked at to tell counts from a copy of them


def select_tables(
    sdata: SpatialData,
    *,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    image_key: str | None = None,
) -> list[str]:
    """Choose the tables with measured expression: those named, else all Visium HD bins by size, else the only table.

    Bins are told by their geometry, see `bin_lattice`. Tables whose regions are not in the coordinate system, or all
    beside the image, are not found by themselves. Of tables that annotate the same regions the one with counts is
    taken.
    """
    if table_key is not None:
        return _named_tables(sdata, table_key, coordinate_system)
    regions = _candidates(sdata, coordinate_system, image_key)
    if not regions:
        raise ElementError(_none_found(sdata, coordinate_system, image_key))
    lattices = {key: lattice for key, elements in regions.items() if (lattice := _lattice(sdata, elements)) is not None}
    bins = sorted(lattices, key=lambda key: (lattices[key].size_um, key))
    taken = _one_for_each_region(sdata, {key: regions[key] for key in bins or regions})
    if not bins and len(taken) > 1:
        raise ElementError(f"Several tables annotate regions: {_described(taken, regions)}. Name one with table_key=.")
    if coordinate_system is not None and image_key is not None:
        others = other_slides(sdata, image_key=image_key, coordinate_system=coordinate_system)
        if others:
            raise ElementError(
                f"Images {names([image_key, *others])} meet in coordinate system {coordinate_system!r}, and which of "
                f"them was measured cannot be told: {_described(taken, regions)}. Name the tables that belong to the "
                f"image with table_key=, or {_APART}."
            )
    _check_one_sample(sdata, {key: lattices[key] for key in taken if key in lattices}, regions, coordinate_system)
    return taken


def measured_tables(
    sdata: SpatialData, *, coordinate_system: str | None = None, image_key: str | None = None
) -> list[str]:
    """List the tables that annotate something, there if a place is given, and hold no predictions."""
    return list(_candidates(sdata, coordinate_system, image_key))


def measured_regions(sdata: SpatialData, table_key: str | Sequence[str] | None = None) -> list[str]:
    """List the elements that tables with measured expression annotate: those named, or all."""
    regions = _candidates(sdata, None, None)
    if table_key is not None:
        tables = tables_of(sdata)
        named = _named_tables(sdata, table_key, None)
        regions = {key: placed_regions(sdata, regions_of_table(tables[key]), None) for key in named}
    return list(dict.fromkeys(element for elements in regions.values() for element in elements))


def _candidates(sdata: SpatialData, coordinate_system: str | None, image_key: str | None) -> dict[str, list[str]]:
    """Find tables without predictions, and the elements in a place that each annotates, at least one."""
    tables = {key: table for key, table in tables_of(sdata).items() if table_note(table) is None}
    regions = {key: placed_regions(sdata, regions_of_table(table), coordinate_system) for key, table in tables.items()}
    if image_key is not None and coordinate_system is not None:
        elements = dict.fromkeys(element for each in regions.values() for element in each)
        near = set(on_image(sdata, elements, image_key=image_key, coordinate_system=coordinate_system))
        regions = {key: [element for element in each if element in near] for key, each in regions.items()}
    return {key: elements for key, elements in regions.items() if elements}


def _lattice(sdata: SpatialData, elements: Sequence[str]) -> BinLattice | None:
    """Find the lattice of the bins that a table annotates, of several the coarsest."""
    lattices = [lattice for key in elements if (lattice := bin_lattice(sdata, key)) is not None]
    return max(lattices, key=lambda lattice: lattice.size_um, default=None)


def _named_tables(sdata: SpatialData, table_key: str | Sequence[str], coordinate_system: str | None) -> list[str]:
    keys = [table_key] if isinstance(table_key, str) else list(table_key)
    tables = tables_of(sdata)
    missing = [key for key in keys if key not in tables]
    if missing or not keys:
        raise ElementError(f"There is no table {names(missing)}. Tables: {names(tables)}. Check table_key=.")
    taken: dict[str, str] = {}
    for key in keys:
        for element in placed_regions(sdata, regions_of_table(tables[key]), coordinate_system):
            if element in taken:
                raise ElementError(
                    f"Tables {taken[element]!r} and {key!r} of table_key= measure the same regions {element!r}, which "
                    "would count twice. Name one of them."
                )
            taken[element] = key
    return keys


def _one_for_each_region(sdata: SpatialData, regions: Mapping[str, Sequence[str]]) -> list[str]:
    """Choose, of tables that annotate the same regions, the one that has counts."""
    taken: list[str] = []
    for key in regions:
        same = [other for other in regions if set(regions[key]) & set(regions[other])]
        if len(same) == 1:
            taken.append(key)
        elif key == same[0]:
            counts = [other for other in same if _looks_like_counts(tables_of(sdata)[other])]
            if len(counts) != 1:
                which = f"of which these hold counts: {names(counts)}" if counts else "none of which holds counts"
                raise ElementError(
                    f"Several tables measure the same regions {regions[key][0]!r}: {names(same)}, {which}. Name one "
                    "with table_key=."
                )
            others = names(other for other in same if other not in counts)
            logger.info("Table %r has the counts of %r; %s is left out.", counts[0], regions[key][0], others)
            taken += counts
    return taken


def _looks_like_counts(table: Table) -> bool:
    """Tell whether a sample of X is whole, not negative, and not 0 all over."""
    x: Any = table.X
    if x is None:
        return False
    values = _sample(x.group["data"] if hasattr(x, "group") else x.data if sparse.issparse(x) else x)
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values) or not np.isfinite(values).all():
        return False
    return bool(len(values) and (values >= 0).all() and values.any() and (values == np.rint(values)).all())


def _sample(x: Any) -> NDArray[Any]:
    """Read values from the start, the middle and the end of an array."""
    step = (_SAMPLE_VALUES if x.ndim == 1 else _SAMPLE_ROWS) // 3
    starts = sorted({0, max(0, (x.shape[0] - step) // 2), max(0, x.shape[0] - step)})
    read = [x[start : start + step] for start in starts]
    return np.concatenate([np.asarray(rows.compute() if hasattr(rows, "compute") else rows).ravel() for rows in read])


def _check_one_sample(
    sdata: SpatialData,
    lattices: Mapping[str, BinLattice],
    regions: Mapping[str, Sequence[str]],
    coordinate_system: str | None,
) -> None:
    """Refuse bins of several samples: of one size, or of different resolution."""
    sizes = [lattice.size_um for lattice in lattices.values()]
    why = "have one size" if len(set(sizes)) < len(sizes) else ""
    if coordinate_system is not None:
        mpps = [size_of_bins(sdata, lattice, coordinate_system) for lattice in lattices.values()]
        if any(not mpps[0].agrees(mpp.value) for mpp in mpps):
            why = "tell different resolutions"
    if why:
        raise ElementError(
            f"Bins of several samples {why}: {_described(lattices, regions)}. Name the tables that belong to the "
            f"image with table_key=, or {_APART}."
        )


def _described(keys: Iterable[str], regions: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{key!r} (regions {names(regions[key])})" for key in keys)


def _none_found(sdata: SpatialData, coordinate_system: str | None, image_key: str | None) -> str:
    where = "" if coordinate_system is None else f" in coordinate system {coordinate_system!r}"
    tables = [key for key, table in tables_of(sdata).items() if table_note(table) is None]
    message = f"No table annotates shapes or labels{where}. Tables: {names(tables)}."
    elsewhere = measured_regions(sdata)
    if not elsewhere:
        return f"{message} Link a table with TableModel.parse(table, region=, region_key=, instance_key=)."
    systems = {system for key in elsewhere for system in coordinate_systems(region_element(sdata, key))}
    if image_key is not None:
        systems &= set(coordinate_systems(sdata.images[image_key]))
    advice = (
        f"Give coordinate_system={min(systems)!r}."
        if systems
        else "Give coordinate_system= of the image and its regions, or align them with "
        "spatialdata.transformations.set_transformation."
    )
    return f"{message} Their regions are elsewhere: {where_regions_are(sdata, elsewhere)}. {advice}"
