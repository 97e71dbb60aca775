"""Whether a matrix holds what is needed, told in the one pass that also sums it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._errors import DataError
from pixnet_sd._warn import warn

from ._count_kind import Kind, Look
from ._counts import Counts

__all__ = ["check_kind", "checked_blocks", "checked_totals"]

_MOST = 2**31  # no region has more counts of a gene
_EXACT, _EXACT_HALF = 2**24, 2**11  # whole numbers up to which 32 bits, and 16, hold each
_LOG_MAX = 20.0  # log1p of anything countable stays below
_RAW = "Put raw counts there, for instance table.X = table.layers['counts'] or table.raw.X."
_IS: dict[Kind, str] = {
    "normalised": "counts that were scaled or normalised",
    "logged": "logarithms",
    "rooted": "square roots",
    "other": "values that are neither whole nor about whole",
}


def checked_blocks(
    counts: Counts, var_names: pd.Index, what: str, look: Look | None = None
) -> Iterator[tuple[slice, sparse.csr_matrix, NDArray[np.float64]]]:
    """Blocks of rows, with a look at every value on the way.

    Parameters
    ----------
    counts
        Raw counts, n x G.
    var_names
        Genes, shape (G,), for messages.
    what
        Name of the table, for messages.
    look
        Takes the values in.

    Yields
    ------
    Place among the rows, counts, and the sum over all genes of each row.

    Raises
    ------
    DataError
        If a value is NaN, infinite, negative, or larger than any count or than its type holds exactly.
    """
    for place, block in counts.blocks():
        rows = counts.rows[place]
        for bad, how, remedy in _faults(block.data, counts.is_half):
            if bad.any():
                raise DataError(_where(block, bad, rows, var_names, what, how, remedy))
        if look is not None:
            look.at(block)
        yield place, block, _row_sums(block)


def _faults(values: NDArray[Any], is_half: bool) -> Iterator[tuple[NDArray[np.bool_], str, str]]:
    yield ~np.isfinite(values), "NaN or infinite", "Remove or recompute them"
    yield values < 0, "negative", "Scaled values will not do: give raw counts"
    yield values > _MOST, "absurdly large", "No region has more than 2³¹ counts of a gene: remove or recompute them"
    if is_half:
        remedy = "16 bits do not hold counts above 2,048 exactly: read the table again with X in 32 bits"
        yield values > _EXACT_HALF, "inexact", remedy


def checked_totals(counts: Counts, var_names: pd.Index, what: str) -> NDArray[np.float64]:
    """Sum over all genes of each region; warns when the values are logarithms already.

    Parameters and errors are those of `checked_blocks`.

    Returns
    -------
    Totals, shape (n,).
    """
    look, total = Look(), np.zeros(len(counts))
    for place, _, sums in checked_blocks(counts, var_names, what, look):
        total[place] = sums
    check_kind(look.kind, look.largest, what)
    return total


def _row_sums(block: sparse.csr_matrix) -> NDArray[np.float64]:
    """Sums in 64 bits; those of SciPy stay in the 32 bits of the values, whatever dtype is asked for."""
    row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    return np.bincount(row, block.data, block.shape[0]).astype(np.float64)


def _where(
    block: sparse.csr_matrix,
    bad: NDArray[np.bool_],
    rows: NDArray[np.integer],
    var_names: pd.Index,
    what: str,
    how: str,
    remedy: str,
) -> str:
    first = int(np.flatnonzero(bad)[0])
    gene, row = var_names[block.indices[first]], rows[np.searchsorted(block.indptr, first, side="right") - 1]
    found = f"{int(bad.sum())} in {block.shape[0]} rows, first {block.data[first]:g} for gene {gene!r} in row {row}"
    return f"{what}: X holds {how} values ({found}). {remedy}."


def check_kind(kind: Kind, largest: float, what: str, objective: str = "mse_pcc") -> None:
    """Refuse, or warn of, a table whose values are not what is learnt from.

    Parameters
    ----------
    kind, largest
        What the values of the table are, and the largest of them, as `Look` says.
    what
        Name of the table, for messages.
    objective
        What they are for: ``"mse_pcc"`` takes counts to log-normalised expression, so that a factor of each region
        does not matter; the others are likelihoods of counts.

    Raises
    ------
    DataError
        If a likelihood of counts is to be learnt from anything else.
    """
    if largest > _EXACT:
        warn(f"{what}: X has values up to {largest:.0f}; above {_EXACT} they are rounded to 32 bits.")
    if objective != "mse_pcc":
        _check_counts(kind, what, objective)
    elif kind in ("logged", "rooted"):
        warn(f"{what}: X holds {_IS[kind]} already, and they will be normalised and logged again. {_RAW}")
    elif kind == "other" and largest < _LOG_MAX:
        warn(f"{what}: X holds {_IS[kind]}, none above {_LOG_MAX:.0f}. If they are logarithms: {_RAW.lower()}")


def _check_counts(kind: Kind, what: str, objective: str) -> None:
    if kind in _IS:
        raise DataError(
            f"{what}: X holds {_IS[kind]}, and objective={objective!r} is a likelihood of raw counts. {_RAW} Corrected "
            "counts can be rounded, table.X = np.rint(table.X); objective='mse_pcc' does without."
        )
    if kind == "corrected":
        warn(f"{what}: X holds counts that are not whole, as destriping leaves them, and they are taken as they are.")
    if kind == "multiples":
        warn(f"{what}: X holds whole numbers with a common divisor, so they may be counts times a factor. {_RAW}")
