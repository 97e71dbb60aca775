"""Count matrices of any kind and type, read in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import sparse_dataset
from scipy import sparse

from pixnet_sd.errors import DataError
from pixnet_sd.slide.tables import Counts, checked_blocks, checked_totals

X = np.random.default_rng(0).poisson(0.7, (23, 6)).astype(np.float32)
GENES = pd.Index(list("ABCDEF"))
ROWS = np.array([1, 2, 5, 6, 7, 11, 20, 22])


def backed(path: Any, make: Callable[[Any], Any]) -> Any:
    ad.io.write_elem(zarr.open_group(path, mode="w"), "X", make(X))
    return sparse_dataset(zarr.open_group(path, mode="r")["X"])


KINDS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda path: X,
    "csr_array": lambda path: sparse.csr_array(X),
    "csc": lambda path: sparse.csc_matrix(X),
    "dask": lambda path: da.from_array(X, chunks=(4, 6)),
    "dask_sparse": lambda path: da.from_array(X, chunks=(4, 6)).map_blocks(sparse.csr_matrix),
    "zarr": lambda path: zarr.create_array(str(path), data=X, chunks=(5, 3)),
    "backed_csr": lambda path: backed(path, sparse.csr_matrix),
    "backed_csc": lambda path: backed(path, sparse.csc_matrix),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows", [ROWS, ROWS[[3, 0, 7, 5, 1, 2, 6, 4]]], ids=["ascending", "shuffled"])
def test_every_kind_reads_the_same(kind: str, rows, tmp_path) -> None:
    counts = Counts.of(KINDS[kind](tmp_path / "x.zarr"), rows, "x")
    assert (len(counts), counts.n_genes) == (8, 6)
    for values in (1, 20, 10**6):
        read, n = np.full((8, 6), np.nan), 0
        for place, block in counts.blocks(values):
            read[place], n = block.toarray(), n + block.shape[0]
        assert n == 8
        np.testing.assert_array_equal(read, X[rows])
    np.testing.assert_array_equal(counts.to_csr().toarray(), X[rows])
    np.testing.assert_array_equal(counts.take(rows > 6).to_csr().toarray(), X[rows[rows > 6]])
    np.testing.assert_array_equal(counts.take([3, 0]).to_csr().toarray(), X[rows[[3, 0]]])
    np.testing.assert_allclose(checked_totals(counts, GENES, "x"), X[rows].sum(axis=1))


def totals(x) -> np.ndarray:
    return checked_totals(Counts.of(x, np.arange(x.shape[0]), "Table 't'"), pd.Index(range(x.shape[1])), "Table 't'")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=repr)
@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64, np.float16, "f8"])
def test_any_real_type_gives_the_same_totals(make, kind) -> None:
    x = (np.random.default_rng(0).poisson(9, (40, 30)) * 4).clip(0, 127 if kind == np.int8 else 255)
    x = x > 0 if kind is bool else x
    if kind == np.float16 and make is not np.asarray:
        return  # SciPy has none
    np.testing.assert_array_equal(totals(make(x.astype(kind))), x.sum(axis=1, dtype=np.int64))


def test_sums_do_not_overflow_or_lose_digits() -> None:
    for kind in (np.int8, bool, np.float16):
        x = sparse.csr_matrix((np.full(2, 1 if kind is bool else 100, kind), [1, 1], [0, 2]), shape=(1, 3))
        assert totals(x)[0] == (2 if kind is bool else 200)  # stored twice
    assert totals(np.array([[2**24, 1, 2**24]], dtype=np.float32))[0] == 2**25 + 1


@pytest.mark.parametrize("kind", [None, complex, object, "m8[s]", "U1"])
def test_no_real_numbers(kind) -> None:
    with pytest.raises(DataError, match="Table 't'"):
        Counts.of(None if kind is None else np.ones((2, 2), kind), [0], "Table 't'")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 3e38, 2.0**32])
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_a_bad_value_names_table_gene_and_row(make, value: float) -> None:
    x = X.copy()
    x[7, 3] = value
    with pytest.raises(DataError, match=r"Table 't'.*'D' in row 7"):
        list(checked_blocks(Counts.of(make(x), ROWS[::-1], "Table 't'"), GENES, "Table 't'"))
    assert len(checked_totals(Counts.of(make(x), ROWS[:4], "x"), GENES, "x")) == 4  # a row that does not count


def test_what_32_and_16_bits_do_not_hold_is_said() -> None:
    x = X.copy()
    x[7, 3] = 2**25
    with pytest.warns(UserWarning, match="Table 't'.*33554432"):
        totals(x)
    x[7, 3] = 4096
    with pytest.raises(DataError, match="in row 7"):
        totals(x.astype(np.float16))
