from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import StoreError
from pixnet_sd.store.gene_map import estimate_bytes
from pixnet_sd.store.gene_map._layout import default_block_px, map_layout

layouts = st.builds(
    map_layout,
    st.integers(1, 3000),
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.none() | st.sampled_from([2, 32, 256]),
)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_levels_halve_exactly_and_blocks_fall_on_chunks(layout):
    for level in range(layout.n_levels):
        _, height, width = layout.level_shape(level)
        assert (height << level, width << level) == layout.padded
        _, rows, cols = layout.level_chunks(level)
        for side, chunk in zip(layout.padded, (rows, cols), strict=True):
            assert chunk << level == min(layout.block_px, side)
    genes, rows, cols = layout.level_chunks(0)
    assert genes * rows * cols * 4 <= 4 * 2**20


@pytest.mark.parametrize("n_channels", [9, 33, 129, 513])
def test_whole_channels_lie_in_one_chunk(n_channels):
    layout = map_layout(n_channels, (3000, 3000), whole_channels=True)
    for level in range(layout.n_levels):
        chunks = layout.level_chunks(level)
        assert chunks == (n_channels, layout.block_px >> level, layout.block_px >> level)
    assert np.prod(layout.level_chunks(0)) * 4 <= 16 * 2**20


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([2, 16, 64]))
def test_blocks_cover_every_pixel_once(height, width, block_px):
    seen = np.zeros((height, width), dtype=int)
    for row0, row1, col0, col1 in map_layout(1, (height, width), block_px).blocks():
        seen[row0:row1, col0:col1] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(("genes", "block_px"), [(1, 512), (64, 512), (250, 256), (300, 128), (20_000, 32)])
def test_blocks_stay_within_64_mib(genes, block_px):
    assert default_block_px(genes) == block_px


def test_levels_end_near_512():
    assert map_layout(250, (25_000, 9_000)).n_levels == 7
    assert map_layout(250, (100, 80)).n_levels == 2


def test_estimate_counts_all_levels():
    assert estimate_bytes(10, 1024, 1024) == 10 * 4 * (1024**2 + 512**2)


@pytest.mark.parametrize(("shape", "block_px"), [((0, 5), 32), ((5, 5), 48), ((5, 5), 1)])
def test_refused(shape, block_px):
    with pytest.raises(StoreError):
        map_layout(1, shape, block_px)
