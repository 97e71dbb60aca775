from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pixnet_sd.engine import N_SYMMETRIES, Tile, TrainingSlide, apply_symmetry
from pixnet_sd.engine.train._features import PyramidCache
from pixnet_sd.geometry import STRIDES
from pixnet_sd.model import Encoder

TILE = Tile(-16, 40, 64, 96)


@pytest.fixture
def slide(learnable) -> TrainingSlide:
    return learnable(96, 160)


@pytest.fixture
def encoder(make_network) -> Encoder:
    return make_network(frozen=True).encoder


@pytest.fixture
def runs(encoder) -> list[int]:
    """One entry a pass through the encoder."""
    seen: list[int] = []
    encoder.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.fixture
def cache(encoder, tmp_path: Path) -> PyramidCache:
    return PyramidCache(encoder, tmp_path / "features", 0.05, seed=3)


def computed(encoder: Encoder, slide: TrainingSlide, k: int) -> list[torch.Tensor]:
    row0, col0, height, width = TILE
    pixels = slide.read(row0, row0 + height, col0, col0 + width)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return encoder(apply_symmetry(image, k))


@pytest.mark.parametrize("k", range(N_SYMMETRIES))
def test_stored_equals_computed(cache, encoder, slide, k: int) -> None:
    cache.stain_jitter = 0.0
    for found in (cache.get(slide, TILE, k), cache.get(slide, TILE, k)):
        for level, expected, stride in zip(found, computed(encoder, slide, k), STRIDES, strict=True):
            assert level.dtype == torch.float32
            shape = (TILE.height // stride, TILE.width // stride)
            assert level.shape[2:] == (shape if k % 2 == 0 else shape[::-1])
            torch.testing.assert_close(level, expected, rtol=2**-10, atol=1e-6)


def test_the_second_time_it_is_read(cache, slide, runs) -> None:
    once, again = cache.get(slide, TILE, 5), cache.get(slide, TILE, 5)
    assert len(runs) == 1
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


def test_another_process_reads_it(cache, encoder, slide, runs) -> None:
    cache.get(slide, TILE, 0)
    PyramidCache(encoder, cache.directory, 0.05, seed=3).get(slide, TILE, 0)
    assert len(runs) == 1


def test_slides_tiles_and_symmetries_are_kept_apart(cache, learnable, runs) -> None:
    here, there = learnable(96, 160), learnable(96, 160, seed=1, name="other")
    wanted = [(here, TILE, 0), (there, TILE, 0), (here, Tile(0, 40, 64, 96), 0), (here, TILE, 2)]
    first = [cache.get(*w)[0] for w in wanted]
    assert len(runs) == 4
    for a, b in zip(first, (cache.get(*w)[0] for w in wanted), strict=True):
        assert torch.equal(a, b)
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_turned_copies_are_jittered_by_the_seed(cache, encoder, slide, tmp_path: Path) -> None:
    plain, turned = (computed(encoder, slide, k) for k in (0, 2))
    torch.testing.assert_close(cache.get(slide, TILE, 0)[0], plain[0], rtol=2**-10, atol=1e-6)
    jittered = cache.get(slide, TILE, 2)[0]
    assert 1e-3 < (jittered - turned[0]).abs().mean() / turned[0].std() < 0.5
    again, other = (PyramidCache(encoder, tmp_path / str(s), 0.05, seed=s).get(slide, TILE, 2)[0] for s in (3, 4))
    assert torch.equal(again, jittered)
    assert not torch.equal(other, jittered)


def full_disk(free: int) -> Callable[..., SimpleNamespace]:
    return lambda path: SimpleNamespace(free=free)


def test_full_disk_computes_each_time_and_says_so_once(cache, slide, runs, monkeypatch, caplog) -> None:
    kept = cache.get(slide, TILE, 0)
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1000))
    once, again = cache.get(slide, TILE, 1), cache.get(slide, TILE, 1)
    assert len(runs) == 3
    assert torch.equal(once[0], again[0])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no disk left" in record.getMessage()
    assert torch.equal(cache.get(slide, TILE, 0)[0], kept[0])  # what is there is still used
    assert len(runs) == 3
    assert len(list(cache.directory.iterdir())) == 1


def test_a_write_that_fails_is_a_full_disk(cache, slide, runs, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixnet_sd.engine.train._features.save_file", fail)
    cache.get(slide, TILE, 0)
    cache.get(slide, TILE, 0)
    assert len(runs) == 2
    assert "no disk left" in caplog.text


def test_clear(cache, slide, runs) -> None:
    cache.clear()  # nothing there yet
    cache.get(slide, TILE, 0)
    assert cache.directory.exists()
    cache.clear()
    assert not cache.directory.exists()
    cache.get(slide, TILE, 0)
    assert len(runs) == 2


def test_a_damaged_file_is_made_anew(cache, slide, runs) -> None:
    kept = cache.get(slide, TILE, 0)
    (path,) = cache.directory.iterdir()
    mine = cache.directory.parent / "mine"
    mine.write_bytes(path.read_bytes()[:100])
    path.unlink()
    path.symlink_to(mine)
    again = cache.get(slide, TILE, 0)
    assert len(runs) == 2
    assert torch.equal(again[0], kept[0])
    assert not path.is_symlink()
    assert len(mine.read_bytes()) == 100
    assert [p.name for p in cache.directory.parent.iterdir() if p.name.startswith(".")] == []
