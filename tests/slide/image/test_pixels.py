"""Lines that an error proposes for pixels that are not 8 bits, run as they stand."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale, get_transformation

from pixnet_sd.errors import DataError
from pixnet_sd.slide.image import ImagePyramid

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
    "12 of 16 bits, hot pixels": with_values((he() * 4095).clip(0, 4095), 65535.0).astype(np.uint16),
    "8 of 16 bits": (he() * 255).clip(0, 255).astype(np.uint16),
    "int16, offset": (he() * 60000 - 30000).astype(np.int16),
    "int32": (he() * 1e6).astype(np.int32),
    "float": he().astype(np.float32),
    "float, infinite and missing": with_values(he(), np.inf, -np.inf, np.nan).astype(np.float32),
    "float from -1": (he() * 2 - 1).astype(np.float32),
    "float, hot pixels": with_values(he(), 1e6).astype(np.float32),
    "float16 to 65504": (he() * 65000).astype(np.float16),
}


def converted(pixels: np.ndarray, scale_factors: list[int] | None = None) -> SpatialData:
    """An object with the image, and with that which the proposed lines make of it."""
    options = {"scale_factors": scale_factors, "transformations": {"um": Scale([0.5, 0.5], axes=("x", "y"))}}
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, c_coords=["r", "g", "b"], **options)})
    with pytest.raises(DataError, match=f"'he' has {pixels.dtype} pixels.*'he_uint8'") as caught:
        ImagePyramid.of(sdata["he"], "he")
    exec(str(caught.value).partition(":\n")[2], {"sdata": sdata})
    assert get_transformation(sdata["he_uint8"], get_all=True).keys() == {"um"}
    return sdata


@pytest.mark.parametrize(("kind", "scale_factors"), [(kind, ([2, 2], None)[k % 2]) for k, kind in enumerate(KINDS)])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:image 'he' is dark")
def test_proposed_lines_give_a_picture(kind: str, scale_factors: list[int] | None) -> None:
    """Neither black nor clipped, and the same picture."""
    sdata = converted(KINDS[kind], scale_factors)
    whole = ImagePyramid.of(sdata["he_uint8"], "he_uint8").levels[0].read(0, SIDE, 0, SIDE).transpose(2, 0, 1)
    pixels, expected = whole[:, 12:].astype(float), he()[:, 12:]
    assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.999
    assert np.percentile(pixels, 95) > 200
    assert pixels.std() > 0.1 * 255
    assert max((pixels == end).mean() for end in (0, 255)) < 0.01
    if kind == "8 of 16 bits":
        np.testing.assert_array_equal(whole, KINDS[kind])
    elif kind == "float, infinite and missing":
        assert list(whole[0, 3:6, 5]) == [255, 0, 255]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_to_go_by(value: float) -> None:
    assert converted(np.full((3, 64, 64), value))["he_uint8"]["scale0"].image.dtype == np.uint8
