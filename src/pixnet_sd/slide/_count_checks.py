"""Whether a matrix holds raw counts, told in the one pass that also sums it."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._errors import DataError

from ._counts import Counts

__all__ = ["checked_totals"]

_LOG_MAX = 20.0  # log1p of anything countable stays below


def checked_totals(counts: Counts, var_names: pd.Index, what: str) -> NDArray[np.float64]:
    """Sum over all genes of each region, and a look at every value on the way.

    Warns when the values look log-normalised: not whole, and none above 20.

    Parameters
    ----------
    counts
        Raw counts, n x G.
    var_names
        Genes, shape (G,), for messages.
    what
        Name of the table, for messages.

    Returns
    -------
    Totals, shape (n,).

    Raises
    ------
    DataError
        If a value is NaN, infinite or negative.
    """
    total = np.zeros(len(counts))
    largest, whole = 0.0, True
    for place, block in counts.blocks():
        _refuse(block, ~np.isfinite(block.data), var_names, what, "NaN or infinite", "Remove or recompute them")
        _refuse(block, block.data < 0, var_names, what, "negative", "Scaled values will not do: give raw counts")
        total[place] = _row_sums(block)
        largest = max(largest, float(block.data.max(initial=0)))
        whole = whole and bool((block.data == np.rint(block.data)).all())
    if not whole and largest < _LOG_MAX:
        _warn_logged(largest, what)
    return total


def _row_sums(block: sparse.csr_matrix) -> NDArray[np.float64]:
    """Sums in 64 bits; those of SciPy stay in the 32 bits of the values, whatever dtype is asked for."""
    row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    return np.bincount(row, block.data, block.shape[0]).astype(np.float64)


def _refuse(
    block: sparse.csr_matrix, bad: NDArray[np.bool_], var_names: pd.Index, what: str, how: str, remedy: str
) -> None:
    if bad.any():
        gene = var_names[block.indices[np.flatnonzero(bad)[0]]]
        found = f"{int(bad.sum())} in {block.shape[0]} rows, the first for gene {gene!r}"
        raise DataError(f"{what}: X holds {how} values ({found}). {remedy}.")


def _warn_logged(largest: float, what: str) -> None:
    warnings.warn(
        f"{what}: X looks log-normalised already (values that are not whole, largest {largest:.3g}), and will be "
        "normalised and logged again. Put raw counts there, for instance table.X = table.layers['counts'] or "
        "table.raw.X.",
        UserWarning,
        stacklevel=6,
    )
