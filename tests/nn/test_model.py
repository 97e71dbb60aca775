"""The network's predictions equal Eq. 4-5 carried out to the letter, gradients too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.literal import aggregates, resize, sums
from tests.nn.strategies import grid_and_regions, turned
from torch import Tensor

from pixnet_sd.geometry import MAP_STRIDE, Circles, Grid, LabelGrid, Lattice, Regions
from pixnet_sd.model import (
    Aggregation,
    DecoderConfig,
    Network,
    TiledOperator,
    build_encoder,
    build_operator,
)

CHANNELS, GENES = 4, 3
CONFIG = DecoderConfig(widths=(CHANNELS, 4, 6, 6), hidden=(4, 4, 4), dropout=0.1)


def make(aggregation: Aggregation = "mean", config: DecoderConfig = CONFIG) -> Network:
    torch.manual_seed(0)
    network = Network(build_encoder("test_resnet", None), config, GENES, aggregation)
    torch.nn.init.normal_(network.head.bias)
    return network


MODELS: dict[Aggregation, Network] = {"mean": make("mean"), "sum": make("sum")}


def feature_map(grid: Grid, seed: int = 0) -> Tensor:
    return torch.randn(1, CHANNELS, grid.height, grid.width, generator=torch.Generator().manual_seed(seed))


def literal_prediction(network: Network, features: Tensor, grid: Grid, regions: Regions) -> Tensor:
    """Linear at every pixel, resize, sum in masks, in float64; over the pixels for a mean."""
    low = torch.einsum("mc,chw->mhw", network.head.weight.double(), features[0].double())
    total, n_px = aggregates(regions, low + network.head.bias.double()[:, None, None], grid.stride)
    return total / torch.from_numpy(n_px)[:, None] if network.aggregation == "mean" else total


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@settings(deadline=None, max_examples=40)
@given(example=grid_and_regions())
def test_regions_and_gradients_are_the_literal_ones(aggregation: Aggregation, example: tuple[Grid, Regions]) -> None:
    network, (grid, regions) = MODELS[aggregation], example
    operator = build_operator(regions, grid)
    seen = np.nonzero(operator.n_px > 0)[0]  # a mean over nothing is nothing to compare with
    features = feature_map(grid).requires_grad_()
    weights = (torch.arange(len(seen) * GENES).reshape(-1, GENES) % 7 - 3.0) / 3
    inputs = [features, network.head.weight, network.head.bias]
    fast = network.predict_regions(features, operator)[seen]
    slow = literal_prediction(network, features, grid, regions)[seen]
    scale = max(1.0, float(slow.detach().abs().max())) if len(seen) else 1.0
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5 * scale)
    pairs = zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def test_gene_map_is_the_head_at_every_pixel() -> None:
    network, features = MODELS["mean"], feature_map(Grid(5, 6, 4))
    expected = network.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(network.gene_map(features), expected)


def test_regions_are_sums_over_the_gene_map() -> None:
    network, features, mask = MODELS["sum"], feature_map(Grid(5, 6, 4)), np.zeros((1, 20, 24), bool)
    regions = Circles([[9.7, 11.2]], [6.6])
    for _, row, start, stop in zip(*regions.spans(0, 20, 0, 24), strict=True):
        mask[0, row, start:stop] = True
    summed = sums(resize(network.gene_map(features)[0], 4), mask)
    torch.testing.assert_close(
        network.predict_regions(features, build_operator(regions, Grid(5, 6, 4))), summed, rtol=1e-5, atol=1e-4
    )


def densities() -> Network:
    torch.manual_seed(1)
    network = Network(build_encoder("test_resnet", None), CONFIG, GENES, "sum", "softplus")
    network.head.unit.copy_(torch.tensor([0.2, 1.0, 3.0]))
    return network


DENSITIES = densities()


@settings(deadline=None, max_examples=40)
@given(example=grid_and_regions())
def test_regions_of_densities_are_the_literal_ones(example: tuple[Grid, Regions]) -> None:
    """Link at every low-resolution pixel, then resize, then sums in masks."""
    grid, regions = example
    features = feature_map(grid)
    low = DENSITIES.gene_map(features)[0].double()
    total, _ = aggregates(regions, low, grid.stride)
    found = DENSITIES.predict_regions(features, build_operator(regions, grid)).double()
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5 * max(1.0, float(total.abs().max())))
    assert (found >= 0).all()


@settings(deadline=None, max_examples=40)
@given(example=grid_and_regions(), cut=st.integers(0, 60))
def test_expected_counts_of_disjoint_regions_add_up(example: tuple[Grid, Regions], cut: int) -> None:
    """Circles, bins and polygons, each cut in two: the whole has the counts of both."""
    grid, regions = example
    height, width = grid.height * grid.stride, grid.width * grid.stride
    features = feature_map(grid)
    whole = build_operator(regions, grid)
    spans = regions.spans(0, height, 0, width)
    for k in np.unique(spans.region):
        labels = np.zeros((height, width), np.int64)
        mine = spans.region == k
        for row, start, stop in zip(spans.row[mine], spans.start[mine], spans.stop[mine], strict=True):
            labels[row, start:stop] = np.where(np.arange(start, stop) < cut, 1, 2)
        parts = build_operator(LabelGrid(labels, np.unique(labels[labels > 0])), grid)
        expected = DENSITIES.predict_regions(features, whole)[k]
        found = DENSITIES.predict_regions(features, parts).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@settings(deadline=None, max_examples=40)
@given(pitch=st.integers(2, 5), angle=st.integers(0, 20), x=st.integers(0, 30), y=st.integers(0, 30))
def test_a_bin_has_the_counts_of_the_sixteen_in_it(pitch: int, angle: int, x: int, y: int) -> None:
    grid, features = Grid(14, 14, 4), feature_map(Grid(14, 14, 4))
    fine = turned(pitch + 0.13, np.deg2rad(angle), (20.0 + x / 10, 12.0 + y / 10))
    row, col = (part.ravel() for part in np.mgrid[:8, :8])
    small = DENSITIES.predict_regions(features, build_operator(Lattice(row, col, fine), grid))
    large = Lattice([0, 0, 1, 1], [0, 1, 0, 1], fine @ np.diag([4.0, 4.0, 1.0]))
    expected = DENSITIES.predict_regions(features, build_operator(large, grid))
    parent = torch.from_numpy((row // 4) * 2 + col // 4)
    found = torch.zeros(4, GENES).index_add(0, parent, small)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_batches_have_their_columns_one_after_the_other() -> None:
    network, grid = MODELS["mean"], Grid(5, 6, 4)
    maps = [feature_map(grid, seed) for seed in (0, 1)]
    parts = [build_operator(Circles(centre, 5.0), grid) for centre in ([[9.0, 9.0], [3.0, 3.0]], [[15.0, 12.0]])]
    together = TiledOperator(parts)
    expected = torch.cat([network.predict_regions(d, p) for d, p in zip(maps, parts, strict=True)])
    torch.testing.assert_close(network.predict_regions(torch.cat(maps), together), expected)


def test_off_the_slide() -> None:
    """Nothing to sum; the bias, which is the training mean at first, as a mean. Not NaN, which would spoil a batch."""
    operator = build_operator(Circles([[-50.0, 0.0]], 5.0), Grid(5, 6, 4))
    features = feature_map(Grid(5, 6, 4))
    torch.testing.assert_close(MODELS["sum"].predict_regions(features, operator), torch.zeros(1, GENES))
    torch.testing.assert_close(MODELS["mean"].predict_regions(features, operator), MODELS["mean"].head.bias[None])


def test_predictions_stay_float32_under_autocast() -> None:
    network, grid = MODELS["mean"], Grid(5, 6, 4)
    operator = build_operator(Circles([[9.0, 9.0]], 5.0), grid)
    with torch.autocast("cpu", torch.bfloat16):
        result = network.predict_regions(feature_map(grid), operator)
    assert torch.equal(result, network.predict_regions(feature_map(grid), operator))


def test_forward_is_at_the_maps_stride() -> None:
    with torch.no_grad():
        features = MODELS["mean"].eval()(torch.zeros(2, 3, 64, 96))
    assert features.shape == (2, CHANNELS, 64 // 96 // MAP_STRIDE)


@pytest.mark.parametrize(("aggregation", "share"), [("mean", 1.0), ("sum", 52 / 40)])
def test_start_from_the_training_mean(aggregation: Aggregation, share: float) -> None:
    """A sum over 52 px, where 40 px are typical, starts that much above the mean."""
    network, mean = make(aggregation), torch.tensor([0.5, 2.0, 7.0])
    network.start_from(mean, 40.0)
    operator = build_operator(Circles([[20.0, 20.0]], 4.0), Grid(10, 10, 4))
    assert operator.n_px == pytest.approx(52)
    with torch.no_grad():
        predicted = network.predict_regions(torch.zeros(1, CHANNELS, 10, 10), operator)
    torch.testing.assert_close(predicted[0], mean * share)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_start_is_near_the_training_mean_whatever_the_tissue(aggregation: Aggregation) -> None:
    network, mean = make(aggregation), torch.tensor([0.5, 2.0, 7.0])
    network.start_from(mean, 52.0)
    operator = build_operator(Circles([[20.0, 20.0]], 4.0), Grid(10, 10, 4))
    with torch.no_grad():
        predicted = network.predict_regions(feature_map(Grid(10, 10, 4)), operator)[0]
    assert not torch.equal(predicted, mean)
    assert (predicted - mean).abs().max() < 0.5


def test_calibrate_standardises_each_level() -> None:
    network = make()
    assert network.has_laterals
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(200, c, generator=generator) * 7 + 3 for c in network.encoder.channels]
    network.calibrate(samples)
    for lateral, values in zip(network.decoder.laterals, samples, strict=True):
        standard = (values - lateral.mean) * lateral.scale
        torch.testing.assert_close(standard.mean(0), torch.zeros(values.shape[1]), rtol=0, atol=1e-4)
        torch.testing.assert_close(standard.std(0, correction=0), torch.ones(values.shape[1]), rtol=0, atol=1e-3)


def test_calibrate_with_a_single_region_stays_finite() -> None:
    network = make()
    network.calibrate([torch.randn(1, c) for c in network.encoder.channels])
    assert all(torch.isfinite(lateral.scale).all() for lateral in network.decoder.laterals)


def test_papers_decoder_has_nothing_to_calibrate() -> None:
    network = make(config=DecoderConfig(widths=None, hidden=(4, 4, 4)))
    assert not network.has_laterals
    assert network.head.in_features == network.encoder.channels[0]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.calibrate([torch.ones(3, c) for c in network.encoder.channels])
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
