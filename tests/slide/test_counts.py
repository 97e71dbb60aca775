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
from pixnet_sd.slide.tables import Counts, _counts, checked_totals

X = np.random.default_rng(0).poisson(0.7, (23, 6)).astype(np.float32)
GENES = pd.Index(list("ABCDEF"))
ROWS = np.array([1, 2, 5, 6, 7, 11, 20, 22])


def backed(path: Any, make: Callable[[Any], Any]) -> Any:
    ad.io.write_elem(zarr.open_group(path, mode="w"), "X", make(X))
    return sparse_dataset(zarr.open_group(path, mode="r")["X"])


KINDS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda path: X,
    "csr": lambda path: sparse.csr_matrix(X),
    "csc": lambda path: sparse.csc_matrix(X),
    "csr_array": lambda path: sparse.csr_array(X),
    "integers": lambda path: X.astype(np.int32),
    "dask": lambda path: da.from_array(X, chunks=(4, 6)),
    "dask_sparse": lambda path: da.from_array(X, chunks=(4, 6)).map_blocks(sparse.csr_matrix),
    "zarr": lambda path: zarr.create_array(str(path), data=X, chunks=(5, 3)),
    "backed_csr": lambda path: backed(path, sparse.csr_matrix),
    "backed_csc": lambda path: backed(path, sparse.csc_matrix),
}


@pytest.fixture(params=list(KINDS))
def matrix(request, tmp_path) -> Any:
    return KINDS[request.param](tmp_path / "x.zarr")


@pytest.fixture(params=[1, 20, 10**6], ids="block_of_{}".format)
def block_values(request, monkeypatch) -> None:
    monkeypatch.setattr(_counts, "_BLOCK_VALUES", request.param)


def test_every_kind_reads_the_same(matrix, block_values) -> None:
    counts = Counts.of(matrix, ROWS, "x")
    assert (len(counts), counts.n_genes) == (8, 6)
    places = [place for place, _ in counts.blocks()]
    assert [p.start for p in places] == [0, *(p.stop for p in places[:-1])]
    np.testing.assert_array_equal(np.concatenate([block.toarray() for _, block in counts.blocks()]), X[ROWS])
    np.testing.assert_array_equal(counts.columns([4, 0]).toarray(), X[ROWS][:, [4, 0]])
    np.testing.assert_allclose(checked_totals(counts, GENES, "x"), X[ROWS].sum(axis=1))


def test_take_by_mask_and_by_position() -> None:
    counts = Counts.of(X, ROWS, "x")
    np.testing.assert_array_equal(counts.take(ROWS > 6).columns(range(6)).toarray(), X[ROWS[ROWS > 6]])
    np.testing.assert_array_equal(counts.take([0, 3]).columns(range(6)).toarray(), X[[1, 6]])
    assert counts.take(ROWS > 99).columns([1, 2]).shape == (0, 2)


def test_totals_do_not_lose_digits() -> None:
    x = np.full((1, 3), 2**24, dtype=np.float32)
    x[0, 1] = 1
    assert checked_totals(Counts.of(x, [0], "x"), pd.Index(list("abc")), "x")[0] == 2**25 + 1


@pytest.mark.parametrize("matrix", [None, np.array([["a"]])])
def test_no_numbers(matrix) -> None:
    with pytest.raises(DataError, match="Table 't' has"):
        Counts.of(matrix, [0], "Table 't'")


@pytest.mark.parametrize(("value", "how"), [(np.nan, "NaN"), (np.inf, "NaN or infinite"), (-1, "negative")])
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_bad_values_name_the_gene(make, value: float, how: str) -> None:
    x = X.copy()
    x[5, 3] = value
    with pytest.raises(DataError, match=rf"Table 't': X holds {how}.*gene 'D'"):
        checked_totals(Counts.of(make(x), ROWS, "Table 't'"), GENES, "Table 't'")


@pytest.mark.filterwarnings("error")
def test_bad_values_in_rows_that_do_not_count() -> None:
    x = X.copy()
    x[0, 3] = np.nan
    assert checked_totals(Counts.of(x, ROWS, "x"), GENES, "x").shape == (8,)


def totals(x) -> np.ndarray:
    return checked_totals(Counts.of(x, np.arange(x.shape[0]), "Table 't'"), pd.Index(range(x.shape[1])), "Table 't'")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix], ids=repr)
@pytest.mark.parametrize("kind", [bool, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64, np.float16, "f8"])
def test_any_real_type_gives_the_same_totals(make, kind) -> None:
    x = (np.random.default_rng(0).poisson(9, (40, 30)) * 4).clip(0, 127 if kind == np.int8 else 255)
    x = x > 0 if kind is bool else x
    if kind == np.float16 and make is not np.asarray:
        return  # SciPy has none
    matrix = make(x.astype(kind))
    matrix = matrix.tocsr() if getattr(matrix, "format", "") == "coo" else matrix
    np.testing.assert_array_equal(totals(matrix), x.sum(axis=1, dtype=np.int64))


@pytest.mark.parametrize("kind", [np.int8, bool, np.float16])
def test_values_stored_twice_do_not_overflow(kind) -> None:
    x = sparse.csr_matrix((np.full(2, 1 if kind is bool else 100, kind), [1, 1], [0, 2]), shape=(1, 3))
    assert totals(x)[0] == (2 if kind is bool else 200)


@pytest.mark.parametrize("x", [np.ones((2, 2), complex), np.ones((2, 2), object), np.ones((2, 2), "m8[s]")])
def test_types_that_are_no_real_numbers(x) -> None:
    with pytest.raises(DataError, match=r"Table 't' has an X of dtype"):
        totals(x)
    if x.dtype == complex:
        with pytest.raises(DataError, match="complex"):
            totals(sparse.csr_matrix(x))


@pytest.mark.parametrize("value", [3e38, 1e12, 2.0**32])
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix])
def test_an_absurd_count_names_gene_and_row(make, value) -> None:
    x = X.copy()
    x[7, 3] = value
    with pytest.raises(DataError, match=r"absurdly large .* for gene 'D' in row 7"):
        checked_totals(Counts.of(make(x), ROWS, "Table 't'"), GENES, "Table 't'")


def test_what_32_and_16_bits_do_not_hold_is_said() -> None:
    x = X.copy()
    x[7, 3] = 2**25
    with pytest.warns(UserWarning, match="Table 't': X has values up to 33554432"):
        totals(x)
    x[7, 3] = 4096
    with pytest.raises(DataError, match="inexact .* in row 7"):
        totals(x.astype(np.float16))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("x", [X, X * 1000.5, X.astype(bool)], ids=["counts", "scaled", "bool"])
def test_nothing_is_said_of_counts(x) -> None:
    checked_totals(Counts.of(x, ROWS, "x"), GENES, "x")
