"""Which genes are learnt, and what of them: the same in memory and on disk."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from scipy import sparse
from tests.slide.tables.conftest import make_measured as of

from pixnet_sd.errors import DataError
from pixnet_sd.slide.tables import (
    Measured,
    StoredTargets,
    Targets,
    check_genes,
    choose_genes,
    log_normalise,
    targets_of,
)

X = np.array([[1, 3, 0], [0, 5, 5], [2, 0, 0]], dtype=np.float32)


def only(table: Measured, genes, cache, memory: int, objective: str = "mse_pcc") -> Targets:
    return targets_of({"": [table]}, genes, 1e4, cache, objective, memory_bytes=memory)[""][0]


@pytest.mark.filterwarnings("ignore:.*rounded to 32 bits")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("objective", "scale"),
    [*(("mse_pcc", scale) for scale in (1, 300, 2**26 + 1, 0.37)), ("nb", 1), ("poisson", 300)],
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
    for x, genes, names in ((X, ["A", "Z"], "'t5': 'Z'"), (-X, ["A"], "Table 't5'")):
        with pytest.raises(DataError, match=names):
            only(of(x, "ABC"), genes, tmp_path, memory)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="all 3 regions"):
        only(of(X * 0, "ABC"), ["A"], tmp_path, memory)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Table 't5'.*logarithms"):
            only(of(np.log1p(X), "ABC"), ["A"], tmp_path, memory)


COARSE, FINE = of([[1, 9, 5]], "ABC", radius=50), of([[9, 1]], "AB", radius=5)
TWO, MANY = {"a": [of(X, "ABC")], "b": [of(X, "CBA")]}, of([[8, 2]] * 50, "AB")
CHOSEN = {  # slides, arguments, genes
    # A has more counts in all, but B is high in more regions
    "mean of logarithms": ({"": [of([[90, 1, 0], [0, 1, 1], [0, 1, 1]], "ABC")]}, {"n_genes": 2}, ["B", "C"]),
    "ties by name": ({"": [of([[1, 1, 0, 1]] * 2, ["z", "b", "zero", "a"])]}, {"n_genes": 4}, ["a", "b", "z"]),
    # over regions A would win; over slides B does
    "slides": ({"many": [MANY], "few": [of([[1, 99]], "AB")]}, {"n_genes": 1, "target_sum": 10}, ["B"]),
    "coarsest": ({"s": [FINE, COARSE]}, {"n_genes": 2}, ["B", "A"]),
    "named": (TWO, {"genes": ["C", "A"]}, ["C", "A"]),
    "one": (TWO, {"genes": "B"}, ["B"]),
    # B has 9 counts
    "all with 10": (
        {"a": [of([[6, 9, 50], [0, 0, 50]], "ABC")], "b": [of([[4, 0, 0]], "ABC")]},
        {"n_genes": None},
        ["A", "C"],
    ),
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


@pytest.mark.parametrize(
    ("slides", "arguments", "names"),
    [
        ({"a": [of([[1]], "A")], "b": [of([[1]], "B")]}, {"n_genes": 1}, "'a'.*'b'"),
        ({"a": [of(X, "ABC")], "b": [of(X, "aBC")]}, {"genes": ["B", "A"]}, "'t5' of slide 'b': 'A'.*'a'"),
        ({"": [of(X, "ABC")]}, {"genes": ["A", "B", "A"]}, "genes=.*'A'"),
        ({"": [of(X, "ABC")]}, {"genes": []}, "genes="),
        ({"": [of(X, "ABC")]}, {"held_out": {"test": [of(X, "BCD")]}, "genes": ["A"]}, "'t5' of slide 'test': 'A'"),
    ],
    ids=["nothing in common", "missing in one", "twice", "none", "missing in a held-out slide"],
)
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
