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
from pixnet_sd.store import _stream as _arrays


@pytest.mark.parametrize("wide", [False, True])
def test_rows_in_pieces_of_any_size_make_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    monkeypatch.setattr(_arrays, "ROW_CHUNK", 4)
    monkeypatch.setattr(_arrays, "ENTRY_CHUNK", 5)
    if wide:
        monkeypatch.setattr(_arrays, "_INT32_MAX", 10)
    counts = sp.random(23, 6, 0.4, format="csr", dtype=np.float32, random_state=1)
    names = np.array([f"row {i}" for i in range(23)], dtype=object)
    obs = pd.DataFrame({"number": [0], "region": pd.Categorical(["here"])}, index=["one"])
    one = ad.AnnData(counts[:1], obs=obs, obsm={"spatial": np.zeros((1, 2))})
    ad.io.write_elem(zarr.open_group(tmp_path, mode="w", zarr_format=3), "t", one)
    table = TableArrays(tmp_path / "t", 23, 6, counts.nnz)
    for start, stop in [(0, 1), (1, 10), (10, 11), (11, 23)]:
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
    np.testing.assert_array_equal(found.obs["number"], np.arange(23))
    assert list(found.obs["region"].unique()) == ["here"]
    np.testing.assert_array_equal(table.centres_px(3, 9), np.outer(np.arange(3, 9), [1.0, 2.0]))


def test_columns_that_get_no_values_are_refused(tmp_path: Path) -> None:
    obs = pd.DataFrame({"unknown": [0], "region": pd.Categorical(["here"])}, index=["one"])
    one = ad.AnnData(sp.csr_matrix((1, 3), dtype=np.float32), obs=obs)
    ad.io.write_elem(zarr.open_group(tmp_path, mode="w", zarr_format=3), "t", one)
    table = TableArrays(tmp_path / "t", 2, 3, 0)
    table.add_rows(np.array(["a", "b"], dtype=object), {})
    with pytest.raises(StoreError, match="column 'unknown'"):
        table.finish()
