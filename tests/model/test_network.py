"""Decoder and predictions equal Eq. 3-5 carried out to the letter, gradients too; tiles need a halo and no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.geometry.strategies import grid_and_regions
from tests.model.literal import aggregates
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd.geometry import MAP_STRIDE, STRIDES, Circles, Grid, Regions
from pixnet_sd.model import (
    Decoder,
    DecoderConfig,
    Head,
    Network,
    TiledOperator,
    build_encoder,
    build_operator,
    receptive_radius_px,
    sees_whole_tile,
)
from pixnet_sd.params import Aggregation

CHANNELS, GENES = 4, 3
CONFIG = DecoderConfig(widths=(CHANNELS, 4, 6, 6), hidden=(4, 4, 4), dropout=0.1)
GRID = Grid(5, 6, 4)


def make(aggregation: Aggregation = "mean", config=CONFIG, encoder="test_resnet", link="identity") -> Network:
    torch.manual_seed(0)
    network = Network(build_encoder(encoder, None), config, GENES, aggregation, link)
    nn.init.normal_(network.head.bias)
    if link == "softplus":
        network.head.unit.copy_(torch.tensor([0.2, 1.0, 3.0]))
    return network


NETWORKS = {"mean": make("mean"), "sum": make("sum"), "densities": make("sum", link="softplus")}


def feature_map(grid: Grid, seed: int = 0) -> Tensor:
    return torch.randn(1, CHANNELS, grid.height, grid.width, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5 * scale)


# Regions and maps


@pytest.mark.parametrize("name", NETWORKS)
@settings(deadline=None, max_examples=40)
@given(example=grid_and_regions())
def test_regions_and_gradients_are_the_literal_ones(name: str, example: tuple[Grid, Regions]) -> None:
    """Head at every low-resolution pixel, resize, sum in masks, in float64; over the pixels for a mean."""
    network, (grid, regions) = NETWORKS[name], example
    operator = build_operator(regions, grid)
    seen = np.nonzero(operator.n_px > 0)[0]  # a mean over nothing is nothing to compare with
    features = feature_map(grid).requires_grad_()
    low = network.gene_map(features)[0].double()
    total, n_px = aggregates(regions, low, grid.stride)
    slow = (total / torch.from_numpy(n_px)[:, None] if name == "mean" else total)[seen]
    fast = network.predict_regions(features, operator)[seen]
    assert_close(fast, slow)
    assert name != "densities" or (fast >= 0).all()
    weights = (torch.arange(len(seen) * GENES).reshape(-1, GENES) % 7 - 3.0) / 3
    inputs = [features, network.head.weight, network.head.bias]
    gradients = [torch.autograd.grad((values * weights).sum(), inputs, retain_graph=True) for values in (fast, slow)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_batches_have_their_columns_one_after_the_other() -> None:
    network, maps = NETWORKS["mean"], [feature_map(GRID, seed) for seed in (0, 1)]
    tiles = [build_operator(Circles(centre, 5.0), GRID) for centre in ([[9.0, 9.0], [3.0, 3.0]], [[15.0, 12.0]])]
    expected = torch.cat([network.predict_regions(d, tile) for d, tile in zip(maps, tiles, strict=True)])
    torch.testing.assert_close(network.predict_regions(torch.cat(maps), TiledOperator(tiles)), expected)


def test_off_the_slide() -> None:
    """Nothing to sum; the bias, which is the training mean at first, as a mean. Not NaN, which would spoil a batch."""
    operator = build_operator(Circles([[-50.0, 0.0]], 5.0), GRID)
    for name, expected in (("sum", torch.zeros(1, GENES)), ("mean", NETWORKS["mean"].head.bias[None])):
        torch.testing.assert_close(NETWORKS[name].predict_regions(feature_map(GRID), operator), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_stay_float32_under_autocast(name: str) -> None:
    operator, features = build_operator(Circles([[9.0, 9.0]], 5.0), GRID), feature_map(GRID)
    with torch.autocast("cpu", torch.bfloat16):
        result = NETWORKS[name].predict_regions(features, operator), NETWORKS[name].gene_map(features)
    assert torch.equal(result[0], NETWORKS[name].predict_regions(features, operator))
    assert torch.equal(result[1], NETWORKS[name].gene_map(features))


@pytest.mark.parametrize(("aggregation", "share"), [("mean", 1.0), ("sum", 52 / 40)])
def test_start_is_at_the_training_mean_whatever_the_tissue(aggregation: Aggregation, share: float) -> None:
    """A sum over 52 px, where 40 px are typical, starts that much above the mean."""
    network, mean = make(aggregation), torch.tensor([0.5, 2.0, 7.0])
    network.start_from(mean, 40.0)
    operator = build_operator(Circles([[20.0, 20.0]], 4.0), Grid(10, 10, 4))
    assert operator.n_px == pytest.approx(52)
    with torch.no_grad():
        torch.testing.assert_close(network.predict_regions(torch.zeros(1, 4, 10, 10), operator)[0], mean * share)
        predicted = network.predict_regions(feature_map(Grid(10, 10, 4)), operator)[0]
    assert 0 < (predicted - mean * share).abs().max() < 0.5


# The head


D = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("link", ["identity", "softplus"])
def test_all_ways_give_the_literal_values(link: str) -> None:
    """D W + b; or densities, those of genes being shares of the last output's."""
    torch.manual_seed(0)
    head = Head(4, 6, link)
    expected = (D @ head.weight.T + head.bias).detach()
    if link == "softplus":
        head.unit.copy_(torch.rand(6) + 0.1)
        relative = functional.softplus(expected + np.log(np.e - 1))  # 1 at 0
        expected = relative * head.unit * torch.cat([relative[:, -1:].expand(-1, 5), torch.ones(9, 1)], dim=1)
    torch.testing.assert_close(head(D).detach(), expected)
    torch.testing.assert_close(head(D, slice(2, 5)), expected[:, 2:5])
    with torch.no_grad():
        for out in (None, torch.empty(6, 9)):
            torch.testing.assert_close(head.columns(D.T, out), expected.T)
    chosen = head.select(torch.tensor([5, 0]))
    torch.testing.assert_close(chosen(D), expected[:, [5, 0]])
    torch.testing.assert_close(chosen.select([1])(D), expected[:, [0]])
    assert not any(p.requires_grad for p in chosen.parameters())
    assert chosen.is_linear == head.is_linear == (link == "identity")


