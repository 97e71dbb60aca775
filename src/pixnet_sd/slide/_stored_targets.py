"""Targets of millions of regions: counts on disk, normalised when a tile asks for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ._count_file import CountFile
from ._normalise import target_rows

__all__ = ["StoredTargets"]


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
