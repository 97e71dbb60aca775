"""Tables with measured expression, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from pixnet_sd.geometry import Circles
from pixnet_sd.slide.tables import Counts, Measured


def make_measured(x: Any, genes: Any, radius: float = 5.0, rows: Any = None, make: Any = sparse.csr_matrix) -> Measured:
    """Circles, the k-th with the counts of row ``rows[k]`` of x."""
    x = np.asarray(x)
    return Measured(
        table_key=f"t{radius:.0f}",
        element_key="spots",
        regions=Circles(np.arange(2.0 * len(x)).reshape(-1, 2), radius),
        instances=pd.RangeIndex(len(x)),
        counts=Counts.of(make(x), np.arange(len(x)) if rows is None else rows, "x"),
        var_names=pd.Index(list(genes)),
    )
