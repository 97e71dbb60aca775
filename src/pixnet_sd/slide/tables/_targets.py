"""Targets of millions of regions: counts on disk, normalised when a tile asks for them.

What the network learns: which genes, and log-normalised expression or raw counts of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Regions

from ._cache import CountFile, find_pooling, own_counts, pooled_counts
from ._counts import check_kind, checked_blocks, log_values, target_rows
from ._kind import Look
from ._measured import Measured

__all__ = ["StoredTargets", "Targets", "check_genes", "choose_genes", "targets_of"]


@dataclass(frozen=True, eq=False)
class StoredTargets:
    """What is learnt of n regions, looked up like an array of (n, M); any number of threads may at once.

    Attributes
    ----------
    counts
        Counts on disk.
    index
        Row of each region there, shape (n,); None for all rows.
    target_sum
        Of log-normalised expression; None: raw counts, and their sum over all genes in one more column.
    """

    counts: CountFile
    index: NDArray[np.int32] | None
    target_sum: float | None

    def __len__(self) -> int:
        return self.counts.n if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, M)."""
        return len(self), self.counts.n_genes + (self.target_sum is None)

    def __getitem__(self, index: NDArray[np.integer]) -> NDArray[np.float32]:
        """Targets of some regions, shape (len(index), M); quickest in the order of the regions."""
        dense: NDArray[np.float32] = self.rows(index).toarray()
        return dense

    def rows(self, index: NDArray[np.integer]) -> sparse.csr_matrix:
        """The same as a sparse matrix."""
        index = np.asarray(index)
        return target_rows(*self.counts.rows(index if self.index is None else self.index[index]), self.target_sum)

    def subset(self, index: NDArray[np.integer]) -> StoredTargets:
        """Targets of some regions, still on disk."""
        index = np.asarray(index)
        return replace(self, index=index.astype(np.int32) if self.index is None else self.index[index])

    def mean(self, axis: int = 0) -> NDArray[np.float64]:
        """Mean over regions, shape (M,)."""
        if axis != 0:
            raise IndexError(f"axis {axis}: means of stored targets are over regions, axis 0")
        total = np.zeros(self.shape[1])
        for counts, sums in self.counts.blocks(self.index):
            total += np.asarray(target_rows(counts, sums, self.target_sum).sum(axis=0, dtype=np.float64))[0]
        return total / len(self)


_FIRST = 10
_AREAS = 1001
_DENSE_BYTES = 2**28
_MIN_COUNTS = 10


@dataclass(frozen=True, eq=False)
class Targets:
    """What is learnt of the regions of one table.

    Attributes
    ----------
    regions
        n regions, working px.
    values
        Log-normalised expression, shape (n, M), or raw counts and their sum over all genes, shape (n, M + 1), float32:
        an array, or one that is looked up on disk.
    """

    regions: Regions
    values: NDArray[np.float32] | StoredTargets


def targets_of(
    slides: Mapping[str, Sequence[Measured]],
    genes: Sequence[str] | pd.Index,
    target_sum: float,
    cache: Path,
    objective: str = "mse_pcc",
) -> dict[str, list[Targets]]:
    """Targets of the tables of each slide.

    Regions without a single count have no log-normalised expression, and are left out with a warning; as counts they
    are zeros like others.

    What takes less than 256 MiB is held in memory. Of more, compact counts are written to disk, and the targets of a
    tile computed from them when it is its turn; a table that is the exact sum of a finer one's bins is then summed
    from these, and not read.

    Parameters
    ----------
    slides
        Measured expression by slide.
    genes
        Genes, in the order wanted.
    target_sum
        As in `log_normalise`.
    cache
        Folder for compact counts.
    objective
        What targets are for: log-normalised expression with ``"mse_pcc"``, else raw counts and their sum.

    Returns
    -------
    Targets by slide, in the order of its tables.

    Raises
    ------
    DataError
        A gene is not there; a count is NaN, infinite or negative; a table has no counts, or, where counts are what is
        learnt, holds something else.
    StoreError
        Compact counts cannot be written.
    """
    wanted = pd.Index(genes)
    for table in _tables(slides):
        check_genes(wanted, table.var_names, f"table {table.table_key!r}", table.others)
    n_bytes = sum(len(table) for table in _tables(slides)) * len(wanted) * np.dtype(np.float32).itemsize
    learnt = _Learnt(wanted, target_sum if objective == "mse_pcc" else None, objective)
    if n_bytes <= _DENSE_BYTES:
        return {name: [_dense(table, learnt) for table in tables] for name, tables in slides.items()}
    return {name: _stored(tables, learnt, cache) for name, tables in slides.items()}


class _Learnt(NamedTuple):
    """Genes, and what of them: log-normalised expression, or with `target_sum` None counts."""

    genes: pd.Index
    target_sum: float | None
    objective: str


