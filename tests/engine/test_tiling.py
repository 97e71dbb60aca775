from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.engine import ALIGN_PX, MARGIN_SHARE, Tile, TrainingTiles, training_tiles
from pixnet_sd.errors import PixNetError
from pixnet_sd.geometry import Circles

SHARE = st.floats(0, 1, exclude_max=True)


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


def tilings(found: TrainingTiles, n_sizes: int) -> list[np.ndarray]:
    """Region indices over all tiles, per size."""
    return [np.concatenate([m[size] for m in every(found)]) for size in range(n_sizes)]


def every(found: TrainingTiles) -> list[tuple[np.ndarray, ...]]:
    """Members of all tiles."""
    return [found.members(t) for t in range(len(found.tiles))]


@settings(max_examples=100, deadline=None)
@given(
    fine=circles_of_a_slide(),
    coarse=circles_of_a_slide(),
    tile_px=st.integers(4, 9).map(lambda k: ALIGN_PX * k),
    shift=st.tuples(SHARE, SHARE),
    once=st.booleans(),
)
def test_every_region_lies_in_a_tile_with_its_margin(slide_of, fine, coarse, tile_px, shift, once) -> None:
    slide = slide_of(fine, coarse)
    found = training_tiles(slide, tile_px, shift=shift, once=once)
    for regions, counted in zip((fine, coarse), tilings(found, 2), strict=True):
        assert set(counted) == set(range(len(regions)))
        if once:
            assert len(counted) == len(regions)
    for tile, members in zip(found.tiles, every(found), strict=True):
        assert any(len(index) for index in members)
        for regions, index in zip((fine, coarse), members, strict=True):
            inside = holds(tile, regions.bounds, tile_px // MARGIN_SHARE)
            assert inside[index].all()
            assert once or inside.sum() == len(index)


@settings(max_examples=100, deadline=None)
@given(circles=circles_of_a_slide(), tile_px=st.sampled_from([128, 192, 256]), shift=st.tuples(SHARE, SHARE))
def test_sides_are_aligned_and_equal(slide_of, circles, tile_px, shift) -> None:
    tiles = training_tiles(slide_of(circles), tile_px, shift=shift).tiles
    assert {t[2:] for t in tiles} == {tiles[0][2:]}
    for side in tiles[0][2:]:
        assert side % ALIGN_PX == 0
        assert 0 < side <= tile_px


@given(
    extent=st.floats(92, 128), place=st.floats(0, 40), shift=st.tuples(SHARE, SHARE), far=st.sampled_from([0, 40, 900])
)
def test_regions_nearly_as_large_as_a_tile_are_held_or_refused(slide_of, extent, place, shift, far) -> None:
    """The largest region leaves tiles little room to overlap: none may fall between two of them."""
    margin = 128 // MARGIN_SHARE
    radius = extent / 2 - margin
    circles = Circles([[place, 0.5], [place + far, 0.5 + far / 3]], [radius, radius])
    try:
        found = training_tiles(slide_of(circles), 128, shift=shift)
    except PixNetError:
        assert extent > 128 - ALIGN_PX
    else:
        assert set(tilings(found, 1)[0]) == {0, 1}


@given(shift=st.tuples(SHARE, SHARE), low=st.floats(-50, 50), radius=st.floats(1, 20))
def test_one_tile_no_larger_than_needed(slide_of, shift, low, radius) -> None:
    circles = Circles([[low, low], [low + 60, low + 10]], [radius, radius])
    (tile,) = training_tiles(slide_of(circles), 512, shift=shift).tiles
    margin = 512 // MARGIN_SHARE
    assert tile.width <= 60 + 2 * radius + 2 * margin + 2 * ALIGN_PX
    assert tile.height <= 10 + 2 * radius + 2 * margin + 2 * ALIGN_PX


def test_regions_partly_off_the_slide_are_covered(slide_of) -> None:
    circles = Circles([[-3, 2], [395, 301]], [10, 10])
    found = training_tiles(slide_of(circles, height=300, width=400), 128)
    assert set(tilings(found, 1)[0]) == {0, 1}
    assert min(t.col0 for t in found.tiles) <= -13 - 8
    assert max(t.row0 + t.height for t in found.tiles) >= 311 + 8


def test_tiles_without_regions_are_left_out(slide_of) -> None:
    circles = Circles([[50, 50], [5000, 5000]], [5, 5])
    assert len(training_tiles(slide_of(circles), 128).tiles) == 2


def test_shift_moves_tiles(slide_of) -> None:
    circles = Circles(np.mgrid[0:600:20, 0:600:20].reshape(2, -1).T, 5.0)
    here, there = (training_tiles(slide_of(circles), 128, shift=s).tiles for s in ((0, 0), (0.5, 0.25)))
    assert here[0].row0 - there[0].row0 > here[0].col0 - there[0].col0 > 0


def test_too_large_regions_are_refused_with_a_size_that_works(slide_of) -> None:
    circles = Circles([[200, 200], [900, 900]], [100, 3])
    with pytest.raises(PixNetError, match=r"'slide'.*tile_px=(\d+)") as refused:
        training_tiles(slide_of(circles), 128)
    advised = int(str(refused.value).split("tile_px=")[1].split()[0])
    assert set(tilings(training_tiles(slide_of(circles), advised), 1)[0]) == {0, 1}
