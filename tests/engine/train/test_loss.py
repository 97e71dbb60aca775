"""The loss of a batch and its gradient do not depend on how many outputs are looked at together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from pixnet_sd.engine.train import BatchLoss, output_blocks
from pixnet_sd.geometry import Circles, Grid
from pixnet_sd.model import Network, Operator, build_operator, make_objective

M = 150
GRID = Grid(8, 8, 4)
REGIONS = [Circles([[9.0, 9.0], [20.0, 12.0], [16.0, 25.0]], 5.0), Circles([[8.0, 20.0], [22.0, 22.0]], 9.0)]


@pytest.fixture
def network(make_network):
    return lambda name: make_network(n_genes=M, link="identity" if name == "mse_pcc" else "softplus")


def loss_of(network: Network, name: str, *, sparsely: bool = False, **options: Any) -> BatchLoss:
    rng = np.random.default_rng(0)
    values = [rng.poisson(0.7, (len(r), M)).astype(np.float32) for r in REGIONS]
    values[1][:, 3] = 2  # does not vary
    targets = [sparse.csc_matrix(v) if sparsely else torch.from_numpy(v) for v in values]
    objective = make_objective(name, pcc_weight=0.5, target_sum=1e4, n_sizes=2, n_outputs=M)
    return BatchLoss(network, objective, [build_operator(r, GRID) for r in REGIONS], targets, [0, 1], **options)


def run(network: Network, loss: BatchLoss, fabric) -> tuple[float, list[torch.Tensor]]:
    features = torch.randn(1, network.head.in_features, 8, 8, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    trained = [features, network.head.weight, network.head.bias, *loss.objective.parameters()]
    for parameter in trained:
        parameter.grad = None
    value = loss.backward(features, fabric).item()
    return value, [p.grad.clone() for p in trained]


@pytest.mark.parametrize(("name", "sparsely"), [("mse_pcc", True), ("poisson", False), ("nb", True)])
def test_blocks_of_outputs_do_not_matter(network, fabric, name: str, sparsely: bool) -> None:
    net = network(name)
    expected, gradients = run(net, loss_of(net, name, depth=1.7), fabric)
    found, ours = run(net, loss_of(net, name, sparsely=sparsely, depth=1.7, block_size=64), fabric)
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n_outputs", "n_rows", "n_blocks"), [(1024, 10**7, 1), (30_000, 100, 1), (30_000, 10**5, 90)])
def test_outputs_are_held_within_128_mib(n_outputs: int, n_rows: int, n_blocks: int) -> None:
    blocks = output_blocks(n_outputs, n_rows)
    assert [k for block in blocks for k in range(block.start, block.stop)] == list(range(n_outputs))
    assert len(blocks) == n_blocks


@pytest.mark.parametrize("name", ["mse_pcc", "poisson"])
def test_sizes_weigh_the_same_and_one_without_regions_nothing(network, fabric, name: str) -> None:
    net = network(name)
    both = loss_of(net, name)

    def loss(operators: list[Operator], targets: list[torch.Tensor], sizes: list[int]) -> float:
        return run(net, BatchLoss(net, both.objective, operators, targets, sizes), fabric)[0]

    each = [loss([both.operators[k]], [both.targets[k]], [k]) for k in (0, 1)]
    expected = run(net, both, fabric)[0]
    assert expected == pytest.approx(np.mean(each), rel=1e-5)
    empty = build_operator(Circles(np.empty((0, 2)), np.empty(0)), GRID)
    assert loss([*both.operators, empty], [*both.targets, torch.empty(0, M)], [0, 1, 2]) == expected


def test_depth_scales_what_is_expected(network, fabric) -> None:
    """Twice the counts at twice the depth: the same gradient per count."""
    net = network("poisson")
    one = loss_of(net, "poisson")
    two = BatchLoss(net, one.objective, one.operators, [2 * t for t in one.targets], [0, 1], depth=2.0)
    for a, b in zip(run(net, one, fabric)[1], run(net, two, fabric)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
