from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from dask import delayed
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel
from spatialdata.transformations import Scale, get_transformation

from pixnet_sd.errors import DataError
from pixnet_sd.slide.image import ImagePyramid, largest_block_px, stored_array

RGB = ["r", "g", "b"]


def noise(height: int = 301, width: int = 407, channels: int = 3) -> np.ndarray:
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


def test_levels_and_scales_come_from_the_shapes(backed: SpatialData) -> None:
    pyramid = ImagePyramid.of(backed["multi"], "multi")
    assert [level.shape for level in pyramid.levels] == [(301, 407), (150, 203), (75, 101)]
    assert pyramid.levels[0].scale == (1, 1)
    assert pyramid.levels[2].scale == (4, 4)
    assert pyramid.levels[2].origin == (1, 3)  # what is left over from blocks of 4 is dropped from the start
    assert pyramid.shape == (301, 407)


def test_levels_that_are_no_whole_reduction_take_the_ratio_of_the_shapes() -> None:
    image = Image2DModel.parse(noise(300, 400), c_coords=RGB, scale_factors=[2])
    image["scale1"] = Image2DModel.parse(noise(120, 160), c_coords=RGB).to_dataset(name="image")
    level = ImagePyramid.of(image, "he").levels[1]
    assert level.scale == (2.5, 2.5)
    assert level.origin == (0, 0)


def test_levels_lie_where_their_pixels_were_averaged(backed: SpatialData) -> None:
    level = ImagePyramid.of(backed["multi"], "multi").levels[1]
    row0, col0 = (int(start) for start in level.origin)
    blocks = noise()[:, row0 : row0 + 300, col0 : col0 + 406].reshape(3, 150, 2, 203, 2).mean(axis=(2, 4))
    assert np.abs(level.read(0, 150, 0, 203) - blocks.transpose(1, 2, 0)).max() <= 1


@pytest.mark.parametrize("key", ["multi", "single"])
def test_what_was_read_from_a_store_is_read_from_zarr(backed: SpatialData, key: str) -> None:
    pyramid = ImagePyramid.of(backed[key], key)
    assert pyramid.is_backed
    np.testing.assert_array_equal(
        pyramid.levels[0].read(10, 60, 200, 330), noise()[:, 10:60, 200:330].transpose(1, 2, 0)
    )


def test_in_memory_reads_the_same_as_backed(backed: SpatialData) -> None:
    memory = ImagePyramid.of(Image2DModel.parse(noise(), c_coords=RGB, scale_factors=[2, 2]), "multi")
    assert not memory.is_backed
    for from_memory, from_store in zip(memory.levels, ImagePyramid.of(backed["multi"], "multi").levels, strict=True):
        np.testing.assert_array_equal(from_memory.read(3, 90, 5, 77), from_store.read(3, 90, 5, 77))


def test_reads_are_clipped_to_the_level(backed: SpatialData) -> None:
    level = ImagePyramid.of(backed["multi"], "multi").levels[0]
    assert level.read(-5, 4, 400, 500).shape == (4, 7, 3)
    assert level.read(301, 310, 0, 5).shape == (0, 5, 3)


def test_a_replaced_element_is_not_read_from_disk(backed: SpatialData) -> None:
    backed.images["single"] = Image2DModel.parse(255 - noise(), c_coords=RGB)
    level = ImagePyramid.of(backed["single"], "single").levels[0]
    assert not level.is_backed
    np.testing.assert_array_equal(level.read(0, 9, 0, 9), 255 - noise()[:, :9, :9].transpose(1, 2, 0))


@pytest.mark.parametrize("change", [lambda x: 255 - x, lambda x: x[:, 7:], lambda x: x[::-1], lambda x: x[:, :, ::-1]])
def test_a_lazy_change_of_a_stored_element_is_honoured(backed: SpatialData, change) -> None:
    data = backed["single"].data
    assert stored_array(data) is not None
    assert stored_array(change(data)) is None
    level = ImagePyramid.of(Image2DModel.parse(change(data), c_coords=RGB), "changed").levels[0]
    np.testing.assert_array_equal(level.read(0, 9, 0, 9), change(noise())[:, :9, :9].transpose(1, 2, 0))


def test_an_element_moved_to_another_object_is_still_read_from_its_store(backed: SpatialData) -> None:
    moved = SpatialData(images={"other_name": backed["multi"]})
    assert ImagePyramid.of(moved["other_name"], "other_name").is_backed


def test_a_backed_pyramid_pickles_without_its_pixels(backed: SpatialData) -> None:
    pyramid = ImagePyramid.of(backed["multi"], "multi")
    pickled = pickle.dumps(pyramid)
    assert len(pickled) < 20_000
    np.testing.assert_array_equal(
        pickle.loads(pickled).levels[1].read(0, 50, 0, 60), pyramid.levels[1].read(0, 50, 0, 60)
    )


