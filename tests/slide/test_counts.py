"""Count matrices of any kind, which values are taken for counts, and what is learnt of them, and of which genes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import sparse_dataset
from scipy import sparse
from tests.slide.conftest import make_measured as of

from pixnet_sd.errors import DataError
from pixnet_sd.slide.tables import (
    Counts,
    Measured,
    StoredTargets,
    Targets,
    check_genes,
    checked_blocks,
    checked_totals,
    choose_genes,
    log_normalise,
    targets_of,
)

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
    twice = sparse.csr_matrix((np.full(2, 100, kind), [1, 1], [0, 2]), shape=(1, 3))
    assert totals(twice)[0] == (2 if kind is bool else 200)


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


def test_what_32_and_16_bits_do_not_hold_is_said_and_sums_lose_no_digits() -> None:
    assert totals(np.array([[2**24, 1, 2**24]], dtype=np.float32))[0] == 2**25 + 1
    x = X.copy()
    x[7, 3] = 2**25
    with pytest.warns(UserWarning, match="Table 't'.*33554432"):
        totals(x)
    x[7, 3] = 4096
    with pytest.raises(DataError, match="in row 7"):
        totals(x.astype(np.float16))


RNG = np.random.default_rng(0)


def counted(n: int, genes: int, mean: float, spread: float, shares: float) -> np.ndarray:
    depth = RNG.lognormal(np.log(mean), spread, (n, 1))
    x = RNG.poisson(depth * RNG.dirichlet(np.full(genes, shares)))
    return x[x.sum(axis=1) > 0].astype(np.float64)


ASSAYS = {
    "bins": counted(600, 200, 20, 0.7, 0.3),
    "small bins": counted(900, 200, 1.5, 0.7, 0.3),
    "spots": counted(120, 800, 5000, 0.5, 0.3),
    "few genes": counted(60, 8, 40, 0.0, 50),
}


def shares(x):
    return x / x.sum(axis=1, keepdims=True)


def by_size(x):
    total = x.sum(axis=1, keepdims=True)
    return x * np.median(total) / total / np.exp(RNG.normal(0, 0.05, total.shape))


def stripes(n: int) -> np.ndarray:
    side = int(np.sqrt(n)) + 1
    return np.exp(np.add.outer(RNG.normal(0, 0.15, side), RNG.normal(0, 0.15, side))).reshape(-1, 1)[:n]


NORMALISED = {
    "scaled": lambda x: x * 500.3,
    "shares": shares,
    "per million": lambda x: 1e6 * shares(x),
    "to the median": lambda x: shares(x) * np.median(x.sum(axis=1)),
    "size factors": by_size,
}
LOGGED = {
    "log": np.log1p,
    "log of 10,000": lambda x: np.log1p(1e4 * shares(x)),
    "log2 of size factors": lambda x: np.log2(1 + by_size(x)),
    "log10": lambda x: np.log10(1 + 1e4 * shares(x)),
    "log of destriped": lambda x: np.log1p(1e4 * shares(x * stripes(len(x)))),
}
OTHER = {
    "square roots": np.sqrt,
    "per gene": lambda x: x / np.maximum(x.std(axis=0), 1e-3),
    "nothing": lambda x: RNG.gamma(2, 2, x.shape),
}


@pytest.fixture
def learn(tmp_path, recwarn):
    """Make targets of values; return what is warned of."""

    def run(x, objective):
        table = of(x, range(x.shape[1]), make=lambda x: sparse.csr_matrix(x.astype(np.float32)))
        recwarn.clear()
        targets_of({"": [table]}, [0], 1e4, tmp_path, objective)
        return [str(w.message) for w in recwarn]

    return run


@pytest.mark.parametrize("assay", ASSAYS.values(), ids=ASSAYS)
@pytest.mark.parametrize("change", NORMALISED | LOGGED | OTHER)
def test_only_counts_have_a_likelihood_and_logarithms_are_not_taken_twice(learn, assay, change) -> None:
    """A factor of each region does not matter to log-normalised expression."""
    x = (NORMALISED | LOGGED | OTHER)[change](assay)
    with pytest.raises(DataError, match=r"Table 't5'.*objective='nb_pcc'"):
        learn(x, "nb_pcc")
    if change not in OTHER:
        assert ["logarithms" in said for said in learn(x, "mse_pcc")] == [True] * (change in LOGGED)


@pytest.mark.parametrize("assay", ASSAYS.values(), ids=ASSAYS)
def test_counts_and_destriped_counts(learn, assay) -> None:
    destriped = assay * stripes(len(assay))
    for x, objective in ((assay, "mse_pcc"), (assay, "nb_pcc"), (destriped, "mse_pcc")):
        assert learn(x, objective) == []
    (said,) = learn(destriped, "nb_pcc")
    assert "not whole" in said


def test_cells_of_destriped_bins_and_whole_multiples(learn) -> None:
    x = ASSAYS["bins"] * stripes(len(ASSAYS["bins"]))
    for values in (x[: len(x) // 4 * 4].reshape(-1, 4, x.shape[1]).sum(axis=1), ASSAYS["bins"] * 1000):
        assert [len(learn(values, objective)) for objective in ("mse_pcc", "nb_pcc")] == [0, 1]


FEW = np.array([[1, 3, 0], [0, 5, 5], [2, 0, 0]], dtype=np.float32)


def only(table: Measured, genes, cache, memory: int, objective: str = "mse_pcc") -> Targets:
    return targets_of({"": [table]}, genes, 1e4, cache, objective, memory_bytes=memory)[""][0]


@pytest.mark.filterwarnings("ignore:.*rounded to 32 bits")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("objective", "scale"),
    [*(("mse_pcc", scale) for scale in (1, 300, 2**26 + 1, 0.37)), ("nb_pcc", 1), ("nb_pcc", 300)],
)
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_on_disk_as_in_memory(tmp_path, make, objective: str, scale: float, shuffled: bool) -> None:
    """Exactly, for any kind of matrix, size of counts and order of rows, and with empty regions."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.4, (60, 9)) * rng.choice([1, scale], (60, 9))
    x[[3, 9]] = 0
    rows = rng.permutation(60) if shuffled else np.arange(60)
    table = of(x, "ABCDEFGHI", rows=rows, make=make)
    total, chosen, kept = x[rows].sum(axis=1, keepdims=True), x[rows][:, [7, 1, 0]], np.arange(60)
    if objective == "mse_pcc":
        kept = np.flatnonzero(total)
        expected = np.log1p(1e4 * chosen[kept] / total[kept])
        np.testing.assert_allclose(log_normalise(chosen, total.ravel())[kept], expected, rtol=1e-5)
        said = pytest.warns(UserWarning, match=f"Table 't5': {60 - len(kept)} of 60")
    else:
        expected, said = np.hstack([chosen, total]), nullcontext()
    with said:
        dense, stored = (only(table, list("HBA"), tmp_path, memory, objective) for memory in (2**28, 0))
    assert isinstance(stored.values, StoredTargets)
    assert stored.values.shape == dense.values.shape
    np.testing.assert_allclose(dense.values, expected, rtol=1e-5)
    index = rng.choice(len(kept), 30, replace=False)
    np.testing.assert_array_equal(stored.values[index], dense.values[index])
    np.testing.assert_array_equal(stored.values.subset(index)[np.arange(5)], dense.values[index[:5]])
    np.testing.assert_allclose(stored.values.mean(axis=0), dense.values.mean(axis=0), rtol=1e-5)
    for each in (dense, stored):
        np.testing.assert_array_equal(each.regions.centre_xy, table.regions.centre_xy[kept])


