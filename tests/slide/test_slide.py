"""A slide at any resolution: where its pixels and its tissue lie, and that any way to read it gives the same."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import center_of_mass
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine
from tests.slide.conftest import make_image

from pixnet_sd.slide import Slide, open_slide, read_picture, tissue_mask

RGB = ["r", "g", "b"]
HEIGHT, WIDTH, MPP = 613, 790, 0.25
MARK_XY = (431.5, 222.0)  # centre of the mark in image px
SYSTEM = np.array([[0.0, -0.5, 900.0], [0.5, 0.0, -20.0], [0, 0, 1]])  # a quarter turn, a scale and a translation


def picture() -> np.ndarray:
    """Textured, with a black disk."""
    pixels = np.random.default_rng(3).integers(180, 240, (3, HEIGHT, WIDTH), dtype=np.uint8)
    rows, cols = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    pixels[:, np.hypot(cols - MARK_XY[0], rows - MARK_XY[1]) < 30] = 0
    return pixels


@pytest.fixture(scope="module", params=[None, [2, 2]], ids=["single", "multi"])
def in_memory(request: pytest.FixtureRequest) -> SpatialData:
    place = {"here": Affine(SYSTEM, input_axes=("x", "y"), output_axes=("x", "y"))}
    image = Image2DModel.parse(picture(), c_coords=RGB, scale_factors=request.param, transformations=place)
    return SpatialData(images={"he": image})


@pytest.fixture(scope="module")
def backed(in_memory: SpatialData, tmp_path_factory: pytest.TempPathFactory) -> SpatialData:
    path = tmp_path_factory.mktemp("slide") / "slide.zarr"
    in_memory.write(path)
    return sd.read_zarr(path)


def whole(slide: Slide) -> np.ndarray:
    height, width = slide.working_shape
    return slide.read(0, height, 0, width)


@pytest.mark.parametrize("working_mpp", [0.17, 0.25, 0.37, 0.5, 2.0])
def test_a_mark_is_where_it_was_drawn(in_memory: SpatialData, backed: SpatialData, working_mpp: float) -> None:
    slide = open_slide(backed, mpp=MPP, working_mpp=working_mpp)
    pixels, expected = whole(slide), np.array(MARK_XY) * MPP / working_mpp
    centre = np.array(center_of_mass(np.maximum(0, 120 - pixels.mean(axis=-1))))[::-1] + 0.5
    assert np.abs(centre - expected).max() < 0.1
    placed = slide.system_from_working @ np.append(centre, 1)
    np.testing.assert_allclose(placed, SYSTEM @ [*MARK_XY, 1], atol=0.1 * max(1, 0.5 * slide.working_scale))
    np.testing.assert_allclose(slide.working_from_system @ slide.system_from_working, np.eye(3), atol=1e-12)
    from_memory = open_slide(in_memory, mpp=MPP, working_mpp=working_mpp)
    assert (slide.pyramid.is_backed, from_memory.pyramid.is_backed) == (True, False)
    np.testing.assert_array_equal(whole(from_memory), pixels)
    if working_mpp == MPP:
        np.testing.assert_array_equal(whole(slide.at(MPP * (1 - 1e-10))), picture().transpose(1, 2, 0))  # no pixel more


def test_a_picture_is_read_box_by_box() -> None:
    slide = open_slide(SpatialData(images={"he": make_image(40, 9000)}), mpp=0.3)
    height, width = slide.working_shape
    np.testing.assert_array_equal(read_picture(slide, 2, height, 7, width), whole(slide)[2:, 7:])


def by_definition(slide: Slide) -> np.ndarray:
    """In float64: a triangle around each centre, over every pixel of the axis."""
    level = slide.pyramid.level_for(slide.working_scale)
    weights = []
    for n, size, scale, origin in zip(slide.working_shape, level.shape, level.scale, level.origin, strict=True):
        centre = np.clip(((np.arange(n) + 0.5) * slide.working_scale - origin) / scale, 0, size)
        distance = np.abs(np.arange(size) + 0.5 - centre[:, None])
        weights.append(np.maximum(0, 1 - distance / max(1, slide.working_scale / scale)))
    rows, cols = (each / each.sum(axis=1, keepdims=True) for each in weights)
    return np.einsum("ij,jkc,lk->ilc", rows, level.read(0, level.shape[0], 0, level.shape[1]), cols)


# Scales within 1/20 px of 1 over the whole axis are taken as 1, on purpose: not close to what the definition gives.
scales = st.floats(0.3, 9.0).filter(lambda scale: abs(scale - round(scale)) > 0.05)
exact_scales = st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 2.0, 8.0])
sizes, starts, lengths = st.integers(1, 90), st.integers(-20, 100), st.integers(0, 60)


@settings(deadline=None, max_examples=50)
@given(height=sizes, width=sizes, scale=scales | exact_scales, row0=starts, col0=starts, rows=lengths, cols=lengths)
@pytest.mark.filterwarnings("ignore:image 'he' is dark")  # of few pixels
def test_a_box_is_cut_from_the_defined_picture_and_white_around_it(height, width, scale, row0, col0, rows, cols):
    image = make_image(height, width, scale_factors=[2] if min(height, width) > 40 else None)
    slide = open_slide(SpatialData(images={"he": image}), mpp=1.0, working_mpp=scale)
    picture = whole(slide)
    assert np.abs(picture - by_definition(slide)).max() < 0.8  # 0.5 is the rounding to uint8
    padded = np.pad(picture, ((20, 160), (20, 160), (0, 0)), constant_values=255)
    expected = padded[row0 + 20 : row0 + 20 + rows, col0 + 20 : col0 + 20 + cols]
    np.testing.assert_array_equal(slide.read(row0, row0 + rows, col0, col0 + cols), expected)


def test_threads_and_unpickled_slides_read_the_same(backed: SpatialData) -> None:
    slide = open_slide(backed, mpp=MPP)
    pickled = pickle.dumps(slide)
    assert len(pickled) < 20_000
    full = whole(slide)
    boxes = [(row, row + 70, col, col + 64) for row in range(0, 230, 30) for col in range(0, 320, 64)]
    for reader in (slide, pickle.loads(pickled)):
        with ThreadPoolExecutor(8) as pool:
            tiles = pool.map(reader.read, *zip(*boxes, strict=True))
        for (row0, row1, col0, col1), tile in zip(boxes, tiles, strict=True):
            np.testing.assert_array_equal(tile, full[row0:row1, col0:col1])


def test_what_was_chosen_is_in_the_slide_and_shapes_round_up(backed: SpatialData) -> None:
    slide = open_slide(backed, mpp=MPP).named("first")
    assert (slide.name, slide.image_key, slide.coordinate_system) == ("first", "he", "here")
    assert (slide.mpp, slide.height_px, slide.width_px, slide.channels) == (MPP, HEIGHT, WIDTH, tuple(RGB))
    assert all(word in slide.taken() for word in ("'he'", "'here'", "0.25", slide.mpp_rule))
    shapes = {0.25: ((613, 790), (154, 198)), 0.5: ((307, 395), (77, 99)), 1.0: ((154, 198), (39, 50))}
    assert {mpp: (slide.at(mpp).working_shape, slide.at(mpp).map_shape) for mpp in shapes} == shapes


def test_an_image_coarser_than_working_is_enlarged_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    slide = open_slide(SpatialData(images={"he": make_image()}), mpp=1.0)
    slide.read(0, 100, 0, 100)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "enlarged" in caplog.text


def test_huge_blocks_are_warned_of_and_not_loaded(caplog: pytest.LogCaptureFixture) -> None:
    for side in (7_000, 9_000):
        pixels = da.zeros((3, side, side), np.uint8, chunks=-1).map_blocks(lambda block: 1 / 0, dtype=np.uint8)
        image = Image2DModel.parse(pixels, c_coords=RGB, chunks=(3, 1024, 1024))
        with pytest.raises(ZeroDivisionError) if side == 7_000 else nullcontext():  # it is looked at, or not
            open_slide(SpatialData(images={"he": image}), mpp=0.5)
        assert ("write the object first" in caplog.text) == (side == 9_000)


GLASS, STROMA, NUCLEUS = (236, 230, 234), (221, 160, 200), (96, 60, 140)
SHAPE = (300, 420)


def textured(shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Pink with violet dots and some noise, (h, w, 3)."""
    rng = np.random.default_rng(0)
    is_nucleus = rng.random((*shape, 1)) < 0.25
    return np.where(is_nucleus, NUCLEUS, STROMA) + rng.normal(0, 4, (*shape, 3))


