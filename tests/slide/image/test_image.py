"""Levels of an image element: where their pixels lie, which channels they have, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

from pixnet_sd.errors import DataError
from pixnet_sd.slide.image import ImagePyramid

RGB = ["r", "g", "b"]
HEIGHT, WIDTH = 301, 407


def noise(height: int = HEIGHT, width: int = WIDTH, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (channels, height, width), dtype=np.uint8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "slide.zarr"
    images = {
        "multi": Image2DModel.parse(noise(), c_coords=RGB, scale_factors=[2, 2]),
        "single": Image2DModel.parse(noise(), c_coords=RGB),
    }
    SpatialData(images=images).write(path)
    return path


@pytest.fixture
def backed(stored: Path) -> SpatialData:
    return sd.read_zarr(stored)


def test_levels_lie_where_their_pixels_were_averaged(backed: SpatialData) -> None:
    pyramid = ImagePyramid.of(backed["multi"], "multi")
    assert [level.shape for level in pyramid.levels] == [(301, 407), (150, 203), (75, 101)]
    assert [level.scale for level in pyramid.levels] == [(1, 1), (2, 2), (4, 4)]
    assert pyramid.levels[2].origin == (1, 3)  # what is left over from blocks of 4 is dropped from the start
    level = pyramid.levels[1]
    row0, col0 = (int(start) for start in level.origin)
    blocks = noise()[:, row0 : row0 + 300, col0 : col0 + 406].reshape(3, 150, 2, 203, 2).mean(axis=(2, 4))
    assert np.abs(level.read(0, 150, 0, 203) - blocks.transpose(1, 2, 0)).max() <= 1


def test_levels_that_are_no_whole_reduction_take_the_ratio_of_the_shapes() -> None:
    image = Image2DModel.parse(noise(300, 400), c_coords=RGB, scale_factors=[2])
    image["scale1"] = Image2DModel.parse(noise(120, 160), c_coords=RGB).to_dataset(name="image")
    level = ImagePyramid.of(image, "he").levels[1]
    assert (level.scale, level.origin) == ((2.5, 2.5), (0, 0))


@pytest.mark.parametrize("key", ["multi", "single"])
def test_backed_and_in_memory_read_the_same(backed: SpatialData, key: str) -> None:
    factors = {"scale_factors": [2, 2]} if key == "multi" else {}
    memory = ImagePyramid.of(Image2DModel.parse(noise(), c_coords=RGB, **factors), key)
    store = ImagePyramid.of(SpatialData(images={"other_name": backed[key]})["other_name"], "other_name")
    assert (memory.is_backed, store.is_backed) == (False, True)
    np.testing.assert_array_equal(store.levels[0].read(10, 60, 200, 330), noise()[:, 10:60, 200:330].transpose(1, 2, 0))
    for one, two in zip(memory.levels, store.levels, strict=True):
        np.testing.assert_array_equal(one.read(3, 90, 5, 77), two.read(3, 90, 5, 77))
    assert store.levels[0].read(-5, 4, 400, 500).shape == (4, 7, 3)  # clipped
    assert store.levels[0].read(301, 310, 0, 5).shape == (0, 5, 3)


def test_level_for_is_the_coarsest_that_is_fine_enough(backed: SpatialData) -> None:
    pyramid = ImagePyramid.of(backed["multi"], "multi")
    scales = {0.5: 1, 1.0: 1, 1.99: 1, 2.01: 2, 3.9: 2, 4.04: 4, 50.0: 4}
    assert {scale: pyramid.level_for(scale).scale[0] for scale in scales} == scales


def test_other_numbers_of_channels_are_refused() -> None:
    for names, shown in (("0", "0"), ("0123", "0, 1, 2, 3"), (["DAPI", "CD3", "CD8", "CD20"], "DAPI, CD3")):
        image = Image2DModel.parse(noise(20, 20, len(names)), c_coords=list(names))
        with pytest.raises(DataError, match=rf"'stain'.*{shown}"):
            ImagePyramid.of(image, "stain")
