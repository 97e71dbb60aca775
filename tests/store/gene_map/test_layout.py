from __future__ import annotations

from math import prod

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


@pytest.mark.parametrize(
    ("n_genes", "shape", "block_px", "n_levels"),
    [
        (1, (3250, 3250), 512, 4),
        (64, (3250, 3250), 512, 4),
        (250, (25_000, 9_000), 512, 7),
        (1000, (3250, 3250), 128, 4),
        (5000, (3250, 3250), 64, 4),
        (250, (100, 80), 256, 2),
    ],
)
def test_blocks_stay_within_64_mib_where_files_are_few_and_levels_end_near_512(n_genes, shape, block_px, n_levels):
    layout = map_layout(n_genes, shape)
    assert (layout.block_px, layout.n_levels) == (block_px, n_levels)
    assert map_layout(n_genes, shape, whole_channels=True).block_px <= block_px


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
    areas = [(row1 - row0) * (col1 - col0) for row0, row1, col0, col1 in layout.blocks()]
    assert sum(areas) == layout.height * layout.width
    assert layout.whole_channels or prod(layout.level_chunks(0)) * 4 <= 4 * 2**20


def test_bytes_are_of_all_levels():
    assert map_layout(10, (1024, 1024)).nbytes == 10 * 4 * (1024**2 + 512**2)


@pytest.mark.parametrize(("shape", "block_px"), [((0, 5), 32), ((5, 5), 48), ((5, 5), 1)])
def test_refused(shape, block_px):
    with pytest.raises(StoreError):
        map_layout(1, shape, block_px)
