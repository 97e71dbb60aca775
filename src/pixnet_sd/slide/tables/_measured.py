"""Measured expression on a slide: which tables hold it, regions that have counts, and which features are genes.

Antibodies, guides and controls are measured too, and are not expression: they are neither learnt nor part of totals.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd._notes import table_note
from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons
from pixnet_sd.slide import Slide, other_slides, size_of_bins
from pixnet_sd.slide.elements import (
    StoredTable,
    Table,
    TableLink,
    bin_lattice,
    bins_of_table,
    check_regions_on_image,
    coordinate_systems,
    names,
    on_image,
    placed_regions,
    region_element,
    regions_of,
    regions_of_table,
    same_ids,
    shapes_of,
    table_link,
    tables_of,
    where_regions_are,
)

from ._counts import Counts

AnyRegions: TypeAlias = Lattice | Circles | Polygons | LabelGrid

_APART = "give each sample its own coordinate system and choose with coordinate_system="
_SAMPLE_VALUES, _SAMPLE_ROWS = 20_000, 100  # of X, looked at to tell counts from a copy of them
_MANY_ROWS = 1_000_000
_TYPE_COLUMNS = ("feature_types", "feature_type")
_EXPRESSION = {"gene expression", "gene", "genes", "rna", "mrna", "gex", "transcript", "expression"}
# names of controls of Xenium, CosMx and MERSCOPE: NegControlProbe_00042, BLANK_0100, NegPrb3, Negative12
_CONTROL = re.compile(
    r"(neg(ative)?[ _-]?(control|prb|ctrl)?([ _-]?(probe|codeword))?|blank|system[ _-]?control|false[ _-]?code"
    r"|(unassigned|deprecated)[ _-]?codeword)[ _-]?\d+",
    re.IGNORECASE,
)


def select_tables(
    sdata: SpatialData,
    *,
    table_key: str | Sequence[str] | None = None,
    coordinate_system: str | None = None,
    image_key: str | None = None,
) -> list[str]:
    """Choose the tables with measured expression: those named, else all Visium HD bins by size, else the only table.

    Of tables on the image in the coordinate system that annotate the same regions the one with counts is taken.
    """
    if table_key is not None:
        return _named_tables(sdata, table_key, coordinate_system)
    regions = measured_tables(sdata, coordinate_system=coordinate_system, image_key=image_key)
    if not regions:
        raise ElementError(_none_found(sdata, coordinate_system, image_key))
    found = {key: [bin_lattice(sdata, element) for element in elements] for key, elements in regions.items()}
    lattices = {key: max(filter(None, each), key=lambda one: one.size_um) for key, each in found.items() if any(each)}
    bins = sorted(lattices, key=lambda key: (lattices[key].size_um, key))
    taken = _one_for_each_region(sdata, {key: regions[key] for key in bins or regions})
    listed = ", ".join(f"{key!r} (regions {names(regions[key])})" for key in taken)
    if not bins and len(taken) > 1:
        raise ElementError(f"Several tables annotate regions: {listed}. Name one with table_key=.")
    if coordinate_system is not None and image_key is not None:
        others = other_slides(sdata, image_key=image_key, coordinate_system=coordinate_system)
        if others:
            raise ElementError(
                f"Images {names([image_key, *others])} meet in coordinate system {coordinate_system!r}, and which of "
                f"them was measured cannot be told: {listed}. Name the tables that belong to the image with "
                f"table_key=, or {_APART}."
            )
    of_bins = [lattices[key] for key in taken if bins]
    why = "have one size" if len({lattice.size_um for lattice in of_bins}) < len(of_bins) else ""
    if coordinate_system is not None:
        mpps = [size_of_bins(sdata, lattice, coordinate_system) for lattice in of_bins]
        if any(not mpps[0].agrees(mpp.value) for mpp in mpps):
            why = "tell different resolutions"
    if why:
        raise ElementError(
            f"Bins of several samples {why}: {listed}. Name the tables that belong to the image with table_key=, or "
            f"{_APART}."
        )
    return taken


def measured_regions(sdata: SpatialData, table_key: str | Sequence[str] | None = None) -> list[str]:
    """List the elements that tables with measured expression annotate: those named, or all."""
    if table_key is None:
        regions = measured_tables(sdata)
    else:
        tables, keys = tables_of(sdata), _named_tables(sdata, table_key, None)
        regions = {key: placed_regions(sdata, regions_of_table(tables[key]), None) for key in keys}
    return list(dict.fromkeys(element for elements in regions.values() for element in elements))


def measured_tables(
    sdata: SpatialData, *, coordinate_system: str | None = None, image_key: str | None = None
) -> dict[str, list[str]]:
    """Find tables without predictions, and the elements, in a place if given, that each annotates, at least one."""
    tables = {key: table for key, table in tables_of(sdata).items() if table_note(table) is None}
    regions = {key: placed_regions(sdata, regions_of_table(table), coordinate_system) for key, table in tables.items()}
    if image_key is not None and coordinate_system is not None:
        elements = dict.fromkeys(element for each in regions.values() for element in each)
        near = set(on_image(sdata, elements, image_key=image_key, coordinate_system=coordinate_system))
        regions = {key: [element for element in each if element in near] for key, each in regions.items()}
    return {key: elements for key, elements in regions.items() if elements}


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
                raise ElementError(
                    f"Several tables measure the same regions {regions[key][0]!r}: {names(same)}, of which "
                    f"{len(counts)} hold counts: {names(counts)}. Name one with table_key=."
                )
            logger.info("Table %r has the counts of %r, of tables %s.", counts[0], regions[key][0], names(same))
            taken += counts
    return taken


def _looks_like_counts(table: Table) -> bool:
    """Tell whether X is whole, not negative, and not 0 all over, at its start, its middle and its end."""
    x: Any = table.X
    if x is None:
        return False
    x = x.group["data"] if hasattr(x, "group") else x.data if sparse.issparse(x) else x
    step = (_SAMPLE_VALUES if x.ndim == 1 else _SAMPLE_ROWS) // 3
    read = [x[start : start + step] for start in {max(0, (x.shape[0] - step) * k // 2) for k in range(3)}]
    values = np.concatenate([np.asarray(rows.compute() if hasattr(rows, "compute") else rows).ravel() for rows in read])
    if values.dtype.kind not in "iuf" or not values.any() or not np.isfinite(values).all():
        return False
    return bool(((values >= 0) & (values == np.rint(values))).all())


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
        f"Give coordinate_system={min(systems)!r}." if systems else "Align them with the image: set_transformation."
    )
    return f"{message} Their regions are elsewhere: {where_regions_are(sdata, elsewhere)}. {advice}"


@dataclass(frozen=True, eq=False)
class Measured:
    """Expression measured in n regions of one slide, as one table says."""

    table_key: str
    element_key: str  # shapes or labels that the table annotates
    regions: AnyRegions  # working px; of bins their lattice, in row-major order of it
    instances: pd.Index  # instance id of each region, shape (n,)
    counts: Counts  # raw counts of each region, n x G
    var_names: pd.Index  # genes, shape (G,)
    is_complete: bool = True  # every row of the table that annotates the element is among the regions
    others: Mapping[str, str] = field(default_factory=dict)  # type of each feature that is no gene

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def what(self) -> str:
        """Name of the table, for messages."""
        return f"Table {self.table_key!r}"

    def take(self, keep: NDArray[np.bool_]) -> Measured:
        """Pick regions by a mask."""
        if keep.all():
            return self
        regions, counts = self.regions.subset(np.flatnonzero(keep)), self.counts.take(keep)
        return replace(self, regions=regions, instances=self.instances[keep], counts=counts, is_complete=False)

    def rows(self, index: NDArray[np.integer]) -> sparse.csr_matrix:
        """Read the counts of regions, at least one, in the order of the index."""
        return self.counts.take(index).to_csr()

    def content_key(self, genes: Iterable[str]) -> str:
        """Hash all that decides about the counts of some genes: counts as stored, which rows in which order, genes."""
        digest = hashlib.sha256()
        for of_table in (self.var_names, genes):
            digest.update("\n".join(map(str, of_table)).encode())
        for piece in self.counts.content():
            digest.update(piece)
        return digest.hexdigest()


def measured(sdata: SpatialData, slide: Slide, *, table_key: str | Sequence[str] | None = None) -> list[Measured]:
    """Find measured expression on a slide, one entry a table, bins in order of their size; no counts are read.

    Rows and regions are joined by instance id. Rows without a region and regions off the image are left out with a
    warning; regions without a row silently.
    """
    place = {"coordinate_system": slide.coordinate_system, "image_key": slide.image_key}
    tables = [_measured(sdata, slide, key) for key in select_tables(sdata, table_key=table_key, **place)]
    listed = ", ".join(f"{each.table_key!r} ({len(each):,} regions of {each.element_key!r})" for each in tables)
    logger.info("Measured expression: tables %s.", listed)
    return tables


def _measured(sdata: SpatialData, slide: Slide, table_key: str) -> Measured:
    what, table = f"Table {table_key!r}", tables_of(sdata)[table_key]
    if sdata.path is not None and table_key in sdata.tables and table.n_obs >= _MANY_ROWS:
        logger.warning(
            "table %r with its %.1f million rows, and its shapes if loaded, are in memory though the store has them: "
            "pixnet_sd.io.open_store(%r) leaves them on disk and needs a fraction of the memory.",
            *(table_key, table.n_obs / 1e6, str(sdata.path)),
        )
    link = table_link(sdata, table_key=table_key, coordinate_system=slide.coordinate_system)
    genes = genes_of(table, what)
    regions, rows, instances = _located(sdata, link, slide)
    counts, is_complete = counts_of(table, rows, genes, what), len(rows) == len(link.rows)
    every = Measured(table_key, link.element_key, regions, instances, counts, genes.names, is_complete, genes.others)
    height, width = slide.working_shape
    what = f"{what}, element {link.element_key!r}"
    return every.take(check_regions_on_image(regions, width=width, height=height, what=what))


def _located(sdata: SpatialData, link: TableLink, slide: Slide) -> tuple[AnyRegions, NDArray[np.int32], pd.Index]:
    """Find the regions of a table's rows: bins on their lattice, others as drawn; with their rows and instance ids."""
    place: Any = {"coordinate_system": slide.coordinate_system, "from_system": slide.working_from_system}
    bins = bins_of_table(sdata, link, **place)
    regions: AnyRegions
    if bins is not None:
        regions, rows, instances = bins
        drawn = shapes_of(sdata).get(link.element_key)
        if drawn is None or same_ids(ids := drawn.index, instances):
            return bins
        has_region = instances.isin(ids)
        index = np.flatnonzero(has_region)
    else:
        regions, ids = regions_of(sdata, link.element_key, **place)
        rows, instances = link.rows, link.instances
        index = ids.get_indexer(instances)
        has_region = index >= 0
        index = index[has_region]
    n_lost, first = int((~has_region).sum()), instances[~has_region][:1].tolist()
    if n_lost == len(has_region):
        raise DataError(
            f"Table {link.table_key!r}: none of its {n_lost} instance ids (such as {first[0]!r}) is in element "
            f"{link.element_key!r} (ids such as {ids[:1].tolist()[0]!r}). Both must hold the same ids of one type."
        )
    if n_lost:
        warn(
            f"Table {link.table_key!r}: {n_lost} of {len(has_region)} rows have no region in element "
            f"{link.element_key!r} (first {first[0]!r}) and are left out."
        )
    return regions.subset(index), rows[has_region], instances[has_region]