def _dense(measured: Measured, learnt: _Learnt) -> Targets:
    genes, target_sum, objective = learnt
    columns, look = measured.var_names.get_indexer(genes), Look()
    total, values = np.zeros(len(measured)), np.zeros((len(measured), len(genes) + (target_sum is None)), np.float32)
    for place, block, sums in checked_blocks(measured.counts, measured.var_names, measured.what, look):
        total[place], values[place] = sums, target_rows(_picked(block, columns), sums, target_sum).toarray()
    check_kind(look.kind, look.largest, measured.what, objective)
    if measured.place is not None:
        total, values = total[measured.place], values[measured.place]
    usable = _usable(total, target_sum, measured.what)
    if usable is None:
        return Targets(measured.regions, values)
    return Targets(measured.regions.subset(np.flatnonzero(usable)), values[usable])


def _picked(block: sparse.csr_matrix, columns: NDArray[np.intp]) -> sparse.csr_matrix:
    return block[:, columns].astype(np.float32)  # as compact counts are


def _stored(tables: Sequence[Measured], learnt: _Learnt, cache: Path) -> list[Targets]:
    """Targets of one slide's tables, the finest first, so that others can be pooled from it."""
    genes, target_sum, objective = learnt
    files: dict[int, CountFile] = {}
    own: list[int] = []
    for k in sorted(range(len(tables)), key=lambda k: median_area(tables[k].regions)):
        pooled = next((f for o in own if (f := _pooled(tables[o], files[o], tables[k], cache)) is not None), None)
        if pooled is None:
            own.append(k)
        files[k] = own_counts(tables[k], genes, cache) if pooled is None else pooled
        check_kind(files[k].kind, files[k].largest, tables[k].what, objective)
    return [_with_counts(table, StoredTargets(files[k], None, target_sum)) for k, table in enumerate(tables)]


def _pooled(fine: Measured, counts: CountFile, coarse: Measured, cache: Path) -> CountFile | None:
    """Counts of a table from those of a finer one, if they are their sums."""
    pooling, why_not = find_pooling(fine, coarse)
    if pooling is None:
        logger.info("%s is not pooled from %r: %s.", coarse.what, fine.table_key, why_not)
        return None
    logger.info("%s is the sum of the bins of %r, and pooled from them.", coarse.what, fine.table_key)
    return pooled_counts(counts, pooling, cache, coarse.what)


def _with_counts(measured: Measured, values: StoredTargets) -> Targets:
    usable = _usable(values.counts.totals(), values.target_sum, measured.what)
    if usable is None:
        return Targets(measured.regions, values)
    index = np.flatnonzero(usable)
    return Targets(measured.regions.subset(index), values.subset(index))


def _usable(total: NDArray[np.float64], target_sum: float | None, what: str) -> NDArray[np.bool_] | None:
    """Which regions can be learnt from; None for all."""
    has_counts = total > 0
    empty = int((~has_counts).sum())
    if empty == len(total):
        raise DataError(_no_counts(what, empty))
    if not empty or target_sum is None:
        return None
    message = f"{what}: {empty} of {len(total)} regions have no counts at all and are left out."
    warn(message)
    return np.asarray(has_counts)


