"""After the training of densities: counts add up to those measured, and scatter is that of regions held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.train.conftest import Colours

from pixnet_sd.engine import MeasuredRegions, TrainingSlide
from pixnet_sd.engine.train import set_dispersion, set_level
from pixnet_sd.geometry import Grid
from pixnet_sd.model import Head, Network, build_operator
from pixnet_sd.model.noise import coverage


@pytest.fixture
def network(make_network) -> Network:
    """Two genes and their sum, whose densities have the pattern of the slide's colours and another level."""
    made = make_network(link="softplus")
    made.head = Head(3, 3, "softplus")
    made.head.bias.data, made.head.weight.data = torch.zeros(3), torch.diag(torch.tensor([0.01, 0.01, 0]))
    made.head.unit.copy_(torch.tensor([0.2, 3.0, 1.5]))
    return made.eval()


def expected(network: Network, slide: TrainingSlide) -> np.ndarray:
    """Expected counts of the regions of the first size, at the slide's depth."""
    (measured, *_), grid = slide.measured, (slide.height // 4, slide.width // 4)
    pixels = torch.from_numpy(slide.read(0, slide.height, 0, slide.width)).permute(2, 0, 1)[None].float()
    maps = torch.nn.functional.avg_pool2d(pixels, 4)
    with torch.no_grad():
        return (network.predict_regions(maps, build_operator(measured.regions, Grid(*grid, 4))) * slide.depth).numpy()


def drawn(network: Network, slide: TrainingSlide, scatter: float, seed: int = 0) -> TrainingSlide:
    """A slide whose counts are drawn around 8 times what the network expects, but for the level of each gene."""
    rng, mean = np.random.default_rng(seed), 8 * expected(network, slide) * [0.5, 0.1, 0.7]
    values = rng.poisson(mean * rng.lognormal(0, scatter, mean.shape)).astype(np.float32)
    values[:, 2] = values[:, :2].sum(axis=1) + 5
    return replace(slide, measured=(MeasuredRegions("counts", slide.measured[0].regions, values),))


def test_counts_add_up_whatever_the_level_was(network, learnable, make_run, fabric) -> None:
    """Also of a slide of another depth, and of regions without counts; an output without any keeps its level."""
    slides = [drawn(network, learnable(160, 192, seed=k), 0.2, k) for k in range(2)]
    slides[0].measured[0].values[::3] = 0  # as of small bins
    slides[1] = replace(slides[1], depth=3.0)
    features = Colours(network, make_run(slides, objective="nb_pcc"), fabric)
    set_level(network, features, slides)
    sums = [np.zeros(3), np.zeros(3)]
    for slide in slides:
        found, (measured,) = expected(network, slide), slide.measured
        total = measured.values[:, 2:]
        at_depth = np.concatenate([found[:, :2] / found[:, 2:] * total, found[:, 2:]], axis=1)
        for k, counts in enumerate((at_depth, measured.values)):
            sums[k] += counts.sum(axis=0) / total.sum() / 2
    np.testing.assert_allclose(sums[0], sums[1], rtol=0.02)  # tiles pool other squares of pixels
    before = network.head.unit.clone()
    none = [replace(s, measured=tuple(replace(m, values=m.values * [0, 1, 1]) for m in s.measured)) for s in slides]
    set_level(network, features, none)
    torch.testing.assert_close(network.head.unit[0], before[0], rtol=1e-4, atol=0)


def test_scatter_is_that_of_held_out_regions(network, learnable, make_run, fabric) -> None:
    """The network took the counts for better known than they are; a size that is not held out keeps what it has."""
    training, unseen = (drawn(network, learnable(320, 320, seed=k), 0.5, k) for k in range(2))
    other = replace(training.measured[0], size_name="others")
    training = replace(training, measured=(*training.measured, other))
    run = make_run([training], [unseen], objective="nb_pcc")
    features = Colours(network, run, fabric)
    set_level(network, features, [training])
    network.log_dispersion = torch.nn.Parameter(torch.full((2, 3), -6.0))

    def covered(slide: TrainingSlide) -> float:
        found, values = expected(network, slide).astype(float), slide.measured[0].values.astype(float)
        mean = found[:, :2] / found[:, 2:] * values[:, 2:]
        return coverage(values[:, :2], mean, network.log_dispersion[0, :2].detach().double().exp().numpy()).mean()

    assert covered(training) < 0.8
    set_dispersion(network, features, [unseen])
    assert covered(unseen) == pytest.approx(0.9, abs=0.03)
    assert covered(training) == pytest.approx(0.9, abs=0.06)
    assert (network.log_dispersion[1] == -6).all()
