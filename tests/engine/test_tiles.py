"""Slides, their tiles, and what augments them."""

from __future__ import annotations

import re

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.engine import (
    ALIGN_PX,
    MARGIN_SHARE,
    N_SYMMETRIES,
    Tile,
    TrainingTiles,
    apply_symmetry,
    jitter_stain,
    training_tiles,
    undo_symmetry,
)
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Circles

SHARE = st.floats(0, 1, exclude_max=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_symmetries_are_eight_and_undone() -> None:
    d = torch.rand(2, 5, 8)
    turned = [apply_symmetry(d, k) for k in range(N_SYMMETRIES)]
    assert len({each.numpy().tobytes() for each in turned}) == 8
    assert all(torch.equal(undo_symmetry(each, k), d) for k, each in enumerate(turned))


def test_jitter_keeps_the_range_and_white_nearly_white() -> None:
    image = torch.rand(16, 3, 4, 4).mul(255)
    image[:, :, 0] = 255
    changed = jitter_stain(image, 0.5, generator())
    assert 0 <= changed.min() <= changed.max() <= 255
    assert (changed[:, :, 1:] - image[:, :, 1:]).abs().mean() > 5
    assert (jitter_stain(image, 0.05, generator())[:, :, 0] > 245).all()
    assert torch.equal(jitter_stain(image, 0.0, generator()), image)
    torch.testing.assert_close(jitter_stain(image, 1e-9, generator()), image, rtol=0, atol=1e-3)


def test_jitter_is_one_a_channel_and_follows_the_generator() -> None:
    image = torch.full((2, 3, 2, 2), 100.0)
    once, again, other = (jitter_stain(image, 0.1, generator(seed)) for seed in (3, 3, 4))
    assert len(once[:, :, 0, 0].unique()) == 6
    assert torch.equal(once, once[:, :, :1, :1].expand_as(once))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@st.composite
def circles_of_a_slide(draw: st.DrawFn, most: int = 12) -> Circles:
    n = draw(st.integers(1, most))
    place = st.floats(-60, 700)
    centres = draw(st.lists(st.tuples(place, place), min_size=n, max_size=n))
    radii = draw(st.lists(st.floats(0.25, 40), min_size=n, max_size=n))
    return Circles(np.array(centres), np.array(radii))


def holds(tile: Tile, bounds: np.ndarray, margin: float) -> np.ndarray:
    inside = (bounds[:, 0] - margin >= tile.col0) & (bounds[:, 2] + margin <= tile.col0 + tile.width)
    return inside & (bounds[:, 1] - margin >= tile.row0) & (bounds[:, 3] + margin <= tile.row0 + tile.height)


def covered(tiling: TrainingTiles, size: int = 0) -> list[int]:
    """Region indices over all tiles."""
    return [int(index) for tile in tiling.tiles for index in tiling.members(tile)[size]]


@settings(max_examples=60, deadline=None)
@given(
    fine=circles_of_a_slide(),
    coarse=circles_of_a_slide(),
    tile_px=st.integers(4, 9).map(lambda k: ALIGN_PX * k),
    shift=st.tuples(SHARE, SHARE),
    once=st.booleans(),
)
def test_every_region_lies_in_a_tile_with_its_margin(slide_of, fine, coarse, tile_px, shift, once) -> None:
    tiling = training_tiles(slide_of(fine, coarse), tile_px, shift=shift, once=once)
    for size, regions in enumerate((fine, coarse)):
        counted = covered(tiling, size)
        assert set(counted) == set(range(len(regions)))
        assert not once or len(counted) == len(regions)
    for tile in tiling.tiles:
        members = tiling.members(tile)
        assert any(len(index) for index in members)
        for regions, index in zip((fine, coarse), members, strict=True):
            inside = holds(tile, regions.bounds, tile_px // MARGIN_SHARE)
            assert inside[index].all()
            assert once or inside.sum() == len(index)
    assert {tile[2:] for tile in tiling.tiles} == {tiling.tiles[0][2:]}
    assert all(0 < side <= tile_px and side % ALIGN_PX == 0 for side in tiling.tiles[0][2:])


@settings(max_examples=50)
@given(
    extent=st.floats(92, 128), place=st.floats(0, 40), shift=st.tuples(SHARE, SHARE), far=st.sampled_from([0, 40, 900])
)
def test_regions_nearly_as_large_as_a_tile_are_held_or_refused(slide_of, extent, place, shift, far) -> None:
    """They leave tiles little room to overlap, none may fall between two; the size that is advised works."""
    radius = extent / 2 - 128 // MARGIN_SHARE
    circles = Circles([[place, 0.5], [place + far, 0.5 + far / 3]], [radius, radius])
    try:
        tiling = training_tiles(slide_of(circles), 128, shift=shift)
    except PixNetError as refused:
        assert extent > 128 - ALIGN_PX
        advised = int(re.search(r"tile_px=(\d+)", str(refused))[1])
        tiling = training_tiles(slide_of(circles), advised, shift=shift)
    assert set(covered(tiling)) == {0, 1}


def test_tiles_are_no_larger_and_no_more_than_needed(slide_of) -> None:
    assert len(training_tiles(slide_of(Circles([[-3, 2], [5000, 5000]], [10, 5])), 128).tiles) == 2
    (tile,) = training_tiles(slide_of(Circles([[-7.3, -7.3], [52.7, 2.7]], [9, 9])), 512).tiles
    assert tile[2:] == (128, 192)  # 28 and 78 pixels, 32 on each side, and up to 64 of alignment