def test_threads_read_the_same(backed: SpatialData) -> None:
    level = ImagePyramid.of(backed["multi"], "multi").levels[0]
    boxes = [(row, row + 40, col, col + 50) for row in range(0, 260, 20) for col in range(0, 350, 50)]
    with ThreadPoolExecutor(8) as pool:
        tiles = list(pool.map(lambda box: level.read(*box), boxes))
    for (row0, row1, col0, col1), tile in zip(boxes, tiles, strict=True):
        np.testing.assert_array_equal(tile, noise()[:, row0:row1, col0:col1].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, 1.0), (1.0, 1.0), (1.99, 1.0), (2.01, 2.0), (3.9, 2.0), (4.04, 4.0), (50.0, 4.0)]
)
def test_level_for_is_the_coarsest_that_is_fine_enough(backed: SpatialData, scale: float, expected: float) -> None:
    level = ImagePyramid.of(backed["multi"], "multi").level_for(scale)
    assert round(level.scale[0]) == expected


def test_rgba_loses_its_alpha() -> None:
    image = Image2DModel.parse(noise(channels=4), c_coords=["r", "g", "b", "a"])
    tile = ImagePyramid.of(image, "he").levels[0].read(0, 8, 0, 8)
    np.testing.assert_array_equal(tile, noise(channels=4)[:3, :8, :8].transpose(1, 2, 0))


def test_named_channels_are_put_in_order() -> None:
    image = Image2DModel.parse(noise(), c_coords=["blue", "green", "red"])
    tile = ImagePyramid.of(image, "he").levels[0].read(0, 8, 0, 8)
    np.testing.assert_array_equal(tile, noise()[::-1, :8, :8].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("channels", "names", "said"),
    [
        (1, None, r"found 1 channel\(s\) \(0\)"),
        (4, None, r"found 4 channel\(s\) \(0, 1, 2, 3\).*c_coords="),
        (4, ["DAPI", "CD3", "CD8", "CD20"], r"found 4 channel\(s\) \(DAPI, CD3, CD8, CD20\)"),
        (9, None, r"found 9 channel\(s\) \(0, 1, 2, 3, 4, 5, \.\.\.\).*image_key="),
    ],
)
def test_other_numbers_of_channels_are_refused(channels: int, names: list[str] | None, said: str) -> None:
    image = Image2DModel.parse(noise(channels=channels), c_coords=names)
    with pytest.raises(DataError, match=said):
        ImagePyramid.of(image, "stain")


def test_volumes_are_refused() -> None:
    image = Image3DModel.parse(np.zeros((3, 2, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"axes \('c', 'z', 'y', 'x'\)"):
        ImagePyramid.of(image, "volume")


@pytest.mark.parametrize(
    ("dtype", "factor", "kind"),
    [
        (np.uint16, 257, "uint16"),  # 16 bits used
        (np.uint16, 1, "uint16"),  # 8 bits in a 16-bit container
        (np.float32, 1 / 255, "float32"),
        (np.float64, 1, "float64"),
    ],
)
@pytest.mark.parametrize("scale_factors", [None, [2]])
def test_other_types_are_refused_with_lines_that_convert(
    dtype: type, factor: float, kind: str, scale_factors: list[int] | None
) -> None:
    pixels = noise().astype(float)
    pixels[:, 140:160, 200:210] = 255  # so that the sample from the middle meets the highest value
    image = Image2DModel.parse(
        (pixels * factor).astype(dtype),
        c_coords=RGB,
        scale_factors=scale_factors,
        transformations={"um": Scale([0.5, 0.5], axes=("x", "y"))},
    )
    sdata = SpatialData(images={"he": image})
    with pytest.raises(DataError, match=f"{kind} pixels.*'he_uint8'") as error:
        ImagePyramid.of(sdata["he"], "he")
    exec(str(error.value).split(":\n", 1)[1], {"sdata": sdata})
    tile = ImagePyramid.of(sdata["he_uint8"], "he_uint8").levels[0].read(0, 301, 0, 407)
    np.testing.assert_array_equal(tile, pixels.transpose(1, 2, 0))
    assert get_transformation(sdata["he_uint8"], get_all=True).keys() == {"um"}


def test_a_big_block_below_small_chunks_is_found() -> None:
    frame = da.from_delayed(delayed(noise)(600, 700), (3, 600, 700), np.uint8)
    image = Image2DModel.parse(frame.rechunk((3, 100, 100)), c_coords=RGB)
    assert image.data.chunksize == (3, 100, 100)
    assert largest_block_px(ImagePyramid.of(image, "he").levels[0]) == 600 * 700


def test_pixels_in_memory_need_no_block() -> None:
    image = Image2DModel.parse(da.from_array(noise(), chunks=-1), c_coords=RGB)
    assert largest_block_px(ImagePyramid.of(image, "he").levels[0]) == 0


def test_a_stored_level_loads_its_chunks(backed: SpatialData) -> None:
    level = ImagePyramid.of(backed["multi"], "multi").levels[0]
    assert largest_block_px(level) == np.prod(backed["multi"]["scale0"].image.data.chunksize[1:])
