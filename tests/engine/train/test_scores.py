"""The loss of a batch, some outputs at a time; scores of a network that knows the answer, and of gene means."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tests.engine.train.conftest import Colours
from torch import Tensor

from pixnet_sd.engine import MeasuredRegions, TrainingSlide
from pixnet_sd.engine.train import BatchLoss, FeatureMaps, Moments, output_blocks, score_regions
from pixnet_sd.geometry import Circles, Grid
from pixnet_sd.model import Head, Network, Operator, build_operator, make_objective

M = 150
GRID = Grid(8, 8, 4)
REGIONS = [Circles([[9.0, 9.0], [20.0, 12.0], [16.0, 25.0]], 5.0), Circles([[8.0, 20.0], [22.0, 22.0]], 9.0)]


@pytest.fixture
def network_for(make_network):
    return lambda name: make_network(n_genes=M, link="identity" if name == "mse_pcc" else "softplus")


def loss_of(network: Network, name: str, *, sparsely: bool = False, **options: Any) -> BatchLoss:
    rng = np.random.default_rng(0)
    values = [rng.poisson(0.7, (len(r), M)).astype(np.float32) for r in REGIONS]
    values[1][:, 3] = 2  # does not vary
    targets = [sparse.csc_matrix(v) if sparsely else torch.from_numpy(v) for v in values]
    objective = make_objective(name, pcc_weight=0.5, target_sum=1e4)
    return BatchLoss(network, objective, [build_operator(r, GRID) for r in REGIONS], targets, [0, 1], **options)


def gradients_of(network: Network, loss: BatchLoss, fabric) -> tuple[float, list[torch.Tensor]]:
    features = torch.randn(1, network.head.in_features, 8, 8, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    trained = [features, network.head.weight, network.head.bias]
    trained += [] if network.log_dispersion is None else [network.log_dispersion]
    for parameter in trained:
        parameter.grad = None
    value = loss.backward(features, fabric).item()
    return value, [p.grad.clone() for p in trained]


@pytest.mark.parametrize(("name", "sparsely"), [("mse_pcc", True), ("nb_pcc", False), ("nb_pcc", True)])
def test_blocks_of_outputs_do_not_matter(network_for, fabric, name: str, sparsely: bool) -> None:
    net = network_for(name)
    expected, gradients = gradients_of(net, loss_of(net, name, depth=1.7), fabric)
    found, ours = gradients_of(net, loss_of(net, name, sparsely=sparsely, depth=1.7, block_size=64), fabric)
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n_outputs", "n_rows", "n_blocks"), [(1024, 10**7, 1), (30_000, 100, 1), (30_000, 10**5, 90)])
def test_outputs_are_held_within_128_mib(n_outputs: int, n_rows: int, n_blocks: int) -> None:
    blocks = output_blocks(n_outputs, n_rows)
    assert [k for block in blocks for k in range(block.start, block.stop)] == list(range(n_outputs))
    assert len(blocks) == n_blocks


@pytest.mark.parametrize("name", ["mse_pcc", "nb_pcc"])
def test_sizes_weigh_the_same_and_one_without_regions_nothing(network_for, fabric, name: str) -> None:
    net = network_for(name)
    both = loss_of(net, name)

    def loss(operators: list[Operator], targets: list[torch.Tensor], sizes: list[int]) -> float:
        return gradients_of(net, BatchLoss(net, both.objective, operators, targets, sizes), fabric)[0]

    each = [loss([both.operators[k]], [both.targets[k]], [k]) for k in (0, 1)]
    expected = gradients_of(net, both, fabric)[0]
    assert expected == pytest.approx(np.mean(each), rel=1e-5)
    empty = build_operator(Circles(np.empty((0, 2)), np.empty(0)), GRID)
    assert loss([*both.operators, empty], [*both.targets, torch.empty(0, M)], [0, 1, 2]) == expected


def test_the_total_is_learnt_from_its_own_counts_alone(network_for, fabric) -> None:
    """Whatever the genes' counts and the weights of the other terms are."""
    net = network_for("nb_pcc")
    one = loss_of(net, "nb_pcc")
    likelihood = make_objective("nb_pcc", pcc_weight=0.0, target_sum=1e4)
    others = [torch.cat([t[:, :-1].flip(0), t[:, -1:]], dim=1) for t in one.targets]
    found = [
        gradients_of(net, loss, fabric)[1][1][-1] for loss in (one, replace(one, objective=likelihood, targets=others))
    ]
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_depth_scales_what_is_expected(network_for, fabric) -> None:
    """Twice the counts at twice the depth: the same gradient per count."""
    net = network_for("nb_pcc")
    net.log_dispersion.data.fill_(-12)  # none, with which the gradient would grow less than the counts
    likelihood = make_objective("nb_pcc", pcc_weight=0.0, target_sum=1e4)
    one = replace(loss_of(net, "nb_pcc"), objective=likelihood)
    two = BatchLoss(net, likelihood, one.operators, [2 * t for t in one.targets], [0, 1], depth=2.0)
    of_one, of_two = (gradients_of(net, loss, fabric)[1][:3] for loss in (one, two))
    for a, b in zip(of_one, of_two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


MSE = make_objective("mse_pcc", pcc_weight=0.5, target_sum=1e4)
COUNTS = make_objective("nb_pcc", pcc_weight=0.5, target_sum=1e4)


KNOWS = torch.eye(3) / 128


@pytest.fixture
def score(make_network, make_run, fabric):
    """Scores of a network whose head takes colours for genes."""

    def found(slides: list[TrainingSlide], objective=MSE, weight: Tensor = KNOWS, n_batches=None):
        link = "softplus" if objective.has_total else "identity"
        network = make_network(link=link)
        network.head = Head(3, 3, link)
        network.head.bias.data, network.head.weight.data = torch.zeros(3), weight
        if objective.has_total:
            network.log_dispersion.data.fill_(-12)
        return score_regions(network, objective, Colours(network, make_run(), fabric), slides, n_batches)

    return found


def test_a_network_that_knows_scores_high(score, learnable) -> None:
    slides = [learnable(150, 200, radii=(5.0, 10.0)), learnable(64, 300, seed=1, name="other")]
    scores = score(slides)
    assert scores.pcc > 0.95
    assert scores.mse < 0.01
    values = [m.values for s in slides for m in s.measured]
    assert scores.gene_mean_mse == pytest.approx(np.mean([v.var(axis=0).mean() for v in values]), rel=1e-5)
    assert scores.zero_mse == pytest.approx(np.mean([(v**2).mean() for v in values]), rel=1e-5)
    slides[0].read.calls.clear()
    assert score(slides, n_batches=1).pcc > 0.9
    assert 0 < len(slides[0].read.calls) <= 3


def test_constant_genes_take_no_part(score, learnable) -> None:
    one, other = learnable(), learnable(seed=1)
    one.measured[0].values[:, :2] = 1
    other.measured[0].values[:, 1] = 0
    scores = score([one, other])
    assert np.isnan(scores.pcc_per_gene).tolist() == [False, True, False]
    assert scores.pcc == pytest.approx(np.nanmean(scores.pcc_per_gene))
    assert scores.pcc > 0.9


def test_no_chance_no_gradients_no_statistics(make_network, make_run, fabric, learnable) -> None:
    network: Network = make_network(dropout=0.5).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    features, slide = FeatureMaps(network, make_run(), fabric), learnable()
    once, again = (score_regions(network, MSE, features, [slide]) for _ in range(2))
    assert once == again
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted), seed=st.integers(0, 99), offset=st.sampled_from([0, 1e3])
)
def test_moments_do_not_depend_on_the_batches(cuts: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    measured = rng.normal(offset, 1, (40, 3)).astype(np.float32)
    predicted = measured + rng.normal(0, 1, (40, 3)).astype(np.float32)
    measured[:, 1], predicted[:, 2] = 0.1, 0.3
    parts = [slice(start, stop) for start, stop in itertools.pairwise([0, *cuts, 40]) if start < stop]
    own = (Moments.of(torch.from_numpy(predicted[part]), torch.from_numpy(measured[part])) for part in parts)
    moments = functools.reduce(Moments.merged, own)
    expected = np.corrcoef(predicted[:, 0].astype(float), measured[:, 0].astype(float))[0, 1]
    np.testing.assert_allclose(moments.pcc, [expected, np.nan, 0], atol=1e-6)
    error = predicted - measured
    np.testing.assert_allclose(moments.mse, (error**2).mean(axis=0, dtype=float), rtol=1e-5)
    np.testing.assert_allclose(moments.mae, np.abs(error).mean(axis=0, dtype=float), rtol=1e-5)


def test_counts_are_compared_log_normalised(score, learnable) -> None:
    """A network that knows the shares scores as one that knows log-normalised expression, whatever the depth."""
    slide = learnable(150, 200)
    (measured,) = slide.measured
    measured.values[:, 2] = 1 / 128
    counts = MeasuredRegions("counts", measured.regions, 50 * measured.values)
    scores = score([replace(slide, measured=(counts,))], COUNTS, torch.diag(torch.tensor([1.0, 1, 0])))
    assert len(scores.pcc_per_gene) == 2  # the third output is the sum
    expected = np.log1p(1e4 * measured.values[:, :2] / measured.values[:, 2:])
    assert scores.pcc > 0.9
    assert scores.mse < 0.05 * expected.var()
    sums = counts.values.sum(axis=0, dtype=float)
    of_means = ((expected - np.log1p(1e4 * sums[:2] / sums[2])) ** 2).mean()
    assert scores.gene_mean_mse == pytest.approx(of_means, rel=1e-4)


def test_regions_without_counts_are_not_compared(score, learnable) -> None:
    """They have no log-normalised expression; with it at 0 they would decide the correlation."""
    slide = learnable(150, 200)
    (measured,) = slide.measured
    every = np.arange(len(measured.regions))
    values = 50 * measured.values
    values[every % 3 == 0] = 0
    mixed = MeasuredRegions("mixed", measured.regions, values)
    weight = torch.diag(torch.tensor([1.0, 0.5, 0]))
    found, expected = (
        score([replace(slide, measured=(m,))], COUNTS, weight) for m in (mixed, mixed.subset(every[every % 3 > 0]))
    )
    np.testing.assert_allclose(found.pcc_per_gene, expected.pcc_per_gene, rtol=1e-6)
    assert found.mse == pytest.approx(expected.mse)
