"""Measured expression on a slide: which regions have counts, and where these are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons
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
)

from ._counts import Counts
from ._kind import Genes, genes_of
from ._select import select_tables

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["Frame", "Measured", "counts_of", "measured"]

_MANY_ROWS = 1_000_000


class Frame(Protocol):
    """What placing regions needs of a slide (`Slide` has it)."""

    @property
    def image_key(self) -> str | None:
        """The slide image."""

    @property
    def coordinate_system(self) -> str:
        """Coordinate system in which image and regions meet."""

    @property
    def working_from_system(self) -> NDArray[np.float64]:
        """Map of (x, y, 1) from there to working px, shape (3, 3)."""

    @property
    def working_shape(self) -> tuple[int, int]:
        """Rows and columns of the slide in working px."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Expression measured in regions of one slide.

    Attributes
    ----------
    table_key, element_key
        The table, and the shapes or labels that it annotates.
    regions
        n regions, working px: of bins their lattice, in row-major order of it.
    instances
        Instance id of each region, shape (n,).
    counts
        Raw counts, n x G, in the order of the table's rows.
    place
        Which row of `counts` each region has, shape (n,); None when `regions` are in that order too.
    var_names
        Genes, shape (G,).
    is_complete
        Whether every row of the table that annotates the element is among them.
    others
        Features that were measured and are no genes, such as antibodies, and what each is.
    """

    table_key: str
    element_key: str
    regions: Lattice | Circles | Polygons | LabelGrid
    instances: pd.Index
    counts: Counts
    place: NDArray[np.int32] | None
    var_names: pd.Index
    is_complete: bool = True
    others: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def what(self) -> str:
        """Its name, for messages."""
        return f"Table {self.table_key!r}"

    def take(self, keep: NDArray[np.bool_]) -> Measured:
        """The regions for which `keep` is true."""
        if keep.all():
            return self
        kept, place = keep, None
        if self.place is not None:
            kept = np.zeros(len(self), bool)
            kept[self.place[keep]] = True
            place = (np.cumsum(kept, dtype=np.int32) - 1)[self.place[keep]]
        return replace(
            self,
            regions=self.regions.subset(np.flatnonzero(keep)),
            instances=self.instances[keep],
            counts=self.counts.take(kept),
            place=place,
            is_complete=False,
        )

    def rows(self, index: NDArray[np.integer]) -> sparse.csr_matrix:
        """Counts of some regions in memory, all genes, in the order asked for."""
        wanted = index if self.place is None else self.place[index]
        ascending, back = np.unique(wanted, return_inverse=True)
        parts = [block for _, block in self.counts.take(ascending).blocks()]
        return sparse.vstack(parts, format="csr")[back]


def measured(sdata: SpatialData, slide: Frame, *, table_key: str | Sequence[str] | None = None) -> list[Measured]:
    """Measured expression on a slide, one entry a table.

    Rows and regions are joined by instance id. Rows without a region and regions off the image are left out with a
    warning; regions without a row are left out silently. Bins are points of the lattice that their table's
    ``array_row`` and ``array_col`` tell, and no polygon of them is looked at but for a sample; everything else is taken
    as drawn. No counts are read.

    Parameters
    ----------
    sdata
        The object to look in.
    slide
        Where the image is.
    table_key
        Tables to use; see `select_tables` for what is found without.

    Returns
    -------
    One entry a table, bins in order of their size.

    Raises
    ------
    ElementError
        If tables or the elements that they annotate cannot be told.
    ResolutionError
        If regions do not lie on the image.
    DataError
        If gene names, geometries or ids cannot be used, or there is no matrix of numbers.
    """
    keys = select_tables(
        sdata, table_key=table_key, coordinate_system=slide.coordinate_system, image_key=slide.image_key
    )
    found = [_measured(sdata, slide, key) for key in keys]
    taken = ", ".join(f"{each.table_key!r} ({len(each):,} regions of {each.element_key!r})" for each in found)
    logger.info("Measured expression: tables %s.", taken)
    return found


def _measured(sdata: SpatialData, slide: Frame, table_key: str) -> Measured:
    what = f"Table {table_key!r}"
    table = tables_of(sdata)[table_key]
    _warn_if_costly(sdata, table_key)
    link = table_link(sdata, table_key=table_key, coordinate_system=slide.coordinate_system)
    genes = genes_of(table, what)
    regions, rows, instances = _bins(sdata, link, slide) or _drawn(sdata, link, slide)
    counts, order = _ascending(rows)
    found = Measured(
        table_key=table_key,
        element_key=link.element_key,
        regions=regions,
        instances=instances,
        counts=counts_of(table, counts, genes, what),
        place=order,
        var_names=genes.names,
        is_complete=len(rows) == len(link.rows),
        others=genes.others,
    )
    height, width = slide.working_shape
    on_image = check_regions_on_image(
        found.regions, width=width, height=height, what=f"{what}, element {link.element_key!r}"
    )
    return found.take(on_image)


def counts_of(table: Table, rows: ArrayLike, genes: Genes, what: str) -> Counts:
    """Counts of the genes of a table in some of its rows."""
    files = table.path / "X" if isinstance(table, StoredTable) else None
    return Counts.of(table.X, rows, what, files, genes.columns)


Located = tuple[Lattice | Circles | Polygons | LabelGrid, NDArray[np.int32], pd.Index]
"""Regions, the table's row of each, and the instance id of each."""


