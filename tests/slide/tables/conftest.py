"""Tables with measured expression, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from spatialdata import read_zarr

from pixnet_sd.geometry import Circles
from pixnet_sd.slide.tables import Counts, Measured, measured


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


@pytest.fixture
def opened(visium_hd, frame, tmp_path):
    """The only table of a slide, in memory or in a store, after a change."""

    def make(change=lambda table: None, is_stored=False) -> Measured:
        sdata = visium_hd(bins=(8,))
        table = sdata.tables["square_008um"]
        table.X = sparse.csr_matrix(table.X.toarray() * [1, 500, 1, 1, 70])
        change(table)
        if is_stored:
            sdata.write(tmp_path / "slide.zarr", overwrite=True)
            sdata = read_zarr(tmp_path / "slide.zarr", selection=("images",))
        return measured(sdata, frame())[0]

    return make
