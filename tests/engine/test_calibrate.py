from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from pixnet_sd.engine import training_tiles
from pixnet_sd.engine.train import TrainSettings
from pixnet_sd.engine.train._features import FeatureMaps, calibrate
from pixnet_sd.geometry import STRIDES

SETTINGS = TrainSettings(tile_px=64, batch_size=4)


def literal(network, slides, tiles) -> list[torch.Tensor]:
    """Mean features of every region in every tile, by upsampling each level and averaging over the region's pixels."""
    pooled: list[list[torch.Tensor]] = [[] for _ in STRIDES]
    for slide, found in zip(slides, tiles, strict=True):
        for t, (row0, col0, height, width) in enumerate(found.tiles):
            pixels = slide.read(row0, row0 + height, col0, col0 + width)
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
            y, x = np.mgrid[row0 : row0 + height, col0 : col0 + width] + 0.5
            on_slide = (x > 0) & (y > 0) & (x < slide.width) & (y < slide.height)
            for level, maps in enumerate(network.encoder(image)):
                full = functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0]
                for measured, index in zip(slide.measured, found.members(t), strict=True):
                    for (cx, cy), r in zip(
                        measured.regions.centre_xy[index], measured.regions.radius[index], strict=True
                    ):
                        pooled[level].append(full[:, on_slide & ((x - cx) ** 2 + (y - cy) ** 2 <= r**2)].mean(1))
    return [torch.stack(level) for level in pooled]


def test_laterals_get_the_scale_between_regions(make_network, fabric, learnable, tmp_path: Path) -> None:
    network = make_network(frozen=True)
    slides = [learnable(96, 100, radii=(5.0, 10.0)), learnable(64, 64, seed=1, name="other")]
    tiles = [training_tiles(s, 64) for s in slides]
    calibrate(network, FeatureMaps(network, fabric, SETTINGS, tmp_path), slides, tiles, SETTINGS)
    with torch.no_grad():
        expected = literal(network, slides, tiles)
    for lateral, values in zip(network.decoder.laterals, expected, strict=True):
        torch.testing.assert_close(lateral.mean, values.mean(0), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(1 / lateral.scale, values.std(0) + 1e-3, rtol=1e-2, atol=1e-3)


def test_a_network_without_laterals_stays(make_network, fabric, slide_of, tmp_path: Path) -> None:
    network = make_network(frozen=True, laterals=False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    calibrate(network, FeatureMaps(network, fabric, SETTINGS, tmp_path), [slide_of()], [], SETTINGS)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True])
def test_measured_once_whatever_is_drawn(make_network, fabric, learnable, tmp_path: Path, frozen: bool) -> None:
    """With few tiles all are used: another seed gives the same constants."""
    slide = learnable(96, 100)
    scales = []
    for seed in (0, 1):
        network = make_network(frozen=frozen)
        torch.manual_seed(seed)
        maps = FeatureMaps(network, fabric, SETTINGS, tmp_path / str(seed))
        calibrate(network, maps, [slide], [training_tiles(slide, 64)], SETTINGS)
        scales.append(network.decoder.laterals[0].scale)
    torch.testing.assert_close(*scales, rtol=1e-4, atol=0)
    assert not torch.allclose(scales[0], torch.ones(1))
