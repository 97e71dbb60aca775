"""Measured expression as it is compared with a gene map: regions of a view, and their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd.nn.regions import Regions
from pixnet_sd.slide import (
    Measured,
    Slide,
    bin_lattice,
    checked_blocks,
    log_normalise,
    measured,
    measured_tables,
    select_tables,
)

from ._view import View

__all__ = ["MeasuredView", "measured_view", "table_to_draw"]

TOTAL = "total_counts"


@dataclass(frozen=True, eq=False)
class MeasuredView:
    """Regions that a view shows.

    Attributes
    ----------
    regions
        n regions, px of the image.
    values
        Shape (genes, n); NaN where a gene was not measured, or a region has no counts to normalise.
    what
        What the regions are, for a title.
    """

    regions: Regions
    values: NDArray[np.float32]
    what: str


def table_to_draw(sdata: SpatialData, slide: Slide, table_key: str | None) -> str | None:
    """The table that is named, the coarsest Visium HD bins, or the only table there is; None if there is none.

    Raises
    ------
    ElementError
        Several tables could be meant.
    """
    if table_key is not None:
        return table_key
    where = {"coordinate_system": slide.coordinate_system, "image_key": slide.image_key}
    return select_tables(sdata, **where)[-1] if measured_tables(sdata, **where) else None


def measured_view(
    sdata: SpatialData, slide: Slide, view: View, *, table_key: str, genes: Sequence[str], target_sum: float | None
) -> MeasuredView:
    """Measured expression in the regions that a view touches; counts of others are not read.

    Parameters
    ----------
    sdata
        The object.
    slide
        The slide, with the image's own pixels as working pixels.
    view
        What is shown.
    table_key
        Table with raw counts.
    genes
        Genes; ``total_counts`` is the sum over all of them.
    target_sum
        Values are ``log1p(target_sum * x / sum(x))``; None: counts per µm².

    Raises
    ------
    ElementError, DataError
        The table, its regions or its counts cannot be used.
    """
    (found,) = measured(sdata, slide, table_key=[table_key])
    shown = np.zeros(len(found), bool)
    shown[found.regions.touching(*view.bounds_in(np.diag([slide.mpp, slide.mpp, 1.0])))] = True
    found = found.take(shown)
    counts, total = _counts(found, genes)
    if target_sum is None:
        values = counts.T / (np.asarray(found.regions.area) * slide.mpp**2)
    else:
        values = np.where(total > 0, log_normalise(counts, total, target_sum).T, np.nan)
    values[[gene not in found.var_names and gene != TOTAL for gene in genes]] = np.nan
    bins = bin_lattice(sdata, found.element_key)
    what = f"{bins.size_um} µm bins" if bins else found.element_key
    return MeasuredView(found.regions, np.asarray(values, np.float32), what)


def _counts(found: Measured, genes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts (n, genes), 0 of genes that are not there, and totals (n,), in the order of the regions."""
    columns = found.var_names.get_indexer(pd.Index(genes))
    counts, total = np.zeros((len(found), len(genes))), np.zeros(len(found))
    known = np.flatnonzero(columns >= 0)
    for place, block, sums in checked_blocks(found.counts, found.var_names, found.what):
        total[place] = sums
        counts[place, known] = sparse.csr_matrix(block)[:, columns[known]].toarray()
    counts[:, [gene == TOTAL for gene in genes]] = total[:, None]
    return (counts, total) if found.place is None else (counts[found.place], total[found.place])
