"""Losses equal their textbook forms, and do not depend on how the outputs are grouped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from tests.model.literal import literal_expectation
from torch import Tensor

from pixnet_sd.model import (
    Densities,
    Objective,
    Operator,
    Part,
    SparseOperator,
    log_normalised,
    make_objective,
    pearson_per_gene,
)

N, M = 12, 5
NAMES = ["nb_pcc", "mse_pcc"]
LOG_DISPERSION = torch.linspace(-3, 0.5, M, dtype=torch.float64)


def make(name: str, *, pcc_weight: float = 0.3) -> Objective:
    return make_objective(name, pcc_weight=pcc_weight, target_sum=1e4)


def expression(seed: int = 0, n: int = N) -> Tensor:
    return torch.randn(n, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counts() -> tuple[Tensor, Tensor, Tensor]:
    """Means, counts drawn around others, and usual counts; the last output is more than the sum of the others."""
    rng = np.random.default_rng(1)
    usual = rng.uniform(0.2, 30, (N, 1)) * rng.uniform(0.1, 3, M)
    mean, measured = usual * rng.gamma(4, 0.25, (N, M)), rng.poisson(usual).astype(float)
    for values in (mean, measured, usual):
        values[:, -1] = 2 * values[:, :-1].sum(axis=1)
    return tuple(torch.from_numpy(v).double() for v in (mean, measured, usual))


def example(name: str) -> tuple[Objective, Tensor, Tensor, Tensor | None]:
    if name == "nb_pcc":
        return (make(name), *counts())
    measured = expression(1)
    measured[:, 2] = 3.25  # a gene that does not vary
    return make(name), expression(0), measured, None


def whole(
    objective: Objective,
    predicted: Tensor,
    measured: Tensor,
    usual: Tensor | None,
    cuts: tuple[int, ...] = (),
    sums: Operator | None = None,
) -> Tensor:
    """The loss, some outputs at a time."""

    def densities(block: slice) -> Densities | None:
        if usual is None:
            return None
        dispersion = LOG_DISPERSION[: predicted.shape[1]][block]
        return Densities(predicted[:, -1:], measured[:, -1:], dispersion, usual[:, block], usual[:, -1:], sums)

    n_outputs = predicted.shape[1]
    blocks = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, n_outputs]) if b > a]
    n_varying = objective.n_varying(measured[:, block] for block in blocks)
    return sum(
        objective.part(predicted[:, block], measured[:, block], Part(block, n_outputs, n_varying, densities(block)))
        for block in blocks
    )


# Correlation


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("constant", [[], [2]])
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_mse_pcc_is_eq_6(weight: float, constant: list[int]) -> None:
    """A gene that is constant in the batch has no correlation, and learns from its squared error alone."""
    predicted, measured = expression(0), expression(1)
    measured[:, constant] = 3.25
    pairs = zip(predicted.T.numpy(), measured.T.numpy(), strict=True)
    r = np.array([stats.pearsonr(p, m).statistic for p, m in pairs])
    np.testing.assert_allclose(pearson_per_gene(predicted, measured), r, atol=1e-7)
    loss = whole(make("mse_pcc", pcc_weight=weight), predicted.requires_grad_(), measured, None)
    error = (predicted - measured).detach()
    assert loss.item() == pytest.approx(float((error**2).mean()) + weight * np.nanmean(1 - r), abs=1e-7)
    loss.backward()
    np.testing.assert_allclose(predicted.grad[:, constant], 2 * error[:, constant] / (N * M), atol=1e-12)


@pytest.mark.parametrize("measured", [expression(1, n=1), torch.ones(N, M, dtype=torch.float64)])
def test_nothing_to_correlate(measured: Tensor) -> None:
    """One region, or nothing that varies."""
    predicted = expression(n=len(measured)).requires_grad_()
    both = whole(make("mse_pcc"), predicted, measured, None), ((predicted - measured) ** 2).mean()
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(loss, predicted) for loss in both))


def test_a_constant_prediction_has_no_correlation_and_finite_gradients() -> None:
    """As of tiles that all look alike to the network."""
    predicted = expression().index_fill(1, torch.tensor([1, 3]), 0.7).requires_grad_()
    correlation = pearson_per_gene(predicted, expression(1))
    np.testing.assert_allclose(correlation.detach()[[1, 3]], 0, atol=1e-7)
    correlation.sum().backward()
    assert torch.isfinite(predicted.grad).all()
    assert (predicted.grad != 0).any(0).tolist() == [True, False, True, False, True]


# All objectives


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, M), max_size=3).map(sorted))
def test_groups_of_outputs_do_not_matter(name: str, cuts: list[int]) -> None:
    arguments = example(name)
    torch.testing.assert_close(whole(*arguments, tuple(cuts)), whole(*arguments))


# Counts


@pytest.mark.parametrize("weights", [{}, {"pcc_weight": 0.0}])
def test_nb_pcc_is_its_parts(weights: dict[str, float]) -> None:
    """Differences between two sets of means; SciPy's likelihood has one more term, which the counts decide."""
    objective, mean, measured, usual = make("nb_pcc", **weights), *counts()
    measured[3] = 0  # of a region without counts there is no logarithm
    other = mean * torch.from_numpy(np.random.default_rng(5).uniform(0.5, 2, (N, M)))
    alpha, total = LOG_DISPERSION[:-1].exp().numpy(), measured[:, -1:].numpy()
    some, at_depth = total[:, 0] > 0, usual[:, :-1] * measured[:, -1:] / usual[:, -1:]
    observed = np.log1p(1e4 * measured[:, :-1].numpy()[some] / total[some])

    def literal(mu: Tensor) -> float:
        genes = (mu[:, :-1] * measured[:, -1:] / mu[:, -1:]).numpy()
        logs = stats.nbinom.logpmf(measured[:, :-1].numpy(), 1 / alpha, 1 / (1 + alpha * genes))
        of_total = stats.poisson.logpmf(total, mu[:, -1:].numpy())
        information = at_depth.numpy() / (1 + alpha * at_depth.numpy())
        likelihood = (-np.where(some[:, None], logs, 0).sum(0) / information.sum(0)).mean()
        likelihood -= of_total.sum() / usual[:, -1].numpy().sum()
        expected = literal_expectation(genes[some], alpha, total[some])
        r = [stats.pearsonr(p, m).statistic for p, m in zip(expected.T, observed.T, strict=True)]
        return likelihood + objective.pcc_weight * np.mean(1 - np.array(r))

    found = whole(objective, mean, measured, usual) - whole(objective, other, measured, usual)
    assert found.item() == pytest.approx(literal(mean) - literal(other), abs=2e-3)


