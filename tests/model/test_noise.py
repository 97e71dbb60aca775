"""What is measured of expected counts: expectations equal sums over all counts, intervals hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.model.literal import literal_expectation

from pixnet_sd.model.noise import (
    Dispersion,
    calibrated_dispersion,
    coverage,
    expected_log_normalised,
    minus_log_likelihood,
    quantiles,
)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-4, 300), st.floats(0.01, 3), st.floats(1e-5, 1), st.sampled_from([1e3, 1e6]))
def test_expected_log_normalised_is_the_sum_over_all_counts(
    mean: float, alpha: float, share: float, target_sum: float
) -> None:
    total = max(mean / share, 1)
    found = expected_log_normalised(*torch.tensor([[[mean]], [[alpha]], [[total]]]).double(), target_sum)
    literal = literal_expectation(np.array([[mean]]), np.array([alpha]), np.array([[total * 1e4 / target_sum]]))
    assert found.item() == pytest.approx(literal.item(), abs=1e-3)


def test_gradients_of_the_expectation() -> None:
    rng, dispersion = np.random.default_rng(0), torch.tensor([0.1, 1, 5]).double()
    mean = torch.from_numpy(rng.uniform(0.1, 5, (6, 3))).requires_grad_()
    total = torch.tensor([[9.0], [20], [0], [1e3], [50], [7]]).double()
    for of in (dispersion, dispersion * torch.ones(6, 1)):
        assert torch.autograd.gradcheck(lambda mean, of=of: expected_log_normalised(mean, of, total, 1e2), mean)
    assert (expected_log_normalised(mean, dispersion, total, 1e2)[2] == 0).all()


def test_many_regions_are_as_each_by_itself() -> None:
    """More than are worked through at a time."""
    n, width = 90, 30_000
    mean = torch.rand(n, width, generator=torch.manual_seed(0)).mul_(9).requires_grad_()
    counts, total, dispersion = mean.detach().round(), torch.full((n, 1), 1.5e5), torch.linspace(0.01, 2, width)
    of_region = dispersion * torch.linspace(0.5, 2, n)[:, None]
    whole = expected_log_normalised(mean, of_region, total, 1e4)
    lost = minus_log_likelihood(mean, counts, dispersion)
    (slope,) = torch.autograd.grad(whole.sum() + lost.sum(), mean)
    parts = [mean.detach()[k::2].requires_grad_() for k in range(2)]
    for k, part in enumerate(parts):
        found = expected_log_normalised(part, of_region[k::2], total[k::2], 1e4)
        torch.testing.assert_close(found, whole[k::2])
        lost_there = minus_log_likelihood(part, counts[k::2], dispersion)
        torch.testing.assert_close(*torch.autograd.grad(found.sum() + lost_there.sum(), part), slope[k::2])
        lost = lost - lost_there
    assert lost.abs().max() < 0.05  # of hundreds


# Likelihood


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from([0.01, 0.4, 30.0]), st.sampled_from([1e-4, 0.3, 20.0]))
def test_likelihood_is_that_of_scipy_and_so_are_its_gradients(seed: int, depth: float, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    mean, dispersion = depth * rng.uniform(0.5, 2, (8, 2)), np.array([alpha, 0.5])
    counts, inputs = drawn(seed, mean, dispersion), (torch.from_numpy(mean), torch.from_numpy(dispersion))

    def literal(mu: np.ndarray) -> np.ndarray:
        return np.asarray(stats.nbinom.logpmf(counts, 1 / dispersion, 1 / (1 + dispersion * mu)).sum(0))

    found = minus_log_likelihood(inputs[0], torch.from_numpy(counts), inputs[1])
    other = minus_log_likelihood(2 * inputs[0], torch.from_numpy(counts), inputs[1])  # less what the counts decide
    np.testing.assert_allclose((found - other).numpy(), literal(2 * mean) - literal(mean), rtol=1e-5, atol=1e-5)
    inputs = tuple(each.requires_grad_() for each in inputs)
    assert torch.autograd.gradcheck(
        lambda mu, a: minus_log_likelihood(mu, torch.from_numpy(counts), a), inputs, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("dispersion", [1e-30, 1e-10, 1e10])
def test_likelihood_is_finite_whatever_the_dispersion_becomes(dispersion: float) -> None:
    mean, alpha = (torch.full(shape, value, requires_grad=True) for shape, value in (((3, 2), 2.0), ((2,), dispersion)))
    lost = minus_log_likelihood(mean, torch.tensor([[0.0, 3]] * 3), alpha).sum()
    assert torch.isfinite(torch.stack([lost, *(each.sum() for each in torch.autograd.grad(lost, (mean, alpha)))])).all()


# Intervals


def drawn(seed: int, mean: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(mean * rng.gamma(1 / alpha, alpha, mean.shape)).astype(float)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.sampled_from([0.01, 0.4, 3.0, 200.0]), st.floats(0.5, 0.99))
def test_intervals_hold_their_share_of_draws_of_any_depth(seed: int, depth: float, level: float) -> None:
    """Where 99 % are 0 as well, which no interval of whole counts does."""
    mean, alpha = depth * np.random.default_rng(seed).uniform(0.5, 2, (4000, 3)), np.array([0.02, 0.3, 1.5])
    assert coverage(drawn(seed, mean, alpha), mean, alpha, level).mean() == pytest.approx(level, abs=0.02)


def test_coverage_is_the_share_of_what_a_count_stands_for() -> None:
    mean, alpha = np.full((1, 40), 6.0), np.full(40, 0.4)
    below, upto = (stats.nbinom.cdf(np.arange(40) - k, 1 / 0.4, 1 / 3.4) for k in (1, 0))
    found = coverage(np.arange(40.0)[None], mean, alpha, 0.8)[0]
    expected = np.clip(np.minimum(upto, 0.9) - np.maximum(below, 0.1), 0, None) / (upto - below)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_calibrated_dispersion_covers_what_one_of_training_does_not() -> None:
    """Means that are off scatter more; rare genes get the others' widening."""
    rng, alpha = np.random.default_rng(0), np.full(5, 0.05)
    mean = rng.uniform(1, 40, (600, 5)) * [1, 1, 1, 1, 1e-5]
    counts = drawn(1, mean * rng.lognormal(0, 0.6, mean.shape), alpha)
    found = calibrated_dispersion(counts[::2], mean[::2], alpha)
    before, after = (coverage(counts[1::2], mean[1::2], each).mean(axis=0)[:4] for each in (alpha, found))
    assert (before < 0.75).all()
    np.testing.assert_allclose(after, 0.9, atol=0.05)
    assert found[4] == pytest.approx(0.05 * np.median(found[:4] / 0.05), rel=0.5)
    for few in (0, 15):
        np.testing.assert_array_equal(calibrated_dispersion(counts[:few], mean[:few], alpha), alpha)
    none_expected = coverage(np.array([[0.0, 3]]), np.zeros((1, 2)), np.ones(2))
    np.testing.assert_allclose(none_expected, [[0.9, 0]], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 5e3), st.floats(1e-3, 10), st.sampled_from([0.05, 0.5, 0.95]))