@pytest.mark.parametrize("memory", [2**28, 0])
def test_bad_counts_and_logarithms_are_said_also_when_the_copy_is_there(tmp_path, memory) -> None:
    for x, genes, names in ((FEW, ["A", "Z"], "'t5': 'Z'"), (-FEW, ["A"], "Table 't5'")):
        with pytest.raises(DataError, match=names):
            only(of(x, "ABC"), genes, tmp_path, memory)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="all 3 regions"):
        only(of(FEW * 0, "ABC"), ["A"], tmp_path, memory)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Table 't5'.*logarithms"):
            only(of(np.log1p(FEW), "ABC"), ["A"], tmp_path, memory)


COARSE, FINE = of([[1, 9, 5]], "ABC", radius=50), of([[9, 1]], "AB", radius=5)
TWO, MANY = {"a": [of(FEW, "ABC")], "b": [of(FEW, "CBA")]}, of([[8, 2]] * 50, "AB")
CHOSEN = {  # slides, arguments, genes
    # A has more counts in all, but B is high in more regions
    "mean of logarithms": ({"": [of([[90, 1, 0], [0, 1, 1], [0, 1, 1]], "ABC")]}, {"n_genes": 2}, ["B", "C"]),
    "ties by name": ({"": [of([[1, 1, 0, 1]] * 2, ["z", "b", "zero", "a"])]}, {"n_genes": 4}, ["a", "b", "z"]),
    # over regions A would win; over slides B does
    "slides": ({"many": [MANY], "few": [of([[1, 99]], "AB")]}, {"n_genes": 1, "target_sum": 10}, ["B"]),
    "coarsest": ({"s": [FINE, COARSE]}, {"n_genes": 2}, ["B", "A"]),
    "named": (TWO, {"genes": ["C", "A"]}, ["C", "A"]),
    "one": (TWO, {"genes": "B"}, ["B"]),
    # B has 9 counts, A 10 in both slides
    "all with 10": ({"a": [of([[6, 9, 99]], "ABC")], "b": [of([[4, 0, 0]], "ABC")]}, {"n_genes": None}, ["A", "C"]),
    # held-out slides must have the genes, but do not rank them
    "held out": ({"": [of([[3, 2, 1]], "ABC")]}, {"held_out": {"b": [of([[0, 1, 9]], "BZC")]}}, ["B", "C"]),
}