def glass(shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).normal(GLASS, 2.0, (*shape, 3))


def disk(x: float, y: float, radius: float) -> np.ndarray:
    rows, cols = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    return np.hypot(cols - x, rows - y) < radius


def on_glass(tissue: np.ndarray) -> np.ndarray:
    return np.where(tissue[..., None], textured(), glass())


def mask_of(picture: np.ndarray, mpp: float = 4.0, working_mpp: float = 1.0) -> np.ndarray:
    """Tissue on the map grid, which is that of the picture: map px of 4 µm."""
    pixels = np.clip(picture, 0, 255).astype(np.uint8).transpose(2, 0, 1)
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, c_coords=RGB)})
    slide = open_slide(sdata, mpp=mpp, working_mpp=working_mpp, allow_any_mpp=True)
    mask = tissue_mask(slide)
    assert (mask.dtype, mask.shape) == (bool, slide.map_shape)
    return mask


def test_two_pieces_on_glass_are_found_and_lie_on_the_map_grid() -> None:
    tissue = disk(140, 150, 100) | disk(340, 220, 50)
    wrong = mask_of(on_glass(tissue)) != tissue
    edge = (disk(140, 150, 105) & ~disk(140, 150, 95)) | (disk(340, 220, 55) & ~disk(340, 220, 45))
    assert not (wrong & ~edge).any()
    assert wrong.mean() < 0.02
    rows, cols = np.nonzero(mask_of(on_glass(disk(140, 150, 100)), mpp=2.1, working_mpp=0.5))
    centre_um = np.array([cols.mean() + 0.5, rows.mean() + 0.5]) * 2.0
    np.testing.assert_allclose(centre_um, np.array([140, 150]) * 2.1, atol=4)