def test_few_counts_are_compared_in_sums_of_neighbours() -> None:
    """What adds up is compared as if it had been measured so: means, counts, and with them their variance."""
    group = np.repeat([0, 1, 2], [5, 6, 1])
    matrix = sparse.csr_array((np.ones(N, np.float32), (group, np.arange(N))))
    mean, measured, usual = counts()
    mean = mean[:, :-1] * measured[:, -1:] / mean[:, -1:]
    mean = torch.cat([mean, measured[:, -1:]], dim=1)  # at the measured depth already
    terms, none = make("nb_pcc"), make("nb_pcc", pcc_weight=0.0)
    found = [whole(each, mean, measured, usual, sums=SparseOperator(matrix, np.ones(3))) for each in (terms, none)]
    m, y, total = (matrix @ v.numpy() for v in (mean[:, :-1], measured[:, :-1], measured[:, -1:]))
    alpha = LOG_DISPERSION[:-1].exp().numpy() * (matrix @ mean[:, :-1].numpy() ** 2) / m**2
    expected = np.array([literal_expectation(m[k], alpha[k], total[k])[0] for k in range(3)])
    observed = np.log1p(1e4 * y / total)
    r = [stats.pearsonr(p, q).statistic for p, q in zip(expected.T, observed.T, strict=True)]
    assert (found[0] - found[1]).item() == pytest.approx(terms.pcc_weight * np.mean(1 - np.array(r)), abs=3e-3)


def test_zero_means_and_zero_counts_stay_finite() -> None:
    mean = torch.zeros(3, 2, requires_grad=True)
    loss = whole(make("nb_pcc"), mean, torch.tensor([[0.0, 4], [0, 0], [1, 0]]), torch.ones(3, 2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(mean.grad).all()


def test_log_normalised() -> None:
    found = log_normalised(torch.tensor([[3.0, 0], [0, 0]]), torch.tensor([[4.0], [0]]), 100)
    np.testing.assert_allclose(found, [[np.log1p(75), 0], [0, 0]], rtol=1e-6)
