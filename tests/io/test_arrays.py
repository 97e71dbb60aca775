from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from pixnet_sd.errors import StoreError
from pixnet_sd.store import TableArrays

N_ROWS = 2**18 + 7  # more than one chunk of rows and of entries


def test_rows_in_pieces_of_any_size_make_the_table(tmp_path: Path) -> None:
    counts = sp.random(N_ROWS, 6, 0.4, format="csr", dtype=np.float32, random_state=1)
    names = np.array([f"row {i}" for i in range(N_ROWS)], dtype=object)
    obs = pd.DataFrame({"number": [0], "region": pd.Categorical(["a"])}, index=["one"])
    one = ad.AnnData(counts[:1], obs=obs, obsm={"spatial": np.zeros((1, 2))})
    ad.io.write_elem(zarr.open_group(tmp_path, mode="w", zarr_format=3), "t", one)
    table = TableArrays(tmp_path / "t", N_ROWS, 6, counts.nnz)
    for start, stop in [(0, 1), (1, 10), (10, 200_000), (200_000, N_ROWS)]:
        rows, part = np.arange(start, stop), counts[start:stop]
        table.add_rows(names[rows], {"number": rows}, np.outer(rows, [1.0, 2.0]))
        table.add_counts(np.ones(part.nnz, np.int32), part.indices.astype(np.int64), np.diff(part.indptr))
    table.finish()
    found = ad.read_zarr(tmp_path / "t")
    expected = counts.copy()
    expected.data = np.ones_like(expected.data)
    assert (expected != found.X).nnz == 0
    assert found.X.dtype == np.float32
    assert list(found.obs_names) == list(names)
    np.testing.assert_array_equal(found.obs["number"], np.arange(N_ROWS))
    assert list(found.obs["region"].unique()) == ["a"]
    np.testing.assert_array_equal(table.centres_px(3, 9), np.outer(np.arange(3, 9), [1.0, 2.0]))


def test_more_entries_than_32_bits_count_get_wide_indices(tmp_path: Path) -> None:
    one = ad.AnnData(sp.csr_matrix((1, 3), dtype=np.float32), obs=pd.DataFrame({"number": [0]}, index=["one"]))
    ad.io.write_elem(zarr.open_group(tmp_path, mode="w", zarr_format=3), "t", one)
    TableArrays(tmp_path / "t", 10, 3, 2**31)
    for name in ("indices", "indptr"):
        assert zarr.open_array(tmp_path / "t" / "X" / name, mode="r").dtype == np.int64


def test_columns_that_get_no_values_are_refused(tmp_path: Path) -> None:
    obs = pd.DataFrame({"unknown": [0], "region": pd.Categorical(["a"])}, index=["one"])
    one = ad.AnnData(sp.csr_matrix((1, 3), dtype=np.float32), obs=obs)
    ad.io.write_elem(zarr.open_group(tmp_path, mode="w", zarr_format=3), "t", one)
    table = TableArrays(tmp_path / "t", 2, 3, 0)
    table.add_rows(np.array(["a", "b"], dtype=object), {})
    with pytest.raises(StoreError, match="unknown"):
        table.finish()
