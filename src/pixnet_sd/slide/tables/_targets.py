"""What the network learns of regions: which genes, and their log-normalised expression or raw counts.

Targets of millions of regions stay on disk as compact counts, and are normalised when a tile asks for them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Regions
from pixnet_sd.slide.elements import sample_positions

from ._cache import CountFile, find_pooling, own_counts, pooled_counts
from ._checks import Look, check_kind, checked_blocks
from ._counts import log_values, target_rows
from ._measured import Measured

Slides: TypeAlias = Mapping[str, Sequence[Measured]]  # tables with measured expression by slide

_FIRST = 10  # names that a message lists
_MEMORY_BYTES = 2**28
_MIN_COUNTS = 10


@dataclass(frozen=True, eq=False)
class StoredTargets:
    """Targets of n regions on disk, looked up like an array of (n, M), by any number of threads at once."""

    counts: CountFile
    index: NDArray[np.int32] | None  # row of each region there, shape (n,); None for all rows
    target_sum: float | None  # of log-normalised expression; None: raw counts, their sum over all genes as last column

    def __len__(self) -> int:
        return self.counts.n if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, M)."""
        return len(self), self.counts.n_genes + (self.target_sum is None)

    def __getitem__(self, index: NDArray[np.integer]) -> NDArray[np.float32]:
        """Read targets of regions, shape (len(index), M); quickest in the order of the regions."""
        return np.asarray(self.rows(index).toarray())

    def rows(self, index: NDArray[np.integer]) -> sparse.csr_matrix:
        """Read targets of regions as a sparse matrix."""
        index = np.asarray(index)
        return target_rows(*self.counts.rows(index if self.index is None else self.index[index]), self.target_sum)

    def subset(self, index: NDArray[np.integer]) -> StoredTargets:
        """Pick regions, still on disk."""
        index = np.asarray(index)
        return replace(self, index=index.astype(np.int32) if self.index is None else self.index[index])

    def mean(self, axis: int = 0) -> NDArray[np.float64]:
        """Average over regions, the only axis, shape (M,)."""
        if axis != 0:
            raise IndexError(f"axis={axis}: means of stored targets are over regions, axis 0")
        total = np.zeros(self.shape[1])
        for counts, sums in self.counts.blocks(self.index):
            total += np.asarray(target_rows(counts, sums, self.target_sum).sum(axis=0, dtype=np.float64))[0]
        return total / len(self)


class Targets(NamedTuple):
    """Regions of one table, working px, and what is learnt of them.

    Log-normalised expression, shape (n, M), or raw counts and their sum over all genes, shape (n, M + 1), float32.
    """

    regions: Regions
    values: NDArray[np.float32] | StoredTargets


def targets_of(
    slides: Slides,
    genes: Sequence[str] | pd.Index,
    target_sum: float,
    cache: Path,
    objective: str = "mse_pcc",
    *,
    memory_bytes: int = _MEMORY_BYTES,
) -> dict[str, list[Targets]]:
    """Make the targets of each slide's tables: log-normalised expression with ``"mse_pcc"``, else raw counts.

    What takes more than ``memory_bytes`` stays on disk, as compact counts in the folder ``cache``.
    """
    wanted = pd.Index(genes)
    tables = [table for of_slide in slides.values() for table in of_slide]
    for table in tables:
        check_genes(wanted, table.var_names, f"table {table.table_key!r}", table.others)
    n_bytes = sum(map(len, tables)) * len(wanted) * np.dtype(np.float32).itemsize
    scale = target_sum if objective == "mse_pcc" else None
    if n_bytes > memory_bytes:
        return {name: _stored(of_slide, wanted, scale, objective, cache) for name, of_slide in slides.items()}
    return {name: [_dense(t, wanted, scale, objective) for t in of_slide] for name, of_slide in slides.items()}


def _dense(table: Measured, genes: pd.Index, target_sum: float | None, objective: str) -> Targets:
    columns, look = table.var_names.get_indexer(genes), Look()
    total, values = np.zeros(len(table)), np.zeros((len(table), len(genes) + (target_sum is None)), np.float32)
    for place, block, sums in checked_blocks(table.counts, table.var_names, table.what, look):
        chosen = block[:, columns].astype(np.float32)  # as compact counts are
        total[place], values[place] = sums, target_rows(chosen, sums, target_sum).toarray()
    check_kind(look.kind, look.largest, table.what, objective)
    return _with_counts(table, values, total, target_sum)


def _stored(
    tables: Sequence[Measured], genes: pd.Index, target_sum: float | None, objective: str, cache: Path
) -> list[Targets]:
    """Store the targets of one slide's tables, the finest first, so that others can be pooled from it."""
    files: dict[int, CountFile] = {}
    own: list[int] = []
    for k in sorted(range(len(tables)), key=lambda k: _median_area(tables[k].regions)):
        poolings = ((files[fine], find_pooling(tables[fine], tables[k])) for fine in own)
        finer, pooling = next((each for each in poolings if each[1] is not None), (None, None))
        if finer is not None and pooling is not None:
            files[k] = pooled_counts(finer, pooling, cache, tables[k].what)
        else:
            files[k] = own_counts(tables[k], genes, cache)
            own.append(k)
        check_kind(files[k].kind, files[k].largest, tables[k].what, objective)
    values = [StoredTargets(files[k], None, target_sum) for k in range(len(tables))]
    return [_with_counts(t, v, v.counts.totals(), target_sum) for t, v in zip(tables, values, strict=True)]


