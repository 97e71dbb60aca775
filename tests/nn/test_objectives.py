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

from pixnet_sd.model import Densities, Objective, Part, log_normalised, make_objective
from pixnet_sd.model._objectives import CountLoss, MsePcc

N, M = 12, 5
NAMES = ["mse_pcc", "poisson", "nb"]


def expression(seed: int = 0, n: int = N, outputs: int = M) -> Tensor:
    return torch.randn(n, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counts(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Means, counts drawn around others, and usual counts; the last output is more than the sum of the others."""
    rng = np.random.default_rng(seed)
    usual = rng.uniform(0.2, 30, (N, 1)) * rng.uniform(0.1, 3, M)
    mean, measured = usual * rng.gamma(4, 0.25, (N, M)), rng.poisson(usual).astype(float)
    for values in (mean, measured, usual):
        values[:, -1] = 2 * values[:, :-1].sum(axis=1)
    return tuple(torch.from_numpy(v).double() for v in (mean, measured, usual))


def whole(objective: Objective, predicted: Tensor, measured: Tensor, usual: Tensor | None, cuts: list[int]) -> Tensor:
    """The loss, some outputs at a time."""

    def densities(block: slice) -> Densities | None:
        if usual is None:
            return None
        return Densities(usual[:, block], *(v[:, -1:] for v in (usual, predicted, measured)))

    blocks = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, predicted.shape[1]]) if b > a]
    n_varying = objective.n_varying(measured[:, block] for block in blocks)
    return sum(
        objective.part(
            predicted[:, block],
            measured[:, block],
            Part(block, predicted.shape[1], n_varying, 0, densities(block)),
        )
        for block in blocks
    )


def example(name: str) -> tuple[Objective, Tensor, Tensor, Tensor | None]:
    objective = make_objective(name, pcc_weight=0.3, target_sum=1e4, n_sizes=1, n_outputs=M)
    if name == "mse_pcc":
        measured = expression(1)
        measured[:, 2] = 3.25  # a gene that does not vary
        return objective, expression(0), measured, None
    return (objective.double(), *counts())


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5])
def test_mse_pcc_is_eq_6(weight: float) -> None:
    predicted, measured = expression(0), expression(1)
    r = [stats.pearsonr(p, m).statistic for p, m in zip(predicted.T.numpy(), measured.T.numpy(), strict=True)]
    expected = np.mean((predicted.numpy() - measured.numpy()) ** 2) + weight * np.mean(1 - np.array(r))
    assert whole(MsePcc(weight), predicted, measured, None, []).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", ["poisson", "nb"])
def test_likelihoods_are_scipys_up_to_what_the_counts_decide(name: str) -> None:
    """Differences between two sets of means, in nats per usual count, mean over outputs."""
    objective, mean, measured, usual = example(name)
    other = mean * torch.from_numpy(np.random.default_rng(5).uniform(0.5, 2, (N, M)))

    def literal(mu: Tensor) -> float:
        depth = measured[:, -1:] / mu[:, -1:]
        mu = torch.cat([mu[:, :-1] * depth, mu[:, -1:]], dim=1)
        if name == "poisson":
            logs = stats.poisson.logpmf(measured.numpy(), mu.numpy())
        else:
            alpha = objective.log_dispersion.detach().exp().numpy()[0]
            logs = stats.nbinom.logpmf(measured.numpy(), 1 / alpha, 1 / (1 + alpha * mu.numpy()))
            logs[:, -1] = stats.poisson.logpmf(measured.numpy(), mu.numpy())[:, -1]
        counts = usual * measured[:, -1:] / usual[:, -1:]
        counts[:, -1] = usual[:, -1]
        return float((-logs.sum(0) / counts.numpy().sum(0)).mean())

    found = whole(objective, mean, measured, usual, []) - whole(objective, other, measured, usual, [])
    assert found.item() == pytest.approx(literal(mean) - literal(other), rel=1e-6)


def test_a_negative_binomial_without_dispersion_is_poisson() -> None:
    mean, measured, usual = counts()
    poisson, nb = (CountLoss(kind, 1e4, 1, M).double() for kind in ("poisson", "nb"))
    nb.log_dispersion.data.fill_(-16)
    difference = [whole(f, mean, measured, usual, []) - whole(f, 2 * mean, measured, usual, []) for f in (poisson, nb)]
    torch.testing.assert_close(difference[0], difference[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, M), max_size=3).map(sorted))
def test_groups_of_outputs_do_not_matter(name: str, cuts: list[int]) -> None:
    objective, predicted, measured, usual = example(name)
    torch.testing.assert_close(
        whole(objective, predicted, measured, usual, cuts), whole(objective, predicted, measured, usual, [])
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_right(name: str) -> None:
    objective, predicted, measured, usual = example(name)
    predicted.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: whole(objective, p, measured, usual, [2]), predicted)


@pytest.mark.parametrize("name", ["poisson", "nb"])
def test_genes_do_not_pull_at_the_total(name: str) -> None:
    """A gene's density is a share of the total's: of how large that is, only the total's own counts tell."""
    objective, mean, measured, usual = example(name)
    log_total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    only_total = measured.clone()
    only_total[:, -1:] = mean[:, -1:]  # which the total fits already
    whole(objective, mean * log_total.exp(), only_total, usual, []).backward()
    assert abs(log_total.grad.item()) < 1e-6


@pytest.mark.parametrize("name", ["poisson", "nb"])
def test_genes_are_learnt_as_shares_of_what_a_region_has(name: str) -> None:
    """Three times the density of all, gene by gene, changes the loss of the total only."""
    objective, mean, measured, usual = example(name)
    mean = mean.requires_grad_()

    def gene_loss(values: Tensor) -> Tensor:
        return whole(objective, values, measured, usual, []) - objective.part(
            values[:, -1:],
            measured[:, -1:],
            Part(
                slice(M - 1, M), M, torch.ones(()), 0, Densities(*[usual[:, -1:]] * 2, values[:, -1:], measured[:, -1:])
            ),
        )

    torch.testing.assert_close(gene_loss(mean), gene_loss(3 * mean))
    (gradient,) = torch.autograd.grad(gene_loss(mean), mean)
    assert ((gradient * mean).sum(1).abs() < 1e-6).all()


@pytest.mark.parametrize("name", ["poisson", "nb"])
def test_the_truth_is_the_minimum(name: str) -> None:
    rng = np.random.default_rng(0)
    true = torch.from_numpy(rng.uniform(0.5, 4, M))
    true[-1] = true[:-1].sum()
    measured = torch.from_numpy(rng.poisson(true.numpy(), (4000, M))).double()
    measured[:, -1] = measured[:, :-1].sum(1)
    objective = make_objective(name, pcc_weight=0.5, target_sum=1e4, n_sizes=1, n_outputs=M).double()

    def loss(output: int, scale: float) -> float:
        mean = true.repeat(4000, 1)
        mean[:, output] *= scale
        return whole(objective, mean, measured, true.expand_as(measured), []).item()

    for output in (0, M - 1):
        assert loss(output, 1.0) < min(loss(output, 0.9), loss(output, 1.1))


def test_zero_means_and_zero_counts_stay_finite() -> None:
    usual = torch.ones(3, 2)
    for name in ("poisson", "nb"):
        objective = make_objective(name, pcc_weight=0.5, target_sum=1e4, n_sizes=1, n_outputs=2)
        mean = torch.zeros(3, 2, requires_grad=True)
        loss = whole(objective, mean, torch.tensor([[0.0, 4], [0, 0], [1, 0]]), usual, [])
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(mean.grad).all()


def test_log_normalised() -> None:
    found = log_normalised(torch.tensor([[3.0, 0], [0, 0]]), torch.tensor([[4.0], [0]]), 100)
    np.testing.assert_allclose(found, [[np.log1p(75), 0], [0, 0]], rtol=1e-6)