@pytest.mark.parametrize(("slides", "arguments", "genes"), CHOSEN.values(), ids=CHOSEN)
@pytest.mark.filterwarnings("error")
def test_genes_that_are_chosen(slides, arguments, genes, caplog) -> None:
    caplog.set_level("INFO", "pixnet_sd")
    assert list(choose_genes(slides, **arguments)) == genes
    # fewer than asked for: it is said what each table has
    assert ("'t5' 4" in caplog.text) == (len(genes) < (arguments.get("n_genes") or 0))


FOREIGN = {"held_out": {"test": [of(FEW, "BCD")]}, "genes": ["A"]}
NOT_CHOSEN = {  # slides, arguments, what is named
    "nothing in common": ({"a": [of([[1]], "A")], "b": [of([[1]], "B")]}, {"n_genes": 1}, "'a'.*'b'"),
    "missing in one": (TWO | {"b": [of(FEW, "aBC")]}, {"genes": ["B", "A"]}, "'t5' of slide 'b': 'A'.*'a'"),
    "twice": (TWO, {"genes": ["A", "B", "A"]}, "genes=.*'A'"),
    "none": (TWO, {"genes": []}, "genes="),
    "missing in a held-out slide": (TWO, FOREIGN, "'t5' of slide 'test': 'A'"),
}


@pytest.mark.parametrize(("slides", "arguments", "names"), NOT_CHOSEN.values(), ids=NOT_CHOSEN)
def test_genes_that_cannot_be_chosen(slides, arguments, names) -> None:
    with pytest.raises(DataError, match=names):
        choose_genes(slides, **arguments)


def test_missing_genes_are_listed_up_to_ten_with_close_matches_and_silent_ones_said() -> None:
    missing = [f"LOST{i}" for i in range(13)]
    with pytest.raises(DataError, match=r"14 of 15 .* the model: 'CD3E' \(there is 'CD3D'\).*and 4 more"):
        check_genes(["CD3E", "ACTB", *missing], ["ACTB", "CD3D"], "the model")
    check_genes(["ACTB"], ["ACTB", "CD3D"], "the model")
    with pytest.warns(UserWarning, match="'C'"):
        choose_genes({"": [of([[1, 2, 0]], "ABC")]}, genes=["C", "A"])