@pytest.mark.parametrize("shape", [(200, 240), (1, 1), (3, 40), (16, 16)])
@pytest.mark.parametrize("mpp", [0.5, 4.0])
def test_a_blank_slide_has_none_and_one_without_glass_is_all_tissue(shape, mpp: float) -> None:
    tissue, dark_and_pale = textured(shape), textured(shape)
    dark_and_pale[:, : shape[1] // 2] *= 0.6
    for pixels in (glass(shape), np.full_like(tissue, GLASS)):
        assert not mask_of(pixels, mpp).any()
    for pixels in (tissue, dark_and_pale, np.full_like(tissue, STROMA)):
        assert mask_of(pixels, mpp).all()


def test_dust_and_what_was_not_scanned_are_left_out_and_small_holes_are_filled() -> None:
    pixels = on_glass(disk(140, 150, 100) & ~disk(140, 150, 8))  # a lumen of 64 µm
    pixels[disk(265, 40, 8)] = NUCLEUS
    pixels[:, 330:] = 0
    mask = mask_of(pixels)
    assert mask[150, 140]
    assert not mask[:80, 245:300].any()
    assert not mask[:, 335:].any()
    mask = mask_of(on_glass(~disk(210, 150, 140)))  # tissue in every corner does not turn the mask around
    assert (mask[5, 5], mask[150, 210]) == (True, False)


def test_threads_of_tissue_are_one_tissue_and_a_large_hole_stays_open() -> None:
    threads = disk(200, 150, 120) & (np.mgrid[: SHAPE[0], : SHAPE[1]] % 24 < 6).any(axis=0)  # 24 µm wide, every 96 µm
    mask = mask_of(on_glass(threads))
    assert mask[disk(200, 150, 110)].all()
    assert not mask[~disk(200, 150, 130)].any()
    assert not mask_of(on_glass(disk(200, 150, 140) & ~disk(200, 150, 70)))[disk(200, 150, 65)].any()
