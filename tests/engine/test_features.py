from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixnet_sd.engine import N_SYMMETRIES, TrainingSlide, TrainingTiles, apply_symmetry, training_tiles, undo_symmetry
from pixnet_sd.engine.train import TrainSettings
from pixnet_sd.engine.train._batches import BatchPlan, make_batch
from pixnet_sd.engine.train._features import FeatureMaps
from pixnet_sd.geometry import MAP_STRIDE


@pytest.fixture(scope="module")
def slide(learnable) -> TrainingSlide:
    return learnable(96, 15)


@pytest.fixture(scope="module")
def tiles(slide) -> TrainingTiles:
    found = training_tiles(slide, 96)
    assert found.tiles[0].height != found.tiles[0].width
    return found


def batch_of(slide, tiles, *, k: int, with_image: bool):
    return make_batch(slide, tiles, BatchPlan(0, tuple(range(len(tiles.tiles))), k), MAP_STRIDE, with_image=with_image)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("k", range(N_SYMMETRIES))
def test_maps_are_turned_back(make_network, fabric, slide, tiles, tmp_path: Path, frozen: bool, k: int) -> None:
    """Whether pixels are encoded now or pyramids were stored: undo(network(apply(image)))."""
    network = make_network(frozen=frozen).eval()
    features = FeatureMaps(network, fabric, TrainSettings(stain_jitter=0.0), tmp_path)
    assert features.stored == frozen
    image = batch_of(slide, tiles, k=0, with_image=True).image.float()
    with torch.no_grad():
        expected = undo_symmetry(network(apply_symmetry(image, k)), k)
        found = features.of(batch_of(slide, tiles, k=k, with_image=not frozen), slide, tiles)
    assert found.shape[-2:] == (image.shape[-2] // MAP_STRIDE, image.shape[-1] // MAP_STRIDE)
    torch.testing.assert_close(found, expected, rtol=0, atol=(2e-3 if frozen else 1e-5) * float(expected.std()))


def test_only_batches_of_the_usual_size_are_compiled(
    make_network, fabric, slide, tiles, tmp_path: Path, monkeypatch
) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(
        torch, "compile", lambda network, dynamic: lambda image: compiled.append(len(image)) or network(image)
    )
    network, n_tiles = make_network().eval(), len(tiles.tiles)
    for batch_size in (n_tiles, n_tiles + 1):
        settings = TrainSettings(compile=True, batch_size=batch_size)
        features = FeatureMaps(network, fabric, settings, tmp_path)
        features.of(batch_of(slide, tiles, k=0, with_image=True), slide, tiles)
    assert compiled == [n_tiles]


def test_stain_is_jittered_in_training_only(make_network, fabric, slide, tiles, tmp_path: Path) -> None:
    network = make_network()
    features = FeatureMaps(network, fabric, TrainSettings(stain_jitter=0.3), tmp_path)
    batch = batch_of(slide, tiles, k=0, with_image=True)
    for stage in network.encoder.body.stages:  # batch statistics would differ between the modes as well
        stage[1].momentum, stage[1].track_running_stats = 0.0, False

    def mean() -> torch.Tensor:
        with torch.no_grad():
            return features.of(batch, slide, tiles)

    network.eval()
    assert torch.equal(mean(), mean())
    network.train()
    assert not torch.allclose(mean(), mean())


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_what_is_trained(make_network, fabric, slide, tiles, tmp_path: Path, frozen: bool) -> None:
    network = make_network(frozen=frozen).train()
    features = FeatureMaps(network, fabric, TrainSettings(), tmp_path)
    features.of(batch_of(slide, tiles, k=3, with_image=not frozen), slide, tiles).square().mean().backward()
    assert all(p.grad is not None for p in network.decoder.parameters())
    assert all((p.grad is None) == frozen for p in network.encoder.parameters())
