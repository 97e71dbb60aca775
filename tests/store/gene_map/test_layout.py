from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import StoreError
from pixnet_sd.store.gene_map import map_layout

layouts = st.builds(
    map_layout,
    st.integers(1, 40_000),
    st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)),
    st.none() | st.sampled_from([2, 32, 256]),
    whole_channels=st.booleans(),
)


@pytest.mark.parametrize(("n_genes", "block_px"), [(1, 512), (64, 512), (250, 256), (1000, 128), (5000, 64)])
def test_blocks_stay_within_64_mib_where_files_are_few(n_genes, block_px):
    layout = map_layout(n_genes, (3250, 3250))
    assert layout.block_px == block_px
    assert map_layout(n_genes, (3250, 3250), whole_channels=True).block_px <= block_px


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_levels_halve_exactly_blocks_fall_on_files_and_files_are_few(layout):
    n_files = 0
    for level in range(layout.n_levels):
        n_genes, height, width = layout.level_shape(level)
        assert (height << level, width << level) == layout.padded
        chunk = layout.level_chunks(level)
        file = layout.level_shards(level) or chunk
        assert file[0] >= n_genes
        assert all(whole % part == 0 for whole, part in zip(file, chunk, strict=True))
        for side, part in zip(layout.padded, file[1:], strict=True):
            assert part << level == min(layout.block_px, side)
        n_files += prod(-(-side // part) for side, part in zip(layout.level_shape(level), file, strict=True))
    assert n_files <= layout.n_files < 20_000
    assert layout.whole_channels or prod(layout.level_chunks(0)) * 4 <= 4 * 2**20


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([2, 16, 64]))
def test_blocks_cover_every_pixel_once(height, width, block_px):
    seen = np.zeros((height, width), dtype=int)
    for row0, row1, col0, col1 in map_layout(1, (height, width), block_px).blocks():
        seen[row0:row1, col0:col1] += 1
    assert (seen == 1).all()


def test_levels_end_near_512():
    assert map_layout(250, (25_000, 9_000)).n_levels == 7
    assert map_layout(250, (100, 80)).n_levels == 2
    assert map_layout(10, (1024, 1024)).nbytes == 10 * 4 * (1024**2 + 512**2)


@pytest.mark.parametrize(("shape", "block_px"), [((0, 5), 32), ((5, 5), 48), ((5, 5), 1)])
def test_refused(shape, block_px):
    with pytest.raises(StoreError):
        map_layout(1, shape, block_px)
