"""Log-normalisation of counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

__all__ = ["log_normalise", "log_values"]


def log_normalise(
    counts: sparse.spmatrix | sparse.sparray | NDArray[np.generic], total: ArrayLike, target_sum: float = 1e4
) -> NDArray[np.float32]:
    """Log-normalised expression: ``log1p(target_sum * x / sum(x))``, natural logarithm.

    Parameters
    ----------
    counts
        Raw counts of the genes wanted, shape (n, M), sparse (no value stored twice) or dense.
    total
        Sum of each region over all genes of its table, not only those M, shape (n,). Where it is 0 the result is 0.
    target_sum
        Counts that every region is scaled to.

    Returns
    -------
    Targets, shape (n, M), float32.
    """
    rows = sparse.csr_matrix(counts)
    values = log_values(rows, total, target_sum).astype(np.float32)
    dense: NDArray[np.float32] = sparse.csr_matrix((values, rows.indices, rows.indptr), shape=rows.shape).toarray()
    return dense


def log_values(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float) -> NDArray[np.float64]:
    """Log-normalised expression of the stored values alone: that of a zero is zero."""
    total = np.asarray(total, dtype=np.float64)
    factor = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr))))
