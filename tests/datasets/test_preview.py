from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.datasets.drawn import Grid, Previews
from pixnet_sd.datasets.drawn._slide import _Preview


@settings(max_examples=25, deadline=None)
@given(size_px=st.integers(20, 60), px=st.integers(3, 20), window=st.integers(5, 70), seed=st.integers(0, 99))
def test_windows_add_up_to_means_over_boxes(size_px, px, window, seed):
    image = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    preview = _Preview.blank(size_px, px)
    for row in range(0, size_px, window):
        for col in range(0, size_px, window):
            part = image[row : row + window, col : col + window]
            preview.add(Grid(row, col, *part.shape[:2], 1.0), part)
    fine = image.repeat(px, axis=0).repeat(px, axis=1)  # a box is a whole number of these
    expected = fine.reshape(px, size_px, px, size_px, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(preview.light, expected, atol=1e-6)


def test_small_images_are_their_own_preview(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    previews = Previews.blank(200)
    previews.add(Grid(0, 0, 200, 200, 1.0), image)
    for pixels in previews.pixels().values():
        np.testing.assert_array_equal(pixels, image)


@pytest.mark.parametrize(("size_px", "hires", "lowres"), [(250, 250, 250), (800, 800, 300), (5000, 1000, 300)])
def test_sides(size_px, hires, lowres):
    assert {name: len(pixels) for name, pixels in Previews.blank(size_px).pixels().items()} == {
        "hires": hires,
        "lowres": lowres,
    }
