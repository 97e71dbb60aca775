"""Measured expression on a slide: regions, their counts, and what is wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet_sd._errors import DataError
from pixnet_sd.nn.regions import Circles, LabelGrid, Polygons

from ._checks import check_regions_on_image
from ._count_checks import checked_totals
from ._counts import Counts
from ._regions import regions_of
from ._tables import TableLink, select_tables, table_link

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["Frame", "Measured", "measured"]


class Frame(Protocol):
    """What placing regions needs of a slide (`Slide` has it)."""

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
        n regions, working px.
    instances
        Instance id of each region, shape (n,).
    counts
        Raw counts, n x G, in the order of `regions`.
    var_names
        Genes, shape (G,).
    total
        Sum over all G genes, positive, shape (n,).
    """

    table_key: str
    element_key: str
    regions: Circles | Polygons | LabelGrid
    instances: pd.Index
    counts: Counts
    var_names: pd.Index
    total: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.total)

    def take(self, keep: NDArray[np.bool_]) -> Measured:
        """The regions for which `keep` is true."""
        if keep.all():
            return self
        return replace(
            self,
            regions=self.regions.subset(np.flatnonzero(keep)),
            instances=self.instances[keep],
            counts=self.counts.take(keep),
            total=self.total[keep],
        )


def measured(sdata: SpatialData, slide: Frame, *, table_key: str | Sequence[str] | None = None) -> list[Measured]:
    """Measured expression on a slide, one entry a table.

    Rows and regions are joined by instance id. Rows without a region, regions off the image, and regions without a
    single count are left out with a warning; regions without a row are left out silently.

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
        If counts, gene names, geometries or ids cannot be used.
    """
    keys = select_tables(sdata, table_key=table_key, coordinate_system=slide.coordinate_system)
    return [_measured(sdata, slide, key) for key in keys]


def _measured(sdata: SpatialData, slide: Frame, table_key: str) -> Measured:
    what = f"Table {table_key!r}"
    table = sdata.tables[table_key]
    link = table_link(sdata, table_key=table_key, coordinate_system=slide.coordinate_system)
    _check_genes(table.var_names, what)
    regions, ids = regions_of(
        sdata, link.element_key, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system
    )
    has_region, place = _join(link, ids)
    found = Measured(
        table_key=table_key,
        element_key=link.element_key,
        regions=regions.subset(place),
        instances=link.instances[has_region],
        counts=Counts.of(table.X, link.rows[has_region], what),
        var_names=table.var_names,
        total=np.zeros(len(place)),
    )
    height, width = slide.working_shape
    on_image = check_regions_on_image(
        found.regions.bounds, width=width, height=height, what=f"{what}, element {link.element_key!r}"
    )
    return _without_empty(found.take(on_image), what)


def _check_genes(var_names: pd.Index, what: str) -> None:
    twice = var_names[var_names.duplicated()].unique()
    if len(twice):
        first = ", ".join(map(repr, twice[:5]))
        raise DataError(
            f"{what}: {len(twice)} gene names occur more than once (first: {first}), and genes are matched by name. "
            "Call table.var_names_make_unique() first."
        )


def _join(link: TableLink, ids: pd.Index) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows of a link have a region, and where it is among the regions."""
    place = ids.get_indexer(link.instances)
    has_region = place >= 0
    lost = int((~has_region).sum())
    if lost == len(place):
        raise DataError(
            f"Table {link.table_key!r}: none of its {lost} instance ids (such as {link.instances.tolist()[0]!r}) is in "
            f"element {link.element_key!r} (ids such as {ids.tolist()[0]!r}). Both must hold the same ids, of the same "
            "type."
        )
    if lost:
        warnings.warn(
            f"Table {link.table_key!r}: {lost} of {len(place)} rows have no region in element {link.element_key!r} "
            f"(first {link.instances[~has_region].tolist()[0]!r}) and are left out.",
            UserWarning,
            stacklevel=4,
        )
    return has_region, place[has_region].astype(np.int64)


def _without_empty(found: Measured, what: str) -> Measured:
    found = replace(found, total=checked_totals(found.counts, found.var_names, what))
    empty = found.total == 0
    if empty.all():
        raise DataError(f"{what}: all {len(empty)} regions on the image have no counts at all.")
    if empty.any():
        warnings.warn(
            f"{what}: {int(empty.sum())} of {len(empty)} regions have no counts at all and are left out.",
            UserWarning,
            stacklevel=4,
        )
    return found.take(~empty)