def test_genes_do_not_teach_the_total() -> None:
    """In their shares it is the weight of a pixel, and would become whatever makes genes fit."""
    head = Head(4, 6, "softplus")
    head(D)[:, :-1].sum().backward()
    assert not head.weight.grad[-1].any()
    assert head.weight.grad[:-1].any(dim=1).all()


# The decoder


PYRAMID = (3, 5, 7, 9)


def pyramid(channels: Sequence[int] = PYRAMID) -> list[Tensor]:
    """F_1..F_4 of two images."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, 16 >> k, 32 >> k, generator=generator) for k, c in enumerate(channels)]


def eq_3(decoder: Decoder, levels: Sequence[Tensor]) -> Tensor:
    """D_0 = F_L; D_l = DFFN(Dconv(D_{l-1}) + δ_l F_{L-l}), from the weights alone. Stages are stored finest first."""
    state, d = decoder.state_dict(), levels[-1]

    def of(layer: str) -> tuple[Tensor, Tensor]:
        return state[f"{layer}.weight"], state[f"{layer}.bias"]

    for k in reversed(range(len(levels) - 1)):
        d = functional.conv_transpose2d(d, *of(f"upsample.{k}"), stride=2) + state["skip_scale"][k] * levels[k]
        hidden = functional.gelu(functional.conv2d(d, *of(f"feed_forward.{k}.0"), padding=1))
        d = functional.conv2d(hidden, *of(f"feed_forward.{k}.2"))
    return d


def shaken(module: nn.Module) -> nn.Module:
    """A module with no zero biases and no equal scales."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module


@pytest.mark.parametrize("widths", [None, (4, 4, 6, 6)])
def test_decoder_is_eq_3_and_drops_only_in_training(widths: tuple[int, ...] | None) -> None:
    decoder = shaken(Decoder(PYRAMID, widths, hidden=(4, 6, 8), dropout=0.5)).eval()
    levels = [lateral(level) for lateral, level in zip(decoder.laterals, pyramid(), strict=True)]
    assert [level.shape[1] for level in levels] == list(widths or PYRAMID)
    assert decoder(pyramid()).shape == (2, levels[0].shape[1], 16, 32)
    torch.testing.assert_close(decoder(pyramid()), eq_3(decoder, levels))
    with pytest.raises((RuntimeError, ValueError)):  # a level too few
        decoder(pyramid()[1:])
    assert torch.equal(decoder.train()(pyramid()), decoder(pyramid())) == (widths is None)


def test_decoder_starts_with_the_size_of_signals_and_without_a_grid() -> None:
    """A grid that the network starts with stays: no region of training is as small as its period."""
    torch.manual_seed(0)
    decoder = Decoder((64, 64, 64, 64), None, hidden=(64, 64, 64)).eval()
    with torch.no_grad():
        assert 0.3 < decoder(pyramid((64, 64, 64, 64))).std() < 3
        flat = [torch.randn(1, 64, 1, 1).expand(-1, -1, 32 >> k, 32 >> k) for k in range(4)]
        inner = decoder(flat)[..., 12:20, 12:20]  # beyond the reach of the border's zeros
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), rtol=0, atol=1e-4)


def calibrated_lateral(dropout: float) -> nn.Module:
    """The lateral of a level with five channels."""
    lateral = shaken(Decoder(PYRAMID, (4, 4, 4, 4), (4, 4, 4), dropout)).laterals[1]
    lateral.mean.copy_(torch.tensor([1.0, -2, 0, 50, 0.3]))
    lateral.scale.copy_(1 / torch.tensor([1.0, 0.5, 3, 20, 0.01]))
    return lateral


