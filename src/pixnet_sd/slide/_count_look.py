"""A look at some values of a table: whether they are counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from ._stored_table import StoredTable

if TYPE_CHECKING:
    from ._stored_table import Table

__all__ = ["look_like_counts"]

_VALUES = 20_000
_ROWS = 100


def look_like_counts(table: Table) -> bool:
    """Whether a sample of X is whole, not negative, and not 0 all over."""
    if not isinstance(table, StoredTable) and table.X is None:
        return False
    values = _sample(table)
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values) or not np.isfinite(values).all():
        return False
    return bool(len(values) and (values >= 0).all() and values.any() and (values == np.rint(values)).all())


def _sample(table: Table) -> NDArray[Any]:
    """Stored values of a table, some from its start, middle and end."""
    if isinstance(table, StoredTable):
        x: Any = table._group["X"]
        x = x if isinstance(x, zarr.Array) else x["data"]
    else:
        x = table.X.data if sparse.issparse(table.X) else table.X
    step = _VALUES // 3 if x.ndim == 1 else _ROWS // 3
    starts = sorted({0, max(0, (x.shape[0] - step) // 2), max(0, x.shape[0] - step)})
    parts = [x[start : start + step] for start in starts]
    return np.concatenate([np.asarray(part.compute() if hasattr(part, "compute") else part).ravel() for part in parts])
