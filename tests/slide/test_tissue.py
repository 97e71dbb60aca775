from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

from pixnet_sd.slide import open_slide, tissue_mask

GLASS, STROMA, NUCLEUS = (236, 230, 234), (221, 160, 200), (96, 60, 140)


def textured(height: int, width: int) -> np.ndarray:
    """Pink with violet dots and some noise, (h, w, 3)."""
    rng = np.random.default_rng(0)
    tissue = np.empty((height, width, 3))
    tissue[:] = STROMA
    tissue[rng.random((height, width)) < 0.25] = NUCLEUS
    return tissue + rng.normal(0, 4, tissue.shape)


def glass(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).normal(GLASS, 2.0, (height, width, 3))


def disk(height: int, width: int, centre_xy: tuple[float, float], radius: float) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width] + 0.5
    return np.hypot(cols - centre_xy[0], rows - centre_xy[1]) < radius


def mask_of(picture: np.ndarray, mpp: float = 4.0, working_mpp: float = 0.5) -> np.ndarray:
    pixels = np.clip(picture, 0, 255).astype(np.uint8).transpose(2, 0, 1)
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, c_coords=["r", "g", "b"])})
    slide = open_slide(sdata, mpp=mpp, working_mpp=working_mpp, allow_any_mpp=True)
    mask = tissue_mask(slide)
    assert mask.dtype == bool
    assert mask.shape == slide.map_shape
    assert set(sdata.images) == {"he"}
    assert not len(sdata.labels)
    return mask


def test_two_pieces_on_glass_are_found() -> None:
    height, width = 300, 420
    tissue = disk(height, width, (140, 150), 100) | disk(height, width, (340, 220), 50)
    picture = np.where(tissue[..., None], textured(height, width), glass(height, width))
    mask = mask_of(picture, mpp=4.0, working_mpp=1.0)  # map px of 4 µm: the grid of the picture
    assert mask.shape == (height, width)
    wrong = mask != tissue
    edge = disk(height, width, (140, 150), 105) & ~disk(height, width, (140, 150), 95)
    edge |= disk(height, width, (340, 220), 55) & ~disk(height, width, (340, 220), 45)
    assert not (wrong & ~edge).any()
    assert wrong.mean() < 0.02


def test_it_lies_on_the_map_grid_where_the_tissue_is() -> None:
    height, width = 300, 420
    tissue = disk(height, width, (140, 150), 100)
    mask = mask_of(np.where(tissue[..., None], textured(height, width), glass(height, width)), mpp=2.1)
    rows, cols = np.nonzero(mask)
    centre_um = np.array([cols.mean() + 0.5, rows.mean() + 0.5]) * 2.0
    np.testing.assert_allclose(centre_um, np.array([140, 150]) * 2.1, atol=4)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_blank_slide_has_none(noise: float) -> None:
    blank = GLASS + (glass(200, 240) - GLASS) * noise
    assert not mask_of(blank).any()


def test_a_slide_without_glass_is_all_tissue() -> None:
    assert mask_of(textured(200, 240)).all()


def test_dark_and_pale_tissue_without_glass_is_all_tissue() -> None:
    picture = textured(200, 240)
    picture[:, :110] *= 0.6
    assert mask_of(picture).all()


def test_an_even_colour_that_is_not_glass_is_tissue() -> None:
    assert mask_of(np.broadcast_to(np.array(STROMA, float), (150, 150, 3))).all()


def test_dust_is_left_out_and_small_holes_are_filled() -> None:
    height, width = 300, 420
    tissue = disk(height, width, (140, 150), 100) & ~disk(height, width, (140, 150), 8)  # a lumen of 64 µm
    picture = np.where(tissue[..., None], textured(height, width), glass(height, width))
    picture[disk(height, width, (380, 40), 8)] = NUCLEUS
    mask = mask_of(picture, mpp=4.0, working_mpp=1.0)
    assert mask[150, 140]
    assert not mask[:100, 340:].any()


def test_threads_of_tissue_with_glass_between_them_are_one_tissue() -> None:
    height, width = 300, 420
    tissue = disk(height, width, (200, 150), 120)
    threads = tissue & (np.mgrid[:height, :width] % 24 < 6).any(axis=0)  # 24 µm wide, every 96 µm
    mask = mask_of(np.where(threads[..., None], textured(height, width), glass(height, width)), working_mpp=1.0)
    assert mask[disk(height, width, (200, 150), 110)].all()
    assert not mask[~disk(height, width, (200, 150), 130)].any()


def test_a_large_hole_stays_open() -> None:
    height, width = 300, 420
    tissue = disk(height, width, (200, 150), 140) & ~disk(height, width, (200, 150), 70)
    mask = mask_of(np.where(tissue[..., None], textured(height, width), glass(height, width)), working_mpp=1.0)
    assert not mask[disk(height, width, (200, 150), 65)].any()


def test_what_was_not_scanned_is_not_tissue() -> None:
    height, width = 300, 420
    tissue = disk(height, width, (140, 150), 100)
    picture = np.where(tissue[..., None], textured(height, width), glass(height, width))
    picture[:, 330:] = 0
    mask = mask_of(picture, mpp=4.0, working_mpp=1.0)
    assert mask[150, 140]
    assert not mask[:, 335:].any()


def test_tissue_in_every_corner_does_not_turn_the_mask_around() -> None:
    height, width = 300, 420
    hole = disk(height, width, (210, 150), 140)
    picture = np.where(hole[..., None], glass(height, width), textured(height, width))
    mask = mask_of(picture, mpp=4.0, working_mpp=1.0)
    assert mask[5, 5]
    assert not mask[150, 210]


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (16, 16)])
def test_tiny_images(shape: tuple[int, int]) -> None:
    assert mask_of(textured(*shape), mpp=0.5).all()
    assert not mask_of(glass(*shape), mpp=0.5).any()


def test_a_large_slide_is_looked_at_in_a_small_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixnet_sd.slide import _slide as _picture
    from pixnet_sd.slide import _slide as _tissue

    monkeypatch.setattr(_picture, "_READ_PX", 64)
    monkeypatch.setattr(_tissue, "_OVERVIEW_MAX_PX", 2000)
    height, width = 300, 420
    tissue = disk(height, width, (140, 150), 100)
    mask = mask_of(np.where(tissue[..., None], textured(height, width), glass(height, width)), working_mpp=1.0)
    assert (mask != tissue).mean() < 0.06
