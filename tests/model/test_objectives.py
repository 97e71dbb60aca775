"""Losses equal their textbook forms, and do not depend on how the outputs are grouped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pixnet_sd.model import Densities, Objective, Part, log_normalised, make_objective, pearson_per_gene

N, M = 12, 5
NAMES = ["mse_pcc", "poisson", "nb"]
LIKELIHOODS = ["poisson", "nb"]


def make(name: str, *, pcc_weight: float = 0.3, n_outputs: int = M) -> Objective:
    return make_objective(name, pcc_weight=pcc_weight, target_sum=1e4, n_sizes=1, n_outputs=n_outputs).double()


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
    if name in LIKELIHOODS:
        return (make(name), *counts())
    measured = expression(1)
    measured[:, 2] = 3.25  # a gene that does not vary
    return make(name), expression(0), measured, None


def whole(
    objective: Objective, predicted: Tensor, measured: Tensor, usual: Tensor | None, cuts: tuple[int, ...] = ()
) -> Tensor:
    """The loss, some outputs at a time."""

    def densities(block: slice) -> Densities | None:
        if usual is None:
            return None
        return Densities(usual[:, block], *(v[:, -1:] for v in (usual, predicted, measured)))

    n_outputs = predicted.shape[1]
    blocks = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, n_outputs]) if b > a]
    n_varying = objective.n_varying(measured[:, block] for block in blocks)
    return sum(
        objective.part(predicted[:, block], measured[:, block], Part(block, n_outputs, n_varying, 0, densities(block)))
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


# Likelihoods


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_are_scipys_up_to_what_the_counts_decide(name: str) -> None:
    """Differences between two sets of means, in nats per usual count, mean over outputs."""
    objective, mean, measured, usual = example(name)
    other = mean * torch.from_numpy(np.random.default_rng(5).uniform(0.5, 2, (N, M)))

    def literal(mu: Tensor) -> float:
        depth = measured[:, -1:] / mu[:, -1:]
        mu = torch.cat([mu[:, :-1] * depth, mu[:, -1:]], dim=1)
        logs = stats.poisson.logpmf(measured.numpy(), mu.numpy())
        if name == "nb":
            alpha = objective.log_dispersion.detach().exp().numpy()[0]
            genes = stats.nbinom.logpmf(measured.numpy(), 1 / alpha, 1 / (1 + alpha * mu.numpy()))
            logs[:, :-1] = genes[:, :-1]
        expected = usual * measured[:, -1:] / usual[:, -1:]
        expected[:, -1] = usual[:, -1]
        return float((-logs.sum(0) / expected.numpy().sum(0)).mean())

    found = whole(objective, mean, measured, usual) - whole(objective, other, measured, usual)
    assert found.item() == pytest.approx(literal(mean) - literal(other), rel=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_genes_do_not_pull_at_the_total(name: str) -> None:
    """A gene's density is a share of the total's: of how large that is, only the total's own counts tell."""
    objective, mean, measured, usual = example(name)
    log_total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    only_total = measured.clone()
    only_total[:, -1:] = mean[:, -1:]  # which the total fits already
    whole(objective, mean * log_total.exp(), only_total, usual).backward()
    assert abs(log_total.grad.item()) < 1e-6


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_zero_means_and_zero_counts_stay_finite(name: str) -> None:
    mean = torch.zeros(3, 2, requires_grad=True)
    loss = whole(make(name, n_outputs=2).float(), mean, torch.tensor([[0.0, 4], [0, 0], [1, 0]]), torch.ones(3, 2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(mean.grad).all()


def test_log_normalised() -> None:
    found = log_normalised(torch.tensor([[3.0, 0], [0, 0]]), torch.tensor([[4.0], [0]]), 100)
    np.testing.assert_allclose(found, [[np.log1p(75), 0], [0, 0]], rtol=1e-6)
