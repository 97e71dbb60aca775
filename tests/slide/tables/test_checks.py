"""Which values are taken for counts: by their structure, whatever their size."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import sparse
from tests.slide.tables.conftest import make_measured

from pixnet_sd.errors import DataError
from pixnet_sd.slide.tables import targets_of

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
def learn(tmp_path):
    """Make targets of values; return what is warned of."""

    def run(x, objective):
        table = make_measured(x, range(x.shape[1]), make=lambda x: sparse.csr_matrix(x.astype(np.float32)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            targets_of({"": [table]}, [0], 1e4, tmp_path, objective)
        return [str(w.message) for w in said]

    return run


@pytest.mark.parametrize("assay", ASSAYS.values(), ids=ASSAYS)
@pytest.mark.parametrize("change", NORMALISED | LOGGED | OTHER)
def test_only_counts_have_a_likelihood_and_logarithms_are_not_taken_twice(learn, assay, change) -> None:
    """A factor of each region does not matter to log-normalised expression."""
    x = (NORMALISED | LOGGED | OTHER)[change](assay)
    with pytest.raises(DataError, match=r"Table 't5'.*objective='nb'"):
        learn(x, "nb")
    if change not in OTHER:
        assert ["logarithms" in said for said in learn(x, "mse_pcc")] == [True] * (change in LOGGED)


@pytest.mark.parametrize("assay", ASSAYS.values(), ids=ASSAYS)
def test_counts_and_destriped_counts(learn, assay) -> None:
    destriped = assay * stripes(len(assay))
    for x, objective in ((assay, "mse_pcc"), (assay, "poisson"), (assay, "nb"), (destriped, "mse_pcc")):
        assert learn(x, objective) == []
    (said,) = learn(destriped, "poisson")
    assert "not whole" in said


def test_cells_of_destriped_bins_and_whole_multiples(learn) -> None:
    x = ASSAYS["bins"] * stripes(len(ASSAYS["bins"]))
    for values in (x[: len(x) // 4 * 4].reshape(-1, 4, x.shape[1]).sum(axis=1), ASSAYS["bins"] * 1000):
        assert [len(learn(values, objective)) for objective in ("mse_pcc", "nb")] == [0, 1]