def _with_counts(
    table: Measured, values: NDArray[np.float32] | StoredTargets, total: NDArray[np.float64], target_sum: float | None
) -> Targets:
    """Leave out regions without counts, which have no log-normalised expression."""
    usable = np.flatnonzero(total > 0)
    if not len(usable):
        raise DataError(f"{table.what}: all {len(table)} regions on the image have no counts at all.")
    if len(usable) == len(total) or target_sum is None:
        return Targets(table.regions, values)
    warn(f"{table.what}: {len(total) - len(usable)} of {len(total)} regions have no counts at all and are left out.")
    kept = values.subset(usable) if isinstance(values, StoredTargets) else values[usable]
    return Targets(table.regions.subset(usable), kept)


def check_genes(
    genes: Iterable[str], available: Iterable[str], what: str, others: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuse genes that are not there, naming what comes close, and features of other types than genes (``others``)."""
    known, wanted = pd.Index(list(available)), pd.Index(list(genes))
    no_gene = [f"{name!r} ({others[name]!r})" for name in wanted if name in others and name not in known]
    if no_gene:
        raise DataError(
            f"{len(no_gene)} of {len(wanted)} genes= are no genes in {what}, by var['feature_types']: "
            f"{', '.join(no_gene[:_FIRST])}. Only gene expression is learnt and scored: leave them out of genes=."
        )
    missing = wanted[~wanted.isin(known)]
    listed = []
    for gene in missing[:_FIRST]:
        same = known[known.str.lower() == str(gene).lower()]
        close = list(same[:1]) or difflib.get_close_matches(str(gene), list(known), n=1)
        listed.append(f"{gene!r} (there is {close[0]!r})" if close else repr(gene))
    if listed:
        more = f" and {len(missing) - _FIRST} more" if len(missing) > _FIRST else ""
        raise DataError(f"{len(missing)} of {len(wanted)} genes are not in {what}: {', '.join(listed)}{more}.")


def choose_genes(
    slides: Slides,
    *,
    held_out: Slides = MappingProxyType({}),
    n_genes: int | None = 250,
    genes: Sequence[str] | None = None,
    target_sum: float = 1e4,
) -> pd.Index:
    """Choose genes to learn: those named, else those of every table with the highest mean expression.

    The mean is over each training slide's coarsest regions, then over slides with equal weight; ties go by name.
    Without ``n_genes`` all are chosen that have 10 counts there. Held-out slides need the genes, but do not rank them.
    """
    every = {**slides, **held_out}
    if genes is not None:
        return _named_genes(slides, every, pd.Index([genes] if isinstance(genes, str) else list(genes), dtype=object))
    shared = reduce(pd.Index.intersection, (table.var_names for tables in every.values() for table in tables))
    mean, counts = _expression(slides, pd.Index(shared, dtype=object), target_sum)
    if n_genes is None:
        mean = mean.where(counts >= _MIN_COUNTS, 0.0)
    ranked = mean[mean > 0].reset_index().sort_values(["mean", "gene"], ascending=[False, True])["gene"]
    listed = ", ".join(f"{name!r}: {t.table_key!r} {len(t.var_names)}" for name in every for t in every[name])
    if ranked.empty:
        raise DataError(f"No gene is measured, with counts, in all slides: genes by slide and table: {listed}.")
    chosen = pd.Index(ranked.to_numpy()[:n_genes], dtype=object)
    few = "" if n_genes in (None, len(chosen)) else f", all that there are (genes by slide and table: {listed})"
    logger.info("%d genes chosen by mean log-normalised expression%s.", len(chosen), few)
    return chosen


def _named_genes(training: Slides, every: Slides, genes: pd.Index) -> pd.Index:
    twice = genes[genes.duplicated()].unique()
    if len(twice) or not len(genes):
        raise DataError(f"genes= must name each gene once and at least one; named twice: {list(twice[:_FIRST])}.")
    for name, tables in every.items():
        for table in tables:
            check_genes(genes, table.var_names, f"table {table.table_key!r} of slide {name!r}", table.others)
    _, counts = _expression(training, genes, 1.0)
    silent = [repr(gene) for gene in genes[counts == 0]]
    if silent:
        warn(
            f"{len(silent)} of the genes named have no counts in the training slides ({', '.join(silent[:_FIRST])}): "
            "nothing can be learnt about them."
        )
    return genes


def _expression(slides: Slides, genes: pd.Index, target_sum: float) -> tuple[pd.Series, NDArray[np.float64]]:
    """Average genes over slides' coarsest regions that have counts, log-normalised, and count them there."""
    means, counts = [], np.zeros(len(genes))
    for tables in filter(None, slides.values()):
        table = max(tables, key=lambda table: _median_area(table.regions))
        n, total = 0, np.zeros((2, table.counts.n_genes))
        for _, block, sums in checked_blocks(table.counts, table.var_names, table.what):
            total[0] += np.bincount(block.indices, log_values(block, sums, target_sum), len(total[0]))  # log1p(0) = 0
            total[1] += np.bincount(block.indices, block.data, len(total[1]))
            n += int((sums > 0).sum())
        if not n:
            raise DataError(f"{table.what}: all {len(table)} regions on the image have no counts at all.")
        mean, count = total[:, table.var_names.get_indexer(genes)]
        means.append(mean / n)
        counts += count
    return pd.Series(np.mean(means, axis=0), index=pd.Index(genes, name="gene"), name="mean"), counts


def _median_area(regions: Regions) -> float:
    """Take the median area of some of the regions, px²."""
    return float(np.median(regions.subset(sample_positions(len(regions))).area))
