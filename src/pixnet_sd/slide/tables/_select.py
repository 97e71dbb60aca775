"""Which tables hold the measured expression of a slide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pixnet_sd._util import logger
from pixnet_sd.errors import ElementError
from pixnet_sd.slide import other_slides, size_of_bins
from pixnet_sd.slide.elements import (
    BinLattice,
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

from ._kind import look_like_counts

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["measured_regions", "measured_tables", "select_tables"]

_APART = "give each sample its own coordinate system and choose with coordinate_system="


def select_tables(
    sdata: SpatialData,
    *,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    image_key: str | None = None,
) -> list[str]:
    """Choose the tables with measured expression: those named, else all Visium HD bins, else the only table.

    Bins are told by their geometry, see `bin_lattice`. Of tables that annotate the same regions the one with counts is
    taken.

    Parameters
    ----------
    sdata
        The object to look in.
    table_key
        One name or several.
    coordinate_system
        Where the slide is: tables that annotate nothing there are not found by themselves.
    image_key
        The slide image: nor are tables whose regions all lie beside it.

    Returns
    -------
    Names of tables, bins in order of their size.

    Raises
    ------
    ElementError
        If a named table is missing, none is found, several are that are not bins of one assay, or several measure the
        same regions.
    """
    if table_key is not None:
        return _named_tables(sdata, [table_key] if isinstance(table_key, str) else list(table_key), coordinate_system)
    measured = _measured(sdata, coordinate_system, image_key)
    if not measured:
        raise ElementError(_none(sdata, coordinate_system, image_key))
    lattices = {key: _lattice(sdata, elements) for key, elements in measured.items()}
    sizes = {key: lattice.size_um for key, lattice in lattices.items() if lattice is not None}
    bins = {key: measured[key] for key in sorted(sizes, key=lambda key: (sizes[key], key))}
    taken = _one_for_each_region(sdata, bins or measured)
    if not bins and len(taken) > 1:
        raise ElementError(f"Several tables annotate regions: {_described(taken, measured)}. Name one with table_key=.")
    _check_one_slide(sdata, taken, measured, coordinate_system, image_key)
    told = {key: lattice for key in taken if (lattice := lattices[key]) is not None}
    _check_one_sample(sdata, told, measured, coordinate_system)
    return taken


def measured_tables(
    sdata: SpatialData, *, coordinate_system: str | None = None, image_key: str | None = None
) -> list[str]:
    """Tables that annotate something, there if a place is given, and hold no predictions."""
    return list(_measured(sdata, coordinate_system, image_key))


def measured_regions(sdata: SpatialData, table_key: str | Sequence[str] | None = None) -> list[str]:
    """Elements that tables with measured expression annotate: those named, or all.

    Raises
    ------
    ElementError
        If a named table is missing.
    """
    if table_key is None:
        found = [key for elements in _measured(sdata, None, None).values() for key in elements]
    else:
        keys = _named_tables(sdata, [table_key] if isinstance(table_key, str) else list(table_key), None)
        found = [
            region for key in keys for region in placed_regions(sdata, regions_of_table(tables_of(sdata)[key]), None)
        ]
    return list(dict.fromkeys(found))


def _measured(sdata: SpatialData, coordinate_system: str | None, image_key: str | None) -> dict[str, list[str]]:
    """Tables without predictions, and the elements there that each annotates; those that annotate none are left out."""
    tables = {key: table for key, table in tables_of(sdata).items() if "pixnet_sd" not in table.uns}
    found = {key: placed_regions(sdata, regions_of_table(table), coordinate_system) for key, table in tables.items()}
    if image_key is not None and coordinate_system is not None:
        elements = dict.fromkeys(element for each in found.values() for element in each)
        there = set(on_image(sdata, elements, image_key=image_key, coordinate_system=coordinate_system))
        found = {key: [element for element in each if element in there] for key, each in found.items()}
    return {key: elements for key, elements in found.items() if elements}


def _lattice(sdata: SpatialData, elements: Sequence[str]) -> BinLattice | None:
    """Bins that a table annotates, the coarsest if there are several."""
    found = [lattice for key in elements if (lattice := bin_lattice(sdata, key)) is not None]
    return max(found, key=lambda lattice: lattice.size_um, default=None)


def _named_tables(sdata: SpatialData, keys: list[str], coordinate_system: str | None) -> list[str]:
    tables = tables_of(sdata)
    missing = [key for key in keys if key not in tables]
    if missing or not keys:
        raise ElementError(f"There is no table {names(missing)}. Tables: {names(tables)}. Check table_key=.")
    regions = {key: placed_regions(sdata, regions_of_table(tables[key]), coordinate_system) for key in keys}
    for k, key in enumerate(keys):
        for other in keys[:k]:
            twice = [element for element in regions[key] if element in regions[other]]
            if twice:
                raise ElementError(
                    f"Tables {other!r} and {key!r} of table_key= measure the same regions {twice[0]!r}, which would "
                    "count twice. Name one of them."
                )
    return keys


def _one_for_each_region(sdata: SpatialData, measured: Mapping[str, Sequence[str]]) -> list[str]:
    """Tables, but of several that annotate the same regions only the one that has counts.

    Raises
    ------
    ElementError
        If several have, or none.
    """
    taken: list[str] = []
    for key in measured:
        same = [other for other in measured if set(measured[key]) & set(measured[other])]
        if len(same) == 1:
            taken.append(key)
        elif key == same[0]:
            counts = [other for other in same if look_like_counts(tables_of(sdata)[other])]
            if len(counts) != 1:
                which = f"of which these hold counts: {names(counts)}" if counts else "none of which holds counts"
                raise ElementError(
                    f"Several tables measure the same regions {measured[key][0]!r}: {names(same)}, {which}. Name one "
                    "with table_key=."
                )
            others = names(other for other in same if other not in counts)
            logger.info("Table %r has the counts of %r; %s is left out.", counts[0], measured[key][0], others)
            taken += counts
    return taken


def _check_one_slide(
    sdata: SpatialData,
    taken: Sequence[str],
    measured: Mapping[str, Sequence[str]],
    coordinate_system: str | None,
    image_key: str | None,
) -> None:
    """Refuse to guess which of several slides in one coordinate system a table belongs to.

    Raises
    ------
    ElementError
        If there are several.
    """
    if coordinate_system is None or image_key is None:
        return
    others = other_slides(sdata, image_key=image_key, coordinate_system=coordinate_system)
    if others:
        raise ElementError(
            f"Images {names([image_key, *others])} meet in coordinate system {coordinate_system!r}, and which of them "
            f"was measured cannot be told: {_described(taken, measured)}. Name the tables that belong to the image "
            f"with table_key=, or {_APART}."
        )


def _check_one_sample(
    sdata: SpatialData,
    lattices: Mapping[str, BinLattice],
    measured: Mapping[str, Sequence[str]],
    coordinate_system: str | None,
) -> None:
    """Refuse bins of several samples: of one size, or of different resolution.

    Raises
    ------
    ElementError
        If there are such.
    """
    sizes = [lattice.size_um for lattice in lattices.values()]
    why = "have one size" if len(set(sizes)) < len(sizes) else ""
    if coordinate_system is not None:
        told = [size_of_bins(sdata, lattice, coordinate_system) for lattice in lattices.values()]
        if any(not told[0].agrees(size.value) for size in told):
            why = "tell different resolutions"
    if why:
        raise ElementError(
            f"Bins of several samples {why}: {_described(lattices, measured)}. Name the tables that belong to the "
            f"image with table_key=, or {_APART}."
        )


def _described(keys: Iterable[str], measured: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{key!r} (regions {names(measured[key])})" for key in keys)


def _none(sdata: SpatialData, coordinate_system: str | None, image_key: str | None) -> str:
    where = "" if coordinate_system is None else f" in coordinate system {coordinate_system!r}"
    tables = {key: table for key, table in tables_of(sdata).items() if "pixnet_sd" not in table.uns}
    message = f"No table annotates shapes or labels{where}. Tables: {names(tables)}."
    elsewhere = placed_regions(sdata, [region for t in tables.values() for region in regions_of_table(t)], None)
    if not elsewhere:
        return f"{message} Link a table with TableModel.parse(table, region=, region_key=, instance_key=)."
    found = where_regions_are(sdata, dict.fromkeys(elsewhere))
    systems = {system for key in elsewhere for system in coordinate_systems(region_element(sdata, key))}
    if image_key is not None:
        systems &= set(coordinate_systems(sdata.images[image_key]))
    if systems:
        return f"{message} Their regions are elsewhere: {found}. Give coordinate_system={sorted(systems)[0]!r}."
    return (
        f"{message} Their regions are elsewhere: {found}. Give coordinate_system= of the image and its regions, or "
        "align them with spatialdata.transformations.set_transformation."
    )