def _bins(sdata: SpatialData, link: TableLink, slide: Frame) -> Located | None:
    bins = bins_of_table(sdata, link, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system)
    if bins is None:
        return None
    drawn = shapes_of(sdata).get(link.element_key)
    if drawn is None or same_ids(drawn.index, bins.instances):
        return bins.lattice, bins.rows, bins.instances
    has_region = bins.instances.isin(drawn.index)
    _warn_of_lost(link, bins.instances, has_region, drawn.index)
    return bins.lattice.subset(np.flatnonzero(has_region)), bins.rows[has_region], bins.instances[has_region]


def _drawn(sdata: SpatialData, link: TableLink, slide: Frame) -> Located:
    regions, ids = regions_of(
        sdata, link.element_key, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system
    )
    place = ids.get_indexer(link.instances)
    has_region = place >= 0
    _warn_of_lost(link, link.instances, has_region, ids)
    return regions.subset(place[has_region]), link.rows[has_region], link.instances[has_region]


def _ascending(rows: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    """Rows in order, and which of them each of the rows given is; None if they are in order."""
    if (rows[1:] > rows[:-1]).all():
        return rows, None
    order = np.argsort(rows, kind="stable").astype(np.int32)
    place = np.empty(len(rows), np.int32)
    place[order] = np.arange(len(rows), dtype=np.int32)
    return rows[order], place


def _warn_if_costly(sdata: SpatialData, table_key: str) -> None:
    if sdata.path is None or table_key not in sdata.tables or sdata.tables[table_key].n_obs < _MANY_ROWS:
        return
    logger.warning(
        "table %r with its %.1f million rows, and its shapes if loaded, are in memory though the store has them: "
        "pixnet_sd.io.open_store(%r) leaves them on disk and needs a fraction of the memory.",
        *(table_key, sdata.tables[table_key].n_obs / 1e6, str(sdata.path)),
    )


def _warn_of_lost(link: TableLink, instances: pd.Index, has_region: NDArray[np.bool_], ids: pd.Index) -> None:
    lost = int((~has_region).sum())
    if lost == len(has_region):
        raise DataError(
            f"Table {link.table_key!r}: none of its {lost} instance ids (such as {instances[:1].tolist()[0]!r}) is in "
            f"element {link.element_key!r} (ids such as {ids[:1].tolist()[0]!r}). Both must hold the same ids, of the "
            "same type."
        )
    if lost:
        warn(
            f"Table {link.table_key!r}: {lost} of {len(has_region)} rows have no region in element "
            f"{link.element_key!r} (first {instances[~has_region][:1].tolist()[0]!r}) and are left out."
        )
