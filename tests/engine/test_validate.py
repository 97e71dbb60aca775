from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixnet_sd.engine import Copies, MeasuredRegions, TrainingSlide, TrainingTiles
from pixnet_sd.engine.train import TrainSettings
from pixnet_sd.engine.train._batches import Batch
from pixnet_sd.engine.train._features import FeatureMaps
from pixnet_sd.engine.train._validate import Moments
from pixnet_sd.engine.train._validate import validate as validate_against
from pixnet_sd.geometry import Circles
from pixnet_sd.model import Head
from pixnet_sd.model._objectives import CountLoss, MsePcc, pearson_per_gene

SETTINGS = TrainSettings(tile_px=64, batch_size=3)
OBJECTIVE = MsePcc(0.5)


def validate(network, objective, *rest):
    """Against genes whose mean is 1."""
    return validate_against(network, objective, *rest, {"": np.ones(network.head.n_outputs - objective.has_total)})


class Colours:
    """Stands in for a network that knows the answer: its map is the colour of the slide over 128."""

    stored = False
    pins = False
    copies = Copies(torch.device("cpu"))

    def of(self, batch: Batch, slide: TrainingSlide, tiles: TrainingTiles) -> Tensor:
        return torch.nn.functional.avg_pool2d(batch.image.float(), 4)


@pytest.fixture
def oracle(make_network):
    network = make_network()
    network.head = Head(3, 3)
    torch.nn.init.zeros_(network.head.bias)
    network.head.weight.data = torch.eye(3) / 128
    return network


def test_a_network_that_knows_scores_high(oracle, learnable) -> None:
    slides = [learnable(150, 200, radii=(5.0, 10.0)), learnable(64, 300, seed=1, name="other")]
    scores = validate(oracle, OBJECTIVE, Colours(), slides, SETTINGS)
    assert scores.pcc > 0.95
    assert scores.mse < 0.01
    assert min(scores.pcc_per_gene) > 0.9


def test_regions_are_scored_in_their_order(oracle, learnable) -> None:
    slide = learnable(150, 200)
    (measured,) = slide.measured
    measured.values[:] = measured.values[::-1].copy()
    assert abs(validate(oracle, OBJECTIVE, Colours(), [slide], SETTINGS).pcc) < 0.6


def test_constant_genes_take_no_part(oracle, learnable) -> None:
    here, there = learnable(), learnable(seed=1)
    here.measured[0].values[:, :2] = 1
    there.measured[0].values[:, 1] = 0
    scores = validate(oracle, OBJECTIVE, Colours(), [here, there], SETTINGS)
    assert np.isnan(scores.pcc_per_gene).tolist() == [False, True, False]
    assert scores.pcc == pytest.approx((scores.pcc_per_gene[0] + scores.pcc_per_gene[2]) / 2)
    assert scores.pcc > 0.9


def test_nothing_varies(oracle, slide_of, reader, draw) -> None:
    slide = slide_of(Circles([[20, 20], [40, 20]], 5), values=[np.ones((2, 3), np.float32)], read=reader(draw(64, 64)))
    scores = validate(oracle, OBJECTIVE, Colours(), [slide], SETTINGS)
    assert scores.pcc == float("-inf")
    assert np.isfinite(scores.mse)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_chance_no_gradients_no_statistics(make_network, fabric, learnable, tmp_path: Path, frozen: bool) -> None:
    network = make_network(frozen=frozen, dropout=0.5).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    features = FeatureMaps(network, fabric, SETTINGS, tmp_path)
    slide = learnable()
    once, again = (validate(network, OBJECTIVE, features, [slide], SETTINGS) for _ in range(2))
    assert once == again
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@given(
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted), seed=st.integers(0, 99), offset=st.sampled_from([0, 1e3])
)
def test_moments_do_not_depend_on_the_batches(cuts: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    measured = torch.from_numpy(rng.normal(offset, 1, (40, 3)).astype(np.float32))
    predicted = measured + torch.from_numpy(rng.normal(0, 1, (40, 3)).astype(np.float32))
    measured[:, 1], predicted[:, 2] = 0.1, 0.3
    moments = Moments(3)
    for start, stop in itertools.pairwise([0, *cuts, 40]):
        moments.add(predicted[start:stop], measured[start:stop])
    expected = pearson_per_gene(predicted.double(), measured.double()).numpy()
    np.testing.assert_allclose(moments.pcc, expected, atol=1e-6)
    assert np.isnan(moments.pcc[1])
    assert moments.pcc[2] == 0
    assert moments.mse == pytest.approx(float(((predicted - measured) ** 2).mean()), rel=1e-5)


def test_counts_are_compared_log_normalised(make_network, learnable) -> None:
    """A network that knows the shares scores as one that knows log-normalised expression, whatever the depth."""
    slide = learnable(150, 200)
    (measured,) = slide.measured
    network = make_network(link="softplus")
    network.head = Head(3, 3, "softplus")
    network.head.weight.data, network.head.bias.data = torch.diag(torch.tensor([1.0, 1, 0])), torch.zeros(3)
    measured.values[:, 2] = 1 / 128
    counts = MeasuredRegions("counts", measured.regions, 50 * measured.values)
    objective = CountLoss("poisson", 1e4, 1, 3)
    scores = validate(network, objective, Colours(), [replace(slide, measured=(counts,))], SETTINGS)
    assert len(scores.pcc_per_gene) == 2  # the third output is the sum
    expected = np.log1p(1e4 * measured.values[:, :2] / measured.values[:, 2:])
    assert scores.pcc > 0.9
    assert scores.mse < 0.05 * expected.var()


def test_regions_without_counts_are_not_compared(make_network, learnable) -> None:
    """They have no log-normalised expression; with it at 0 they would decide the correlation."""
    slide = learnable(150, 200)
    (measured,) = slide.measured
    network = make_network(link="softplus")
    network.head = Head(3, 3, "softplus")
    objective = CountLoss("poisson", 1e4, 1, 3)
    every = np.arange(len(measured.regions))
    values = 50 * measured.values
    values[every % 3 == 0] = 0
    some = MeasuredRegions("some", measured.regions, values)
    only = some.subset(every[every % 3 > 0])
    found, expected = (
        validate(network, objective, Colours(), [replace(slide, measured=(m,))], SETTINGS) for m in (some, only)
    )
    np.testing.assert_allclose(found.pcc_per_gene, expected.pcc_per_gene, rtol=1e-6)
    assert found.mse == pytest.approx(expected.mse)
