from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Circles
from pixnet_sd.slide.tables import (
    Counts,
    Measured,
    StoredTargets,
    Targets,
    _targets,
    check_genes,
    choose_genes,
    log_normalise,
    targets_of,
)

X = np.array([[1, 3, 0], [0, 5, 5], [2, 0, 0]], dtype=np.float32)


def of(x, genes, radius: float = 5.0, place=None, make=sparse.csr_matrix) -> Measured:
    x = np.asarray(x)
    return Measured(
        table_key=f"t{radius:.0f}",
        element_key="spots",
        regions=Circles(np.arange(2.0 * len(x)).reshape(-1, 2), radius),
        instances=pd.RangeIndex(len(x)),
        counts=Counts.of(make(x), np.arange(len(x)), "x"),
        place=None if place is None else np.asarray(place, np.int32),
        var_names=pd.Index(list(genes)),
    )


@pytest.fixture(params=["memory", "disk"])
def where(request, monkeypatch) -> None:
    """Run a test with targets in memory, and with targets on disk."""
    if request.param == "disk":
        monkeypatch.setattr(_targets, "_DENSE_BYTES", 0)


both = pytest.mark.usefixtures("where")


def only(table: Measured, genes, cache, target_sum: float = 1e4, objective: str = "mse_pcc") -> Targets:
    return targets_of({"": [table]}, genes, target_sum, cache, objective)[""][0]


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_log_normalise(make) -> None:
    found = log_normalise(make(X[:, 1:]), X.sum(axis=1), target_sum=100)
    expected = [[np.log1p(75), 0], [np.log1p(50), np.log1p(50)], [0, 0]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_log_normalise_agrees_with_scanpy() -> None:
    sc = pytest.importorskip("scanpy")
    import anndata as ad

    adata = ad.AnnData(X.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(log_normalise(X, X.sum(axis=1)), adata.X, rtol=1e-6)


def test_a_region_without_counts_is_zero() -> None:
    np.testing.assert_array_equal(log_normalise(np.zeros((1, 2)), [0.0]), [[0, 0]])


@both
def test_targets_in_the_order_of_genes_with_totals_over_all(tmp_path) -> None:
    found = only(of(X, "ABC"), ["C", "A"], tmp_path, target_sum=10)
    values = found.values[np.arange(3)]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.log1p(np.array([[0, 2.5], [5, 0], [0, 10]])), rtol=1e-6)
    with pytest.raises(DataError, match="1 of 2 genes are not in table 't5': 'Z'"):
        only(of(X, "ABC"), ["A", "Z"], tmp_path)


@pytest.mark.filterwarnings("ignore:.*no counts at all")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("scale", [1, 300, 70_000, 2**26 + 1, 0.37])
@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_on_disk_as_in_memory(tmp_path, monkeypatch, make, scale: float, shuffled: bool) -> None:
    """Exactly, for any kind of matrix, size of counts and order of rows, and with empty regions."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.4, (60, 9)) * rng.choice([1, scale], (60, 9))
    x[[3, 9]] = 0
    table = of(x, "ABCDEFGHI", place=rng.permutation(60) if shuffled else None, make=make)
    dense = only(table, list("HBA"), tmp_path)
    monkeypatch.setattr(_targets, "_DENSE_BYTES", 0)
    stored = only(table, list("HBA"), tmp_path)
    assert isinstance(stored.values, StoredTargets)
    n = int((x.sum(axis=1) > 0).sum())
    assert stored.values.shape == dense.values.shape == (n, 3)
    index = rng.choice(n, 30, replace=False)
    np.testing.assert_array_equal(stored.values[index], dense.values[index])
    np.testing.assert_array_equal(stored.values.subset(index)[np.arange(5)], dense.values[index[:5]])
    np.testing.assert_allclose(stored.values.mean(axis=0), dense.values.mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(stored.regions.centre_xy, dense.regions.centre_xy)


@both
def test_raw_counts_with_their_total_last_and_empty_regions_kept(tmp_path) -> None:
    found = only(of([[1, 2, 4], [0, 0, 0], [0, 5, 1]], "ABC"), ["C", "A"], tmp_path, objective="nb")
    every = np.arange(3)
    expected = [[4, 1, 7], [0, 0, 0], [1, 0, 6]]
    np.testing.assert_array_equal(found.values[every], expected)
    assert found.values.shape == (3, 3)
    assert len(found.regions) == 3
    np.testing.assert_allclose(found.values.mean(axis=0), np.mean(expected, axis=0))
    if not isinstance(found.values, np.ndarray):
        np.testing.assert_array_equal(found.values.rows(every[1:]).toarray(), expected[1:])


@both
def test_empty_regions_are_left_out(tmp_path) -> None:
    x = X.copy()
    x[1] = 0
    with pytest.warns(UserWarning, match="Table 't5': 1 of 3 regions have no counts at all"):
        found = only(of(x, "ABC"), ["A"], tmp_path)
    assert len(found.regions) == len(found.values) == 2
    with pytest.raises(DataError, match="all 3 regions on the image have no counts"):
        only(of(np.zeros((3, 3)), "ABC"), ["A"], tmp_path)


@both
@pytest.mark.parametrize(("value", "how"), [(np.nan, "NaN"), (-2, "negative")])
def test_bad_counts(value, how, tmp_path) -> None:
    x = X.copy()
    x[2, 1] = value
    with pytest.raises(DataError, match=f"Table 't5': X holds {how}"):
        only(of(x, "ABC"), ["A"], tmp_path)
    assert not list(tmp_path.iterdir())


@both
def test_log_normalised(tmp_path) -> None:
    for _ in range(2):  # also when the counts are there already
        with pytest.warns(UserWarning, match="Table 't5': X holds logarithms already"):
            only(of(np.log1p(X), "ABC"), ["A"], tmp_path)


def test_genes_by_mean_log_expression_not_by_sum() -> None:
    # A has more counts in all, but B is high in more regions.
    x = [[90, 1, 0], [0, 1, 1], [0, 1, 1]]
    assert list(choose_genes({"": [of(x, "ABC")]}, n_genes=2)) == ["B", "C"]


def test_all_genes_with_enough_counts() -> None:
    slides = {"a": [of([[6, 9, 50], [0, 0, 50]], "ABC")], "b": [of([[4, 0, 0]], "ABC")]}
    assert set(choose_genes(slides, n_genes=None)) == {"A", "C"}  # B has 9 counts


def test_ties_by_name_and_zero_genes_never(caplog) -> None:
    with caplog.at_level("INFO", "pixnet_sd"):
        chosen = choose_genes({"": [of([[1, 1, 0, 1]] * 2, ["z", "b", "zero", "a"])]}, n_genes=4)
    assert list(chosen) == ["a", "b", "z"]
    assert "3 genes chosen by mean log-normalised expression, all that there are" in caplog.text


def test_slides_weigh_the_same() -> None:
    many = of([[8, 2]] * 50, "AB")
    few = of([[1, 99]], "AB")
    # Over regions A would win; over slides B does.
    assert list(choose_genes({"many": [many], "few": [few]}, n_genes=1, target_sum=10)) == ["B"]


def test_genes_of_every_table_by_the_coarsest(caplog) -> None:
    coarse, fine = of([[1, 9, 5]], "ABC", radius=50), of([[9, 1]], "AB", radius=5)
    assert list(choose_genes({"s": [fine, coarse]}, n_genes=2)) == ["B", "A"]
    with caplog.at_level("INFO", "pixnet_sd"):
        choose_genes({"s": [fine, coarse]}, n_genes=3)
    assert "2 genes chosen" in caplog.text
    assert "'s': 't5' 2, 's': 't50' 3" in caplog.text


def test_slides_without_a_common_gene() -> None:
    with pytest.raises(DataError, match="No gene is measured"):
        choose_genes({"a": [of([[1]], "A")], "b": [of([[1]], "B")]}, n_genes=1)


@pytest.mark.filterwarnings("error")
def test_named_genes_in_their_order() -> None:
    slides = {"a": [of(X, "ABC")], "b": [of(X, "CBA")]}
    assert list(choose_genes(slides, genes=["C", "A"])) == ["C", "A"]
    assert list(choose_genes(slides, genes="B")) == ["B"]


def test_named_genes_missing_in_one_slide() -> None:
    slides = {"a": [of(X, ["ERBB2", "A", "B"])], "b": [of(X, ["Erbb2", "A", "B"])]}
    with pytest.raises(
        DataError, match=r"1 of 2 genes are not in table 't5' of slide 'b': 'ERBB2' \(there is 'Erbb2'\)"
    ):
        choose_genes(slides, genes=["A", "ERBB2"])


@pytest.mark.parametrize("genes", [["A", "B", "A"], []])
def test_named_genes_once_and_at_least_one(genes) -> None:
    with pytest.raises(DataError, match="each gene once and at least one"):
        choose_genes({"": [of(X, "ABC")]}, genes=genes)


def test_named_gene_without_counts() -> None:
    with pytest.warns(UserWarning, match=r"1 of the genes named have no counts .*\('C'\)"):
        choose_genes({"": [of([[1, 2, 0]], "ABC")]}, genes=["C", "A"])


def test_missing_genes_are_listed_up_to_ten_with_close_matches() -> None:
    missing = [f"LOST{i}" for i in range(13)]
    with pytest.raises(DataError, match=r"14 of 15 genes are not in the model: 'CD3E' \(there is 'CD3D'\).*and 4 more"):
        check_genes(["CD3E", "ACTB", *missing], ["ACTB", "CD3D"], "the model")
    check_genes(["ACTB"], ["ACTB", "CD3D"], "the model")


def test_held_out_slides_must_have_the_genes_but_do_not_rank_them() -> None:
    training = {"train": [of([[3, 2, 1]], "ABC")]}
    held_out = {"test": [of([[0, 1, 9]], ["B", "Z", "C"])]}
    assert list(choose_genes(training, held_out=held_out, n_genes=2)) == ["B", "C"]
    with pytest.raises(DataError, match="table 't5' of slide 'test': 'A'"):
        choose_genes(training, held_out=held_out, genes=["A"])