def three_steps(lateral: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """Standardise, drop channels, project."""
    standard = (x - lateral.mean[:, None, None]) * (lateral.scale * keep)[:, None, None]
    return functional.conv2d(standard, lateral.project.weight, lateral.project.bias)


def test_lateral_and_its_gradients_are_those_of_the_three_steps() -> None:
    lateral, generator = calibrated_lateral(0.0), torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(1, c, 3, 3, generator=generator) for c in (5, 4))
    inputs = [x.requires_grad_(), *lateral.parameters()]
    results = lateral(x), three_steps(lateral, x, torch.ones(5))
    gradients = [torch.autograd.grad((result * upstream).sum(), inputs) for result in results]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_lateral_drops_whole_channels_in_training() -> None:
    """Every output is that of one of the 32 choices of channels, what is kept being doubled; all of them come up."""
    lateral, x = calibrated_lateral(0.5), torch.randn(1, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    choices = [torch.tensor([float(n >> k & 1) for k in range(5)]) for n in range(32)]
    with torch.no_grad():
        expected = torch.stack([three_steps(lateral, x, 2 * keep) for keep in choices])
        torch.manual_seed(0)
        off = torch.stack([(expected - lateral(x)).abs().amax((1, 2, 3, 4)) for _ in range(640)])
    assert off.amin(1).max() < 1e-3
    assert off.argmin(1).unique().numel() == 32


def test_calibrate_standardises_each_level_and_its_constants_are_saved() -> None:
    network, generator = make(), torch.Generator().manual_seed(0)
    assert network.has_laterals
    samples = [torch.randn(200, c, generator=generator) * 7 + 3 for c in network.encoder.channels]
    network.calibrate(samples)
    other = make()
    other.load_state_dict(network.state_dict())
    for lateral, values in zip(other.decoder.laterals, samples, strict=True):
        standard = (values - lateral.mean) * lateral.scale
        torch.testing.assert_close(standard.mean(0), torch.zeros(values.shape[1]), rtol=0, atol=1e-4)
        torch.testing.assert_close(standard.std(0, correction=0), torch.ones(values.shape[1]), rtol=0, atol=1e-3)
    network.calibrate([values[:1] for values in samples])  # a single region
    assert all(torch.isfinite(lateral.scale).all() for lateral in network.decoder.laterals)
    papers = make(config=DecoderConfig(widths=None, hidden=(4, 4, 4)))  # has nothing to calibrate
    papers.calibrate(samples)
    assert not papers.has_laterals
    assert papers.head.in_features == papers.encoder.channels[0]


# How far it sees


ALIGN = STRIDES[-1]  # halos and tiles are cut at multiples of it


def image(width: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 2 * ALIGN, width, generator=torch.Generator().manual_seed(seed)) * 255


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext"])
def test_nothing_beyond_the_radius_matters(encoder: str) -> None:
    network = make(encoder=encoder).eval()
    radius = receptive_radius_px(network)
    assert radius % ALIGN == 0
    one, other = image(2 * radius + 3 * ALIGN, seed=0), image(2 * radius + 3 * ALIGN, seed=1)
    beyond, within = one.clone(), one.clone()
    for ends in (slice(None, ALIGN), slice(-ALIGN, None)):
        beyond[..., ends] = other[..., ends]
    for ends in (slice(None, radius + ALIGN), slice(radius + 2 * ALIGN, None)):
        within[..., ends] = other[..., ends]
    block = slice((radius + ALIGN) // MAP_STRIDE, (radius + 2 * ALIGN) // MAP_STRIDE)  # the map in the middle
    with torch.no_grad():
        before = network(one)[..., block]
        torch.testing.assert_close(network(beyond)[..., block], before, rtol=0, atol=1e-6 * float(before.abs().max()))
        # A wider tile, whose border lies elsewhere.
        wider = network(torch.cat([other, one, other], dim=-1))[..., one.shape[-1] // MAP_STRIDE :][..., block]
        torch.testing.assert_close(wider, before, rtol=0, atol=1e-6 * float(before.abs().max()))
        assert not torch.allclose(network(within)[..., block], before, atol=1e-3 * float(before.std()))


def test_radius_is_no_wild_guess_and_leaves_no_trace() -> None:
    """ResNet18's own receptive field has a radius of 217 px; the decoder adds to it."""
    network = make(encoder="resnet18").train()
    radius = receptive_radius_px(network)
    assert 217 <= radius <= 600
    assert receptive_radius_px(make(encoder="resnet10t")) < radius == receptive_radius_px(network)
    assert network.training
    assert not any(layer._forward_hooks for layer in network.modules())


@pytest.mark.parametrize("encoder", ["resnet10t", "test_convnext", "test_vit", "mobilenetv3_small_050"])
def test_attention_and_squeeze_excite_see_the_whole_tile(encoder: str) -> None:
    network = make(encoder=encoder)
    assert sees_whole_tile(network, receptive_radius_px(network)) == (encoder in ("test_vit", "mobilenetv3_small_050"))
    assert network.training
