from __future__ import annotations

import numpy as np
import pytest
import torch

from pixnet_sd.engine import N_SYMMETRIES, apply_symmetry, jitter_stain, undo_symmetry
from pixnet_sd.geometry import Grid, Polygons
from pixnet_sd.model import build_operator

EVERY = range(N_SYMMETRIES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", EVERY)
def test_undo_inverts_apply(k: int) -> None:
    x = torch.rand(2, 3, 4, 6)
    assert torch.equal(undo_symmetry(apply_symmetry(x, k), k), x)
    assert torch.equal(apply_symmetry(undo_symmetry(x, k), k), x)


def test_the_eight_differ() -> None:
    x = torch.arange(16.0).reshape(4, 4)
    assert len({tuple(apply_symmetry(x, k).flatten().tolist()) for k in EVERY}) == N_SYMMETRIES


def moved(regions: Polygons, k: int, height: int, width: int) -> Polygons:
    """Regions where `apply_symmetry` puts their pixels."""
    matrix = np.eye(3)
    for _ in range(k % 4):  # one turn takes (x, y) to (y, width - x)
        matrix = np.array([[0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix
        height, width = width, height
    if k >= 4:
        matrix = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
    return regions.transform(matrix)


@pytest.mark.parametrize("k", EVERY)
def test_turning_the_map_back_equals_moving_the_regions(k: int) -> None:
    height, width, stride = 5, 8, 4
    rng = np.random.default_rng(1)
    corners = rng.uniform(0.05, 0.95, (6, 3, 2)) * [width * stride, height * stride]  # six triangles
    regions = Polygons(corners.reshape(-1, 2), np.arange(0, 19, 3), np.arange(6), 6)
    turned = apply_symmetry(torch.rand(2, height, width), k)  # what a network makes of a turned tile

    back = build_operator(regions, Grid(height, width, stride))
    there = build_operator(moved(regions, k, height * stride, width * stride), Grid(*turned.shape[-2:], stride))
    undone = back.apply(undo_symmetry(turned, k).flatten(1).T)
    assert back.n_px.sum() > 200
    np.testing.assert_array_equal(back.n_px, there.n_px)
    torch.testing.assert_close(undone, there.apply(turned.flatten(1).T), rtol=1e-5, atol=1e-4)


def test_jitter_keeps_the_range_and_white_nearly_white() -> None:
    image = torch.rand(16, 3, 4, 4).mul(255)
    image[:, :, 0] = 255
    changed = jitter_stain(image, 0.5, generator())
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert (changed[:, :, 1:] - image[:, :, 1:]).abs().mean() > 5
    assert (jitter_stain(image, 0.05, generator())[:, :, 0] > 245).all()


def test_jitter_changes_each_tile_and_channel_by_itself() -> None:
    image = torch.full((2, 3, 2, 2), 100.0)
    changed = jitter_stain(image, 0.1, generator())
    assert len(changed[:, :, 0, 0].unique()) == 6
    assert torch.equal(changed, changed[:, :, :1, :1].expand_as(changed))


def test_jitter_of_no_strength_is_nothing() -> None:
    image = torch.rand(2, 3, 4, 4).mul(255)
    assert torch.equal(jitter_stain(image, 0.0, generator()), image)
    torch.testing.assert_close(jitter_stain(image, 1e-9, generator()), image, rtol=0, atol=1e-3)


def test_jitter_is_the_generators() -> None:
    image = torch.rand(2, 3, 4, 4).mul(255)
    once, again, other = (jitter_stain(image, 0.1, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
