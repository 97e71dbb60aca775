"""Measured expression on a slide: regions that have counts, and which features of their tables are genes.

Antibodies, guides and controls are measured too, and are not expression: they are neither learnt nor part of totals.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons
from pixnet_sd.slide import Slide
from pixnet_sd.slide.elements import (
    StoredTable,
    Table,
    TableLink,
    bins_of_table,
    check_regions_on_image,
    regions_of,
    same_ids,
    shapes_of,
    table_link,
    tables_of,
    var_column,
    var_columns_of,
)

from ._counts import Counts
from ._select import select_tables

if TYPE_CHECKING:
    from spatialdata import SpatialData


_MANY_ROWS = 1_000_000
_TYPE_COLUMNS = ("feature_types", "feature_type")
_EXPRESSION = {"gene expression", "gene", "genes", "rna", "mrna", "gex", "transcript", "expression"}
_CONTROL = re.compile(
    r"(neg(ative)?[ _-]?(control|prb|ctrl)?([ _-]?(probe|codeword))?|blank|system[ _-]?control|false[ _-]?code"
    r"|(unassigned|deprecated)[ _-]?codeword)[ _-]?\d+",
    re.IGNORECASE,
)
"""Names of controls of Xenium, CosMx and MERSCOPE: `NegControlProbe_00042`, `BLANK_0100`, `NegPrb3`, `Negative12`."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Expression measured in n regions of one slide, as one table says."""

    table_key: str
    element_key: str  # shapes or labels that the table annotates
    regions: Lattice | Circles | Polygons | LabelGrid  # working px; of bins their lattice, in row-major order of it
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
        return replace(
            self,
            regions=self.regions.subset(np.flatnonzero(keep)),
            instances=self.instances[keep],
            counts=self.counts.take(keep),
            is_complete=False,
        )

    def rows(self, index: NDArray[np.integer]) -> sparse.csr_matrix:
        """Read the counts of regions, at least one, in the order of the index."""
        return self.counts.take(index).to_csr()

    def content_key(self, genes: Iterable[str]) -> str:
        """Hash all that decides about the counts of some genes: counts as stored, which rows in which order, genes."""
        digest = hashlib.sha256()
        for names in (self.var_names, genes):
            digest.update("\n".join(map(str, names)).encode())
        for piece in self.counts.content():
            digest.update(piece)
        return digest.hexdigest()


def measured(sdata: SpatialData, slide: Slide, *, table_key: str | Sequence[str] | None = None) -> list[Measured]:
    """Find measured expression on a slide, one entry a table, bins in order of their size; no counts are read.

    Rows and regions are joined by instance id. Rows without a region and regions off the image are left out with a
    warning; regions without a row are left out silently. Bins are points of the lattice that their table's
    ``array_row`` and ``array_col`` tell, and no polygon of them is looked at but for a sample; everything else is taken
    as drawn. Without ``table_key`` see `select_tables`.
    """
    keys = select_tables(
        sdata, table_key=table_key, coordinate_system=slide.coordinate_system, image_key=slide.image_key
    )
    tables = [_measured(sdata, slide, key) for key in keys]
    listed = ", ".join(f"{each.table_key!r} ({len(each):,} regions of {each.element_key!r})" for each in tables)
    logger.info("Measured expression: tables %s.", listed)
    return tables


def _measured(sdata: SpatialData, slide: Slide, table_key: str) -> Measured:
    what = f"Table {table_key!r}"
    if sdata.path is not None and table_key in sdata.tables and sdata.tables[table_key].n_obs >= _MANY_ROWS:
        logger.warning(
            "table %r with its %.1f million rows, and its shapes if loaded, are in memory though the store has them: "
            "pixnet_sd.io.open_store(%r) leaves them on disk and needs a fraction of the memory.",
            *(table_key, sdata.tables[table_key].n_obs / 1e6, str(sdata.path)),
        )
    table = tables_of(sdata)[table_key]
    link = table_link(sdata, table_key=table_key, coordinate_system=slide.coordinate_system)
    genes = genes_of(table, what)
    regions, rows, instances = _located(sdata, link, slide)
    every = Measured(
        table_key=table_key,
        element_key=link.element_key,
        regions=regions,
        instances=instances,
        counts=counts_of(table, rows, genes, what),
        var_names=genes.names,
        is_complete=len(rows) == len(link.rows),
        others=genes.others,
    )
    height, width = slide.working_shape
    what = f"{what}, element {link.element_key!r}"
    return every.take(check_regions_on_image(regions, width=width, height=height, what=what))


def _located(
    sdata: SpatialData, link: TableLink, slide: Slide
) -> tuple[Lattice | Circles | Polygons | LabelGrid, NDArray[np.int32], pd.Index]:
    """Find the regions of a table's rows: bins on their lattice, others as drawn; with their rows and instance ids."""
    bins = bins_of_table(sdata, link, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system)
    if bins is not None:
        regions: Lattice | Circles | Polygons | LabelGrid = bins.lattice
        rows, instances = bins.rows, bins.instances
        drawn = shapes_of(sdata).get(link.element_key)
        if drawn is None or same_ids(drawn.index, instances):
            return regions, rows, instances
        ids, has_region = drawn.index, instances.isin(drawn.index)
        index = np.flatnonzero(has_region)
    else:
        regions, ids = regions_of(
            sdata, link.element_key, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system
        )
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


@dataclass(frozen=True, eq=False)
class Genes:
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
    types = _feature_types(table)
    is_gene = np.asarray(types.str.lower().str.replace("_", " ").isin(_EXPRESSION))
    listed = ", ".join(f"{n} {name!r}" for name, n in Counter(types[~is_gene]).most_common())
    if not is_gene.any():
        raise DataError(
            f"{what}: none of its {len(types)} features is a gene, by var['feature_types']: {listed}. Genes are of the "
            "type 'Gene Expression' there: correct the column, or delete it when all features are genes."
        )
    names = pd.Index(types.index[is_gene])
    twice = names[names.duplicated()].unique()
    if len(twice):
        raise DataError(
            f"{what}: {len(twice)} gene names occur more than once (first: {', '.join(map(repr, twice[:5]))}), and "
            "genes are matched by name. Call table.var_names_make_unique() first."
        )
    if is_gene.all():
        return Genes(names, None, {})
    n_others = int((~is_gene).sum())
    logger.info("%s: %d of %d features are not genes and are left out: %s.", what, n_others, len(is_gene), listed)
    return Genes(names, np.flatnonzero(is_gene), {str(name): other for name, other in types[~is_gene].items()})


def _feature_types(table: Table) -> pd.Series:
    """Tell the type of each feature, by name."""
    columns = var_columns_of(table)
    column = next((name for name in columns if re.sub(r"[^a-z]+", "_", str(name).lower()) in _TYPE_COLUMNS), None)
    names = pd.Index(table.var_names)
    if column is None:
        controls = pd.Series(names.astype(str)).str.fullmatch(_CONTROL).to_numpy()
        return pd.Series(np.where(controls, "control by its name", "Gene Expression"), index=names)
    given: Any = pd.Series(np.asarray(var_column(table, column), dtype=object), index=names)
    return given.where(given.notna(), "of no type").astype(str).str.strip()
