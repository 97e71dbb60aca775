"""Sparse tables filled in pieces, as conversion fills them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from pixnet_sd.errors import StoreError
from pixnet_sd.store import TableArrays, chunks_as_given

N_ROWS = 2**18 + 7  # more than one chunk of rows and of entries


def write_one(folder: Path, counts: Any, column: str, values: Any = (0,), **more: np.ndarray) -> Path:
    """Table of one row, as the reader gives it."""
    obs = pd.DataFrame({column: values, "region": pd.Categorical(["a"])}, index=["one"])
    one = ad.AnnData(counts, obs=obs, obsm=more)
    with chunks_as_given():
        ad.io.write_elem(zarr.open_group(folder, mode="w", zarr_format=3), "t", one)
    return folder / "t"


def test_rows_in_pieces_of_any_size_make_the_table(tmp_path: Path) -> None:
    counts = sp.random(N_ROWS, 6, 0.4, format="csr", dtype=np.float32, random_state=1)
    names = np.array([f"row {i}" for i in range(N_ROWS)], dtype=object)
    folder = write_one(tmp_path, counts[:1], "number", spatial=np.zeros((1, 2)))
    table = TableArrays(folder, N_ROWS, 6, counts.nnz)
    for start, stop in [(0, 1), (1, 10), (10, 200_000), (200_000, N_ROWS)]:
        rows, part = np.arange(start, stop), counts[start:stop]
        table.add_rows(names[rows], {"number": rows}, np.outer(rows, [1.0, 2.0]))
        table.add_counts(np.ones(part.nnz, np.int32), part.indices.astype(np.int64), np.diff(part.indptr))
    table.finish()
    found = ad.read_zarr(folder)
    expected = counts.copy()
    expected.data = np.ones_like(expected.data)
    assert (expected != found.X).nnz == 0
    assert found.X.dtype == np.float32
    assert list(found.obs_names) == list(names)
    np.testing.assert_array_equal(found.obs["number"], np.arange(N_ROWS))
    assert list(found.obs["region"].unique()) == ["a"]
    np.testing.assert_array_equal(table.centres_px(3, 9), np.outer(np.arange(3, 9), [1.0, 2.0]))


def test_more_entries_than_32_bits_count_get_wide_indices(tmp_path: Path) -> None:
    folder = write_one(tmp_path, sp.csr_matrix((1, 3), dtype=np.float32), "number")
    TableArrays(folder, 10, 3, 2**31)
    for name in ("indices", "indptr"):
        assert zarr.open_array(folder / "X" / name, mode="r").dtype == np.int64


def test_columns_that_get_no_values_are_refused(tmp_path: Path) -> None:
    table = TableArrays(write_one(tmp_path, sp.csr_matrix((1, 3), dtype=np.float32), "unknown"), 2, 3, 0)
    table.add_rows(np.array(["a", "b"], dtype=object), {})
    with pytest.raises(StoreError, match="unknown"):
        table.finish()


def test_columns_in_the_encodings_of_anndata(tmp_path: Path) -> None:
    folder = write_one(tmp_path, np.ones((1, 2), np.float32), "kind", pd.Categorical(["x"]))
    with pytest.raises(StoreError, match="'kind'"):
        TableArrays(folder, 5, 2)
    table = TableArrays(write_one(tmp_path, np.ones((1, 2), np.float32), "kind", pd.array([7], dtype="Int64")), 5, 2)
    table.add_rows(np.arange(5), {"kind": np.arange(5)})
    table.add_values(np.ones((5, 2), np.float32), {})
    table.finish()
    kinds = ad.read_zarr(folder).obs["kind"]
    assert kinds.tolist() == [0, 1, 2, 3, 4]
    assert not kinds.isna().any()