class Genes(NamedTuple):
    """Features of a table that are genes."""

    names: pd.Index  # shape (G,)
    columns: NDArray[np.intp] | None  # of X, ascending, shape (G,); None when all features are genes
    others: Mapping[str, str]  # type of each feature that is no gene, by name


def counts_of(table: Table, rows: ArrayLike, genes: Genes, what: str) -> Counts:
    """Wrap the counts of the genes of a table in some of its rows."""
    files = table.path / "X" if isinstance(table, StoredTable) else None
    return Counts.of(table.X, rows, what, files, genes.columns)


def genes_of(table: Table, what: str) -> Genes:
    """Find the genes: features whose ``feature_types`` says so, or, without that column, all but controls by name."""
    columns, every = table.var.columns, pd.Index(table.var_names)
    column = next((name for name in columns if re.sub(r"[^a-z]+", "_", str(name).lower()) in _TYPE_COLUMNS), None)
    types: Any
    if column is None:
        controls = every.astype(str).str.fullmatch(_CONTROL)
        types = pd.Series(np.where(controls, "control by its name", "Gene Expression"), index=every)
    else:
        types = pd.Series(np.asarray(table.var[column], dtype=object), index=every)
        types = types.where(types.notna(), "of no type").astype(str).str.strip()
    is_gene = np.asarray(types.str.lower().str.replace("_", " ").isin(_EXPRESSION))
    listed = ", ".join(f"{n} {name!r}" for name, n in Counter(types[~is_gene]).most_common())
    if not is_gene.any():
        raise DataError(
            f"{what}: none of its {len(types)} features is a gene, by var['feature_types']: {listed}. Genes are of the "
            "type 'Gene Expression' there: correct the column, or delete it when all features are genes."
        )
    genes = every[is_gene]
    twice = genes[genes.duplicated()].unique()
    if len(twice):
        raise DataError(
            f"{what}: {len(twice)} gene names occur more than once (first: {', '.join(map(repr, twice[:5]))}), and "
            "genes are matched by name. Call table.var_names_make_unique() first."
        )
    if is_gene.all():
        return Genes(genes, None, {})
    n_others = int((~is_gene).sum())
    logger.info("%s: %d of %d features are not genes and are left out: %s.", what, n_others, len(is_gene), listed)
    return Genes(genes, np.flatnonzero(is_gene), {str(name): other for name, other in types[~is_gene].items()})
