"""What the network learns: which genes, and log-normalised expression."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger

from ._measured import Measured

__all__ = ["check_genes", "choose_genes", "log_normalise", "targets_of"]

_FIRST = 10


def log_normalise(
    counts: sparse.spmatrix | sparse.sparray | NDArray[np.generic], total: ArrayLike, target_sum: float = 1e4
) -> NDArray[np.float32]:
    """Log-normalised expression: ``log1p(target_sum * x / sum(x))``, natural logarithm.

    Parameters
    ----------
    counts
        Raw counts of the genes wanted, shape (n, M), sparse or dense.
    total
        Sum of each region over all genes of its table, not only those M, shape (n,). Where it is 0 the result is 0.
    target_sum
        Counts that every region is scaled to.

    Returns
    -------
    Targets, shape (n, M), float32.
    """
    dense = np.asarray(counts.toarray() if isinstance(counts, sparse.spmatrix | sparse.sparray) else counts)
    return np.log1p(dense * _factor(total, target_sum)[:, None]).astype(np.float32)


def _factor(total: ArrayLike, target_sum: float) -> NDArray[np.float64]:
    total = np.asarray(total, dtype=np.float64)
    return np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)


def targets_of(measured: Measured, genes: Sequence[str] | pd.Index, target_sum: float = 1e4) -> NDArray[np.float32]:
    """Targets of all regions of one table, shape (n, len(genes)).

    Parameters
    ----------
    measured
        Measured expression.
    genes
        Genes, in the order wanted.
    target_sum
        As in `log_normalise`.

    Returns
    -------
    Targets, float32.

    Raises
    ------
    DataError
        If a gene is not there.
    """
    check_genes(genes, measured.var_names, f"table {measured.table_key!r}")
    columns = measured.var_names.get_indexer(pd.Index(genes))
    return log_normalise(measured.counts.columns(columns), measured.total, target_sum)


def check_genes(genes: Iterable[str], available: Iterable[str], what: str) -> None:
    """Refuse genes that are not there, naming them and what comes close.

    Parameters
    ----------
    genes
        Genes wanted.
    available
        Genes there.
    what
        Where, for the message.

    Raises
    ------
    DataError
        If any is missing.
    """
    there = pd.Index(list(available))
    wanted = pd.Index(list(genes))
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
    n_genes: int = 250,
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
        How many, if they are not named.
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
    if n_genes < 1:
        raise DataError(f"n_genes = {n_genes}: at least one gene is needed.")
    every = {**slides, **held_out}
    mean = _mean_over_slides(slides, _shared_genes(every), target_sum)
    ranked = mean[mean > 0].reset_index().sort_values(["mean", "gene"], ascending=[False, True])["gene"]
    if ranked.empty:
        raise DataError(f"No gene is measured, with counts, in all slides: {_genes_per_slide(every)}.")
    if len(ranked) < n_genes:
        warnings.warn(
            f"{n_genes} genes were asked for, but only {len(ranked)} are in every table and have counts "
            f"({_genes_per_slide(every)}); all of them are used.",
            UserWarning,
            stacklevel=2,
        )
    logger.info("%d genes chosen by mean log-normalised expression.", min(n_genes, len(ranked)))
    return pd.Index(ranked.to_numpy()[:n_genes], dtype=object)


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
            check_genes(wanted, table.var_names, f"table {table.table_key!r} of slide {name!r}")
    mean = _mean_over_slides(slides, wanted, 1.0)
    silent = [repr(gene) for gene in mean.index[mean == 0]]
    if silent:
        listed = ", ".join(silent[:_FIRST])
        warnings.warn(
            f"{len(silent)} of the genes named have no counts in the training slides ({listed}): nothing can be learnt "
            "about them.",
            UserWarning,
            stacklevel=3,
        )
    return wanted


def _mean_over_slides(slides: Mapping[str, Sequence[Measured]], genes: pd.Index, target_sum: float) -> pd.Series:
    coarsest = [max(tables, key=_median_area) for tables in slides.values() if tables]
    means = [_mean_expression(table, genes, target_sum) for table in coarsest]
    return pd.Series(np.mean(means, axis=0), index=pd.Index(genes, name="gene"), name="mean")


def _median_area(measured: Measured) -> float:
    return float(np.median(measured.regions.area))


def _mean_expression(measured: Measured, genes: pd.Index, target_sum: float) -> NDArray[np.float64]:
    """Mean log-normalised expression of some genes, kept sparse: log1p(0) = 0."""
    columns = measured.var_names.get_indexer(genes)
    factor = _factor(measured.total, target_sum)
    total = np.zeros(measured.counts.n_genes)
    for place, block in measured.counts.blocks():
        scaled = np.log1p(block.data * np.repeat(factor[place], np.diff(block.indptr)))
        total += np.bincount(block.indices, scaled, measured.counts.n_genes)
    return total[columns] / len(measured)