def check_genes(
    genes: Iterable[str], available: Iterable[str], what: str, others: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuse genes that are not there, naming them and what comes close, and what is there but no gene.

    Parameters
    ----------
    genes
        Genes wanted.
    available
        Genes there.
    what
        Where, for the message.
    others
        Features there that are no genes, and what each is.

    Raises
    ------
    DataError
        If any is missing.
    """
    there = pd.Index(list(available))
    wanted = pd.Index(list(genes))
    no_gene = [f"{name!r} ({others[name]!r})" for name in wanted if name in others and name not in there]
    if no_gene:
        raise DataError(
            f"{len(no_gene)} of {len(wanted)} genes= are no genes in {what}, by var['feature_types']: "
            f"{', '.join(no_gene[:_FIRST])}. Only gene expression is learnt and scored: leave them out of genes=."
        )
    missing = wanted[~wanted.isin(there)]
    if len(missing):
        more = f" and {len(missing) - _FIRST} more" if len(missing) > _FIRST else ""
        listed = ", ".join(_with_close_match(gene, there) for gene in missing[:_FIRST])
        raise DataError(f"{len(missing)} of {len(wanted)} genes are not in {what}: {listed}{more}.")


def _with_close_match(gene: str, there: pd.Index) -> str:
    same = there[there.str.lower() == str(gene).lower()]
    close = list(same[:1]) or difflib.get_close_matches(str(gene), list(there), n=1)
    return f"{gene!r} (there is {close[0]!r})" if close else repr(gene)


def choose_genes(
    slides: Mapping[str, Sequence[Measured]],
    *,
    held_out: Mapping[str, Sequence[Measured]] = MappingProxyType({}),
    n_genes: int | None = 250,
    genes: Sequence[str] | None = None,
    target_sum: float = 1e4,
) -> pd.Index:
    """Genes to learn: those named, else those with the highest mean expression among the genes of every table.

    The mean is over log-normalised expression, of each slide's coarsest regions, then over slides with equal weight.
    Ties go by name. A gene without any count is never chosen.

    Parameters
    ----------
    slides
        Measured expression of each training slide, by name.
    held_out
        Of slides that are only scored on: their tables must have the genes, and say nothing about their means.
    n_genes
        How many, if they are not named; None: all with at least 10 counts in the coarsest regions of all slides.
    genes
        Genes to use, in this order.
    target_sum
        As in `log_normalise`.

    Returns
    -------
    Gene names, highest mean first, or as named.

    Raises
    ------
    DataError
        If named genes are missing or occur twice, or the slides have no gene in common with counts.
    """
    if genes is not None:
        return _named_genes(slides, held_out, [genes] if isinstance(genes, str) else list(genes))
    every = {**slides, **held_out}
    shared = _shared_genes(every)
    mean = _mean_over_slides(slides, shared, target_sum)
    if n_genes is None:
        mean = mean.where(_total_counts(slides, shared) >= _MIN_COUNTS, 0.0)
    ranked = mean[mean > 0].reset_index().sort_values(["mean", "gene"], ascending=[False, True])["gene"]
    if ranked.empty:
        raise DataError(f"No gene is measured, with counts, in all slides: {_genes_per_slide(every)}.")
    chosen = pd.Index(ranked.to_numpy()[:n_genes], dtype=object)
    few = "" if n_genes is None or len(chosen) == n_genes else f", all that there are ({_genes_per_slide(every)})"
    logger.info("%d genes chosen by mean log-normalised expression%s.", len(chosen), few)
    return chosen


def _tables(slides: Mapping[str, Sequence[Measured]]) -> list[Measured]:
    return [table for tables in slides.values() for table in tables]


def _shared_genes(slides: Mapping[str, Sequence[Measured]]) -> pd.Index:
    first, *others = _tables(slides)
    shared = pd.Index(first.var_names, dtype=object)
    for table in others:
        shared = shared[shared.isin(table.var_names)]
    return shared


def _genes_per_slide(slides: Mapping[str, Sequence[Measured]]) -> str:
    listed = (f"{name!r}: {t.table_key!r} {len(t.var_names)}" for name, tables in slides.items() for t in tables)
    return "genes by slide and table: " + ", ".join(listed)


def _named_genes(
    slides: Mapping[str, Sequence[Measured]], held_out: Mapping[str, Sequence[Measured]], genes: list[str]
) -> pd.Index:
    wanted = pd.Index(genes, dtype=object)
    twice = wanted[wanted.duplicated()].unique()
    if len(twice) or not len(wanted):
        raise DataError(f"genes= must name each gene once and at least one; named twice: {list(twice[:_FIRST])}.")
    for name, tables in {**slides, **held_out}.items():
        for table in tables:
            check_genes(wanted, table.var_names, f"table {table.table_key!r} of slide {name!r}", table.others)
    mean = _mean_over_slides(slides, wanted, 1.0)
    silent = [repr(gene) for gene in mean.index[mean == 0]]
    if silent:
        listed = ", ".join(silent[:_FIRST])
        warn(
            f"{len(silent)} of the genes named have no counts in the training slides ({listed}): nothing can be learnt "
            "about them."
        )
    return wanted


def _mean_over_slides(slides: Mapping[str, Sequence[Measured]], genes: pd.Index, target_sum: float) -> pd.Series:
    means = [_mean_expression(table, genes, target_sum) for table in _coarsest(slides)]
    return pd.Series(np.mean(means, axis=0), index=pd.Index(genes, name="gene"), name="mean")


def _total_counts(slides: Mapping[str, Sequence[Measured]], genes: pd.Index) -> NDArray[np.float64]:
    """Counts of each gene in the coarsest regions of all slides."""
    total = np.zeros(len(genes))
    for table in _coarsest(slides):
        columns = table.var_names.get_indexer(genes)
        for _, block, _ in checked_blocks(table.counts, table.var_names, table.what):
            total += np.bincount(block.indices, block.data, table.counts.n_genes)[columns]
    return total


def _coarsest(slides: Mapping[str, Sequence[Measured]]) -> list[Measured]:
    return [max(tables, key=lambda table: median_area(table.regions)) for tables in slides.values() if tables]


def median_area(regions: Regions) -> float:
    """Median area of some thousand of the regions, px²."""
    picked = np.unique(np.linspace(0, len(regions) - 1, min(len(regions), _AREAS)).astype(np.int64))
    return float(np.median(regions.subset(picked).area))


def _mean_expression(measured: Measured, genes: pd.Index, target_sum: float) -> NDArray[np.float64]:
    """Mean log-normalised expression of some genes over the regions that have counts, kept sparse: log1p(0) = 0."""
    total, n = np.zeros(measured.counts.n_genes), 0
    for _, block, sums in checked_blocks(measured.counts, measured.var_names, measured.what):
        total += np.bincount(block.indices, log_values(block, sums, target_sum), measured.counts.n_genes)
        n += int((sums > 0).sum())
    if not n:
        raise DataError(_no_counts(measured.what, len(measured)))
    return total[measured.var_names.get_indexer(genes)] / n


def _no_counts(what: str, n: int) -> str:
    return f"{what}: all {n} regions on the image have no counts at all."
