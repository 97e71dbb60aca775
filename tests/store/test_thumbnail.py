from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel

from pixnet_sd.errors import DataError
from pixnet_sd.store import thumbnail


def gradient(height, width, factors=None):
    """Red grows with the column, green with the row."""
    pixels = np.zeros((3, height, width), dtype=np.uint8)
    pixels[0] = np.arange(width) * 255 // width
    pixels[1] = (np.arange(height) * 255 // height)[:, None]
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=factors)
    return sd.SpatialData(images={"im": image}), pixels


@pytest.mark.parametrize(
    ("height", "width", "factors", "max_px"),
    [(20, 31, [2], 7), (700, 300, None, 50), (300, 701, [2, 2], 100), (411, 222, [2], 300), (999, 500, None, 10)],
)
def test_small_enough_and_in_place(height, width, factors, max_px):
    sdata, pixels = gradient(height, width, factors)
    small = thumbnail(sdata, "im", max_px=max_px)
    rows, cols = small.rgb.shape[:2]
    assert max_px // 2 <= max(rows, cols) <= max_px
    assert small.rgb.dtype == np.uint8
    for channel, row, col in [
        (0, rows // 2, cols // 5),
        (0, 1, cols // 2),
        (1, rows // 5, 0),
        (1, rows // 2, cols // 2),
    ]:
        expected = pixels[channel, int((row + 0.5) / small.scale), int((col + 0.5) / small.scale)]
        one_pixel = 255 / (rows if channel else cols)
        assert abs(int(small.rgb[row, col, channel]) - int(expected)) <= 0.5 * one_pixel + 1


def test_a_small_image_is_kept():
    sdata, pixels = gradient(30, 40)
    small = thumbnail(sdata, "im")
    assert small.scale == 1
    np.testing.assert_array_equal(small.rgb, pixels.transpose(1, 2, 0))


def test_only_rgb():
    sdata = sd.SpatialData(images={"im": Image2DModel.parse(np.zeros((3, 9, 9), np.float32), dims=("c", "y", "x"))})
    with pytest.raises(DataError, match="3 channels of float32"):
        thumbnail(sdata, "im")
