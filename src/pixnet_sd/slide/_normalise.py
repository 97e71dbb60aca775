"""Log-normalisation of counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

__all__ = ["log_normalise", "log_values", "target_rows"]


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
    dense: NDArray[np.float32] = target_rows(sparse.csr_matrix(counts), total, target_sum).toarray()
    return dense


def target_rows(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float | None) -> sparse.csr_matrix:
    """What is learnt of some regions, as sparse as their counts.

    Parameters
    ----------
    counts, total
        As in `log_normalise`.
    target_sum
        As in `log_normalise`; None: raw counts, with the total as one more column.

    Returns
    -------
    float32, shape (n, M), or (n, M + 1).
    """
    if target_sum is None:
        last = sparse.csr_matrix(np.asarray(total, dtype=np.float64)[:, None])
        return sparse.hstack([counts, last], format="csr", dtype=np.float32)
    values = log_values(counts, total, target_sum).astype(np.float32)
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def log_values(counts: sparse.csr_matrix, total: ArrayLike, target_sum: float) -> NDArray[np.float64]:
    """Log-normalised expression of the stored values alone: that of a zero is zero."""
    total = np.asarray(total, dtype=np.float64)
    factor = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr))))
