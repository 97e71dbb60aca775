"""Lines that an error proposes for pixels that are not 8 bits, run as they stand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

from pixnet_sd.errors import DataError
from pixnet_sd.slide import open_slide

SIDE = 160


def he() -> np.ndarray:
    """A bright image with a dark middle, 0 to 1."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    tissue = np.exp(-((x**2 + y**2) / 0.05))
    pixels = 0.96 - tissue[None] * np.array([0.45, 0.75, 0.35])[:, None, None]
    return pixels + np.random.default_rng(0).normal(0, 0.01, pixels.shape)


def with_values(pixels: np.ndarray, *values: float) -> np.ndarray:
    pixels = pixels.copy()
    for k, value in enumerate(values):
        pixels[:, 3 + k, 5 : 5 + 4 * (k + 1)] = value
    return pixels


KINDS: dict[str, np.ndarray] = {
    "uint16": (he() * 65535).clip(0, 65535).astype(np.uint16),
    "12 of 16 bits": (he() * 4095).clip(0, 4095).astype(np.uint16),
    "12 of 16 bits, hot pixels": with_values((he() * 4095).clip(0, 4095), 65535.0).astype(np.uint16),
    "8 of 16 bits": (he() * 255).clip(0, 255).astype(np.uint16),
    "just above 8 bits": (he() * 300).clip(0, 330).astype(np.uint16),
    "int16, offset": (he() * 60000 - 30000).astype(np.int16),
    "int16, a few negative": with_values(he() * 4000, -30.0).astype(np.int16),
    "int32": (he() * 1e6).astype(np.int32),
    "float": he().astype(np.float32),
    "float, infinite and missing": with_values(he(), np.inf, -np.inf, np.nan).astype(np.float32),
    "float to 255": (he() * 255).astype(np.float64),
    "float from -1": (he() * 2 - 1).astype(np.float32),
    "float, hot pixels": with_values(he(), 1e6).astype(np.float32),
    "float16 to 65504": (he() * 65000).astype(np.float16),
    "float, large": (he() * 3e7).astype(np.float32),
}


def lines_for(sdata: SpatialData) -> str:
    with pytest.raises(DataError, match="'he'.*uint8") as caught:
        open_slide(sdata, image_key="he", mpp=0.5)
    return str(caught.value).partition(":\n")[2]


@pytest.mark.parametrize(("kind", "scale_factors"), zip(KINDS, [None, [2, 2]] * 8, strict=False))
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_proposed_lines_give_a_picture(kind: str, scale_factors: list[int] | None) -> None:
    """G7: neither black nor clipped, and the same picture."""
    image = Image2DModel.parse(KINDS[kind], dims=("c", "y", "x"), c_coords=["r", "g", "b"], scale_factors=scale_factors)
    sdata = SpatialData(images={"he": image})
    exec(lines_for(sdata), {"sdata": sdata})
    slide = open_slide(sdata, image_key="he_uint8", mpp=0.5)
    pixels = slide.read(0, SIDE, 0, SIDE)[12:].transpose(2, 0, 1).astype(float)
    expected = he()[:, 12:]
    assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.999
    assert 200 < np.percentile(pixels, 95) <= 255
    assert (pixels == 255).mean() < 0.01
    assert (pixels == 0).mean() < 0.01
    assert pixels.std() > 0.1 * 255


def test_missing_pixels_become_white() -> None:
    sdata = SpatialData(images={"he": Image2DModel.parse(KINDS["float, infinite and missing"], dims=("c", "y", "x"))})
    exec(lines_for(sdata), {"sdata": sdata})
    row = sdata["he_uint8"]["scale0"].image.values[0, 3:6, 5]
    assert list(row) == [255, 0, 255]


@pytest.mark.parametrize("make", [np.zeros, lambda shape: np.full(shape, np.nan)])
def test_nothing_to_go_by(make: Callable[..., np.ndarray]) -> None:
    sdata = SpatialData(images={"he": Image2DModel.parse(make((3, 64, 64)), dims=("c", "y", "x"))})
    exec(lines_for(sdata), {"sdata": sdata})
    assert sdata["he_uint8"]["scale0"].image.dtype == np.uint8
