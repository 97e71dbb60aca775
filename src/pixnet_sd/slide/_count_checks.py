"""Whether a matrix holds raw counts, told in the one pass that also sums it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._errors import DataError
from pixnet_sd._warn import warn

from ._counts import Counts

__all__ = ["Look", "checked_blocks", "checked_totals", "warn_if_logged"]

_LOG_MAX = 20.0  # log1p of anything countable stays below


@dataclass
class Look:
    """What the values seen so far look like.

    Attributes
    ----------
    largest
        The largest of them.
    whole
        Whether all are whole numbers.
    """

    largest: float = 0.0
    whole: bool = True

    @property
    def is_logged(self) -> bool:
        """Whether values that are not whole, none above 20, were seen."""
        return not self.whole and self.largest < _LOG_MAX

    def at(self, values: NDArray[Any]) -> None:
        """Take some values in."""
        self.largest = max(self.largest, float(values.max(initial=0)))
        self.whole = self.whole and bool((values == np.rint(values)).all())


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
        If a value is NaN, infinite or negative.
    """
    for place, block in counts.blocks():
        _refuse(block, ~np.isfinite(block.data), var_names, what, "NaN or infinite", "Remove or recompute them")
        _refuse(block, block.data < 0, var_names, what, "negative", "Scaled values will not do: give raw counts")
        if look is not None:
            look.at(block.data)
        yield place, block, _row_sums(block)


def checked_totals(counts: Counts, var_names: pd.Index, what: str) -> NDArray[np.float64]:
    """Sum over all genes of each region; warns when the values look log-normalised.

    Parameters and errors are those of `checked_blocks`.

    Returns
    -------
    Totals, shape (n,).
    """
    look, total = Look(), np.zeros(len(counts))
    for place, _, sums in checked_blocks(counts, var_names, what, look):
        total[place] = sums
    warn_if_logged(look.is_logged, what)
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


def warn_if_logged(is_logged: bool, what: str) -> None:
    """Warn of a table whose values are not counts but, it seems, logarithms."""
    if is_logged:
        warn(
            f"{what}: X looks log-normalised already (values that are not whole, none above {_LOG_MAX:.0f}), and will "
            "be normalised and logged again. Put raw counts there, for instance table.X = table.layers['counts'] or "
            "table.raw.X."
        )
