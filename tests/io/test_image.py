from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixnet_sd.errors import DataError
from pixnet_sd.io import open_image

PIXELS = np.random.default_rng(0).integers(0, 255, (150, 170, 3), dtype=np.uint8)


def read(path: Path) -> Any:
    with open_image(path, 64) as array:
        assert array.chunksize == (3, 64, 64)
        return array.compute()


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 48), "subifds": 1},
        {"tile": (64, 64), "compression": "jpeg"},
        {"rowsperstrip": 7, "compression": "lzw"},
        {"rowsperstrip": 16, "planarconfig": "separate"},
        {},
    ],
    ids=str,
)
def test_pixels_of_tiff_files(tmp_path, options):
    """Planes one after the other, and of a pyramid the finest level, too."""
    path, last = tmp_path / "image.btf", "planarconfig" not in options
    with tifffile.TiffWriter(path) as file:
        file.write(PIXELS if last else PIXELS.transpose(2, 0, 1), photometric="rgb", **options)
        if "subifds" in options:
            file.write(PIXELS[::2, ::2], photometric="rgb", tile=(32, 32), subfiletype=1)
    expected = tifffile.imread(path) if "compression" in options else PIXELS
    np.testing.assert_array_equal(read(path), expected.transpose(2, 0, 1))


def test_one_large_piece_without_compression_is_read_by_rows(tmp_path):
    like = {"shape": (7000, 7000, 3), "dtype": ">u2", "byteorder": ">"}
    pixels = tifffile.memmap(tmp_path / "i.tif", photometric="rgb", **like)
    assert pixels.nbytes > 2**28  # what is not written takes no disk
    pixels[6900:, :170] = PIXELS[:100] * np.uint16(257)
    pixels.flush()
    tracemalloc.start()
    with open_image(tmp_path / "i.tif", 256) as array:
        assert array.dtype == np.uint16
        rows = array[:, 6900:, :170].compute()
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    np.testing.assert_array_equal(rows, PIXELS[:100].transpose(2, 0, 1) * np.uint16(257))


def test_what_is_read_whole_warns_and_what_is_no_rgb_is_refused(tmp_path):
    large = np.broadcast_to(np.uint8(0), (10000, 9000, 3))
    tifffile.imwrite(tmp_path / "i.tif", large, photometric="rgb", rowsperstrip=10000, compression="zlib")
    with pytest.warns(UserWarning, match="i.tif"), open_image(tmp_path / "i.tif", 1024) as array:
        assert array.shape == (3, 10000, 9000)
    Image.fromarray(PIXELS).save(tmp_path / "i.png")
    with pytest.warns(UserWarning, match="i.png"):
        np.testing.assert_array_equal(read(tmp_path / "i.png"), PIXELS.transpose(2, 0, 1))
    (tmp_path / "none.tif").write_text("nothing")
    for name in ("grey.tif", "grey.png"):
        Image.fromarray(PIXELS[..., 0]).save(tmp_path / name)
    for name in ("grey.tif", "grey.png", "none.tif"):
        with pytest.raises(DataError, match=name), open_image(tmp_path / name, 64):
            pass
