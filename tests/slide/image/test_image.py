"""Levels of an image element: where their pixels lie, which channels they have, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel

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
    other = SpatialData(images={"other_name": backed[key]})  # still read from its store
    store = ImagePyramid.of(other["other_name"], "other_name")
    assert (memory.is_backed, store.is_backed) == (False, True)
    np.testing.assert_array_equal(store.levels[0].read(10, 60, 200, 330), noise()[:, 10:60, 200:330].transpose(1, 2, 0))
    for one, two in zip(memory.levels, store.levels, strict=True):
        np.testing.assert_array_equal(one.read(3, 90, 5, 77), two.read(3, 90, 5, 77))


def test_reads_are_clipped_to_the_level(backed: SpatialData) -> None:
    level = ImagePyramid.of(backed["multi"], "multi").levels[0]
    assert level.read(-5, 4, 400, 500).shape == (4, 7, 3)
    assert level.read(301, 310, 0, 5).shape == (0, 5, 3)


def test_a_replaced_element_is_not_read_from_disk(backed: SpatialData) -> None:
    backed.images["single"] = Image2DModel.parse(255 - noise(), c_coords=RGB)
    level = ImagePyramid.of(backed["single"], "single").levels[0]
    assert not level.is_backed
    np.testing.assert_array_equal(level.read(0, 9, 0, 9), 255 - noise()[:, :9, :9].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, 1.0), (1.0, 1.0), (1.99, 1.0), (2.01, 2.0), (3.9, 2.0), (4.04, 4.0), (50.0, 4.0)]
)
def test_level_for_is_the_coarsest_that_is_fine_enough(backed: SpatialData, scale: float, expected: float) -> None:
    assert ImagePyramid.of(backed["multi"], "multi").level_for(scale).scale == (expected, expected)


@pytest.mark.parametrize(
    ("names", "order"), [(["r", "g", "b", "a"], [0, 1, 2]), (["blue", "green", "red"], [2, 1, 0]), ("012", [0, 1, 2])]
)
def test_channels_are_put_in_order_and_alpha_is_left_out(names: list[str], order: list[int]) -> None:
    pixels = noise(channels=len(names))
    tile = ImagePyramid.of(Image2DModel.parse(pixels, c_coords=list(names)), "he").levels[0].read(0, 8, 0, 8)
    np.testing.assert_array_equal(tile, pixels[order, :8, :8].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("channels", "names", "shown"),
    [(1, None, "0"), (4, None, "0, 1, 2, 3"), (4, ["DAPI", "CD3", "CD8", "CD20"], "DAPI, CD3"), (9, None, "4, 5, ")],
)
def test_other_numbers_of_channels_are_refused(channels: int, names: list[str] | None, shown: str) -> None:
    image = Image2DModel.parse(noise(20, 20, channels), c_coords=names)
    with pytest.raises(DataError, match=rf"'stain'.*{shown}"):
        ImagePyramid.of(image, "stain")


def test_volumes_are_refused() -> None:
    with pytest.raises(DataError, match=r"'volume'.*\('c', 'z', 'y', 'x'\)"):
        ImagePyramid.of(Image3DModel.parse(np.zeros((3, 2, 8, 8), np.uint8)), "volume")