def test_quantiles_are_those_of_scipy(mean: float, alpha: float, probability: float) -> None:
    (((found,),),) = quantiles(torch.tensor([[mean]]), torch.tensor([[alpha]]), [probability])
    literal = stats.nbinom.ppf(probability, 1 / alpha, 1 / (1 + alpha * mean))
    assert found == pytest.approx(literal, rel=0.01, abs=1)
    assert found == int(found)


def test_dispersion_between_sizes() -> None:
    """Straight lines in logarithms, and constant beyond the ends; tables keep it as columns."""
    learnt = Dispersion.learnt(torch.tensor([[0.0, 1], [-2, -1], [-2, -3]]), [4.0, 64.0, 64.0])
    columns = {"other": np.zeros(2), **learnt.columns()}
    for each in (learnt, Dispersion.read(columns)):
        found = np.log(each.at(np.array([1.0, 4, 16, 64, 500])))
        np.testing.assert_allclose(found[:, 0], [0, 0, -1, -2, -2], atol=1e-12)
        np.testing.assert_allclose(found[:, 1], [1, 1, -0.5, -2, -2], atol=1e-12)
    one = Dispersion.learnt(torch.zeros(1, 2), [100.0])
    np.testing.assert_allclose(one.of(np.array([1])).at(np.array([1.0, 1e4])), 1)
    assert Dispersion.read({"other": np.zeros(2), "dispersion_ofum2": np.zeros(2)}) is None
    alike = Dispersion.learnt(torch.tensor([[0.0], [2.0]]), [7853.981, 7853.984])  # a column of the table for both
    np.testing.assert_allclose(Dispersion.read(alike.columns()).at(np.array([0.0, 7854])), np.e)
