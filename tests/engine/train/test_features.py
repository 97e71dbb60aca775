"""Feature maps: turned back, kept for a frozen encoder, and on the scale that calibration measures."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from pixnet_sd.engine import Tile, TrainingSlide, apply_symmetry, training_tiles, undo_symmetry
from pixnet_sd.engine.train import BatchPlan, FeatureMaps, PyramidCache, calibrate, make_batch
from pixnet_sd.geometry import MAP_STRIDE, STRIDES
from pixnet_sd.model import Encoder, Network

TILE = Tile(-16, 8, 64, 96)


@pytest.fixture
def slide(learnable) -> TrainingSlide:
    return learnable(96, 15)


@pytest.fixture
def encoder(make_network) -> Encoder:
    return make_network(frozen=True).encoder


@pytest.fixture
def cache(encoder, tmp_path: Path) -> PyramidCache:
    return PyramidCache(encoder, tmp_path / "features", 0.05, seed=3)


def pixels(slide: TrainingSlide, tile: Tile = TILE) -> torch.Tensor:
    row0, col0, height, width = tile
    return torch.from_numpy(slide.read(row0, row0 + height, col0, col0 + width)).permute(2, 0, 1)[None].float()


def make(cache: PyramidCache, slide: TrainingSlide, k: int = 0) -> list[torch.Tensor]:
    return cache.make(slide, TILE, k, pixels(slide))


def test_slides_tiles_and_symmetries_are_kept_apart(cache, learnable, slide) -> None:
    make(cache, slide)
    other = learnable(96, 15, seed=1, name="other")
    for each in [(other, TILE, 0), (slide, Tile(0, 8, 64, 96), 0), (slide, TILE, 2)]:
        assert cache.read(*each) is None


def test_turned_copies_are_jittered_by_the_seed(cache, encoder, slide, tmp_path: Path) -> None:
    plain, turned = (encoder(apply_symmetry(pixels(slide), k))[0] for k in (0, 2))
    torch.testing.assert_close(make(cache, slide)[0].float(), plain, rtol=2**-10, atol=1e-6)
    jittered = make(cache, slide, k=2)[0]
    assert 1e-3 < (jittered - turned).abs().mean() / turned.std() < 0.5
    caches = [PyramidCache(encoder, tmp_path / str(seed), 0.05, seed=seed) for seed in (3, 4)]
    again, other = (make(each, slide, k=2)[0] for each in caches)
    assert torch.equal(again, jittered)
    assert not torch.equal(other, jittered)


@pytest.mark.parametrize("failure", ["no room", "quota"])
def test_a_full_disk_is_said_once_and_what_is_kept_is_used(cache, slide, monkeypatch, caplog, failure: str) -> None:
    kept = make(cache, slide)
    if failure == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    once, again = make(cache, slide, k=1), make(cache, slide, k=1)
    assert torch.equal(once[0], again[0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert cache.read(slide, TILE, 1) is None
    assert torch.equal(cache.read(slide, TILE, 0)[0], kept[0])
    cache.clear()
    assert not cache.directory.exists()


def test_a_damaged_file_is_made_anew(cache, slide) -> None:
    kept = make(cache, slide)
    (path,) = cache.directory.iterdir()
    mine = cache.directory.parent / "mine"
    mine.write_bytes(path.read_bytes()[:100])
    path.unlink()
    path.symlink_to(mine)
    assert cache.read(slide, TILE, 0) is None
    assert torch.equal(make(cache, slide)[0], kept[0])
    assert torch.equal(cache.read(slide, TILE, 0)[0], kept[0])
    assert not path.is_symlink()
    assert len(mine.read_bytes()) == 100
    assert [p.name for p in cache.directory.parent.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def features(make_run, fabric) -> Callable[..., FeatureMaps]:
    return lambda network, **options: FeatureMaps(network, make_run(**({"stain_jitter": 0.0} | options)), fabric)


@pytest.mark.parametrize(("frozen", "k"), [(False, 0), (False, 3), (True, 5), (True, 6)])
def test_maps_are_turned_back(make_network, features, slide, frozen: bool, k: int) -> None:
    """Whether pixels are encoded, or pyramids made or read: undo(network(apply(image))); what is kept is read ahead."""
    network, tiling = make_network(frozen=frozen).eval(), training_tiles(slide, 96)
    assert tiling.tiles[0].height != tiling.tiles[0].width
    maps = features(network)
    plan = BatchPlan(tiling, tuple(range(len(tiling.tiles))), k)
    image = make_batch(plan).image.float()
    with torch.no_grad():
        expected = undo_symmetry(network(apply_symmetry(image, k)), k)
        (first,) = maps.batches([plan])
        found = maps.of(first)
        slide.read.calls.clear()
        (second,) = maps.batches([plan])
        maps.cache.clear()
        assert torch.equal(maps.of(second), found)
    assert (not slide.read.calls) == (second.image is None) == frozen
    assert found.shape[-2:] == (image.shape[-2] // MAP_STRIDE, image.shape[-1] // MAP_STRIDE)
    torch.testing.assert_close(found, expected, rtol=0, atol=(2e-3 if frozen else 1e-5) * float(expected.std()))


def test_only_batches_of_the_usual_size_are_compiled(make_network, features, slide, monkeypatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(
        torch, "compile", lambda network, dynamic: lambda image: compiled.append(len(image)) or network(image)
    )
    network, tiling = make_network().eval(), training_tiles(slide, 96)
    n_tiles = len(tiling.tiles)
    for batch_size in (n_tiles, n_tiles + 1):
        features(network, compile=True, batch_size=batch_size).of(make_batch(BatchPlan(tiling, tuple(range(n_tiles)))))
    assert compiled == [n_tiles]


def test_stain_is_jittered_in_training_only(make_network, features, slide) -> None:
    network = make_network()
    maps, batch = features(network, stain_jitter=0.3), make_batch(BatchPlan(training_tiles(slide, 96), (0,)))
    for stage in network.encoder.body.stages:  # batch statistics would differ between the modes as well
        stage[1].momentum, stage[1].track_running_stats = 0.0, False
    with torch.no_grad():
        network.eval()
        assert torch.equal(maps.of(batch), maps.of(batch))
        network.train()
        assert not torch.allclose(maps.of(batch), maps.of(batch))


def literal(network: Network, slides, tilings) -> list[torch.Tensor]:
    """Mean features of every region in every tile, by upsampling each level and averaging over the region's pixels."""
    pooled: list[list[torch.Tensor]] = [[] for _ in STRIDES]
    for slide, tiling in zip(slides, tilings, strict=True):
        for tile in tiling.tiles:
            row0, col0, height, width = tile
            y, x = np.mgrid[row0 : row0 + height, col0 : col0 + width] + 0.5
            on_slide = (x > 0) & (y > 0) & (x < slide.width) & (y < slide.height)
            for level, maps in enumerate(network.encoder(pixels(slide, tile))):
                full = functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0]
                for measured, index in zip(slide.measured, tiling.members(tile), strict=True):
                    circles = measured.regions.subset(index)
                    for (cx, cy), r in zip(circles.centre_xy, circles.radius, strict=True):
                        pooled[level].append(full[:, on_slide & ((x - cx) ** 2 + (y - cy) ** 2 <= r**2)].mean(1))
    return [torch.stack(level) for level in pooled]


def test_laterals_get_the_scale_between_regions(make_network, features, learnable) -> None:
    network = make_network(frozen=True)
    slides = [learnable(96, 100, radii=(5.0, 10.0)), learnable(64, 64, seed=1, name="other")]
    tilings = [training_tiles(s, 64) for s in slides]
    calibrate(network, features(network), tilings, 4)
    with torch.no_grad():
        expected = literal(network, slides, tilings)
    for lateral, values in zip(network.decoder.laterals, expected, strict=True):
        torch.testing.assert_close(lateral.mean, values.mean(0), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(1 / lateral.scale, values.std(0) + 1e-3, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_calibration_leaves_the_encoder_as_it_is(make_network, features, learnable, frozen):
    """What is kept is read by the training."""
    network = make_network(frozen=frozen)
    before, maps = copy.deepcopy(network.encoder.state_dict()), features(network)
    calibrate(network, maps, [training_tiles(learnable(96, 100), 64)], 100)
    assert all(torch.equal(value, before[name]) for name, value in network.encoder.state_dict().items())
    assert maps.cache.directory.exists() == frozen
    assert not torch.allclose(network.decoder.laterals[0].scale, torch.ones(1))
