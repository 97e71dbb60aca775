"""Where on a slide there is tissue."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

from pixnet_sd.slide import open_slide, tissue_mask

GLASS, STROMA, NUCLEUS = (236, 230, 234), (221, 160, 200), (96, 60, 140)
HEIGHT, WIDTH = 300, 420


def textured(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Pink with violet dots and some noise, (h, w, 3)."""
    rng = np.random.default_rng(0)
    is_nucleus = rng.random((height, width, 1)) < 0.25
    return np.where(is_nucleus, NUCLEUS, STROMA) + rng.normal(0, 4, (height, width, 3))


def glass(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(1).normal(GLASS, 2.0, (height, width, 3))


def disk(x: float, y: float, radius: float) -> np.ndarray:
    rows, cols = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.hypot(cols - x, rows - y) < radius


def picture(tissue: np.ndarray) -> np.ndarray:
    return np.where(tissue[..., None], textured(), glass())


def mask_of(picture: np.ndarray, mpp: float = 4.0, working_mpp: float = 1.0) -> np.ndarray:
    """Tissue on the map grid, which is that of the picture: map px of 4 µm."""
    pixels = np.clip(picture, 0, 255).astype(np.uint8).transpose(2, 0, 1)
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, c_coords=["r", "g", "b"])})
    slide = open_slide(sdata, mpp=mpp, working_mpp=working_mpp, allow_any_mpp=True)
    mask = tissue_mask(slide)
    assert (mask.dtype, mask.shape) == (bool, slide.map_shape)
    return mask


def test_two_pieces_on_glass_are_found_and_lie_on_the_map_grid() -> None:
    tissue = disk(140, 150, 100) | disk(340, 220, 50)
    wrong = mask_of(picture(tissue)) != tissue
    edge = (disk(140, 150, 105) & ~disk(140, 150, 95)) | (disk(340, 220, 55) & ~disk(340, 220, 45))
    assert not (wrong & ~edge).any()
    assert wrong.mean() < 0.02
    rows, cols = np.nonzero(mask_of(picture(disk(140, 150, 100)), mpp=2.1, working_mpp=0.5))
    centre_um = np.array([cols.mean() + 0.5, rows.mean() + 0.5]) * 2.0
    np.testing.assert_allclose(centre_um, np.array([140, 150]) * 2.1, atol=4)


@pytest.mark.parametrize(("height", "width"), [(200, 240), (1, 1), (3, 40), (16, 16)])
@pytest.mark.parametrize("mpp", [0.5, 4.0])
def test_a_blank_slide_has_none_and_one_without_glass_is_all_tissue(height: int, width: int, mpp: float) -> None:
    tissue, dark_and_pale = textured(height, width), textured(height, width)
    dark_and_pale[:, : width // 2] *= 0.6
    for pixels in (glass(height, width), np.full_like(tissue, GLASS)):
        assert not mask_of(pixels, mpp).any()
    for pixels in (tissue, dark_and_pale, np.full_like(tissue, STROMA)):
        assert mask_of(pixels, mpp).all()


def test_dust_and_what_was_not_scanned_are_left_out_and_small_holes_are_filled() -> None:
    pixels = picture(disk(140, 150, 100) & ~disk(140, 150, 8))  # a lumen of 64 µm
    pixels[disk(265, 40, 8)] = NUCLEUS
    pixels[:, 330:] = 0
    mask = mask_of(pixels)
    assert mask[150, 140]
    assert not mask[:80, 245:300].any()
    assert not mask[:, 335:].any()
    mask = mask_of(picture(~disk(210, 150, 140)))  # tissue in every corner does not turn the mask around
    assert (mask[5, 5], mask[150, 210]) == (True, False)


def test_threads_of_tissue_are_one_tissue_and_a_large_hole_stays_open() -> None:
    threads = disk(200, 150, 120) & (np.mgrid[:HEIGHT, :WIDTH] % 24 < 6).any(axis=0)  # 24 µm wide, every 96 µm
    mask = mask_of(picture(threads))
    assert mask[disk(200, 150, 110)].all()
    assert not mask[~disk(200, 150, 130)].any()
    assert not mask_of(picture(disk(200, 150, 140) & ~disk(200, 150, 70)))[disk(200, 150, 65)].any()
