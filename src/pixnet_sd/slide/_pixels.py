"""Pixels that are not RGB of 8 bits, and the lines that make them so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import DataError

__all__ = ["check_uint8"]

_WHITE_POINTS = (255, 1023, 4095, 16383, 65535)
_LOW, _HIGH = 0.1, 99.9  # percentiles: what lies beyond is hot pixels
_FEW = 0.02  # of the range: so little below 0 is noise around black
_ROOM = 0.05  # above what was seen, for what was not
_HOT = 1.25  # how far the highest value may lie above the percentile and still be the image's own


def check_uint8(dtype: np.dtype, sample: Callable[[], NDArray[Any]], image_key: str, *, is_multiscale: bool) -> None:
    """Refuse pixels that are not ``uint8``, with the lines that convert what was found.

    Parameters
    ----------
    dtype
        Type of the image's pixels.
    sample
        Gives pixels from all over the image; their range decides which conversion is proposed. Not called for
        ``uint8``.
    image_key
        Name of the image element, for messages.
    is_multiscale
        Whether the element has levels, which decides how to get at its pixels.

    Raises
    ------
    DataError
        Any type but ``uint8``: a guess of the range would change colours silently.
    """
    if dtype == np.uint8:
        return
    span = _Span.of(sample())
    image = f"sdata[{image_key!r}]" + ("['scale0'].image" if is_multiscale else "")
    raise DataError(
        f"image {image_key!r} has {dtype} pixels ({span.lowest:g} to {span.highest:g} in a sample), 0-255 uint8 are "
        f"needed. Convert it with these lines and give image_key={image_key + '_uint8'!r}:\n"
        + _conversion(span, image_key, image)
    )


@dataclass(frozen=True)
class _Span:
    """Range of an image's values.

    Attributes
    ----------
    lowest, highest
        Of the finite values.
    black, white
        What becomes 0 and 255.
    is_finite
        Whether all values are.
    """

    lowest: float
    highest: float
    black: float
    white: float
    is_finite: bool

    @classmethod
    def of(cls, sample: NDArray[Any]) -> _Span:
        values = sample.astype(np.float64).ravel()
        finite = values[np.isfinite(values)]
        if not finite.size:
            return cls(0.0, 0.0, 0.0, 1.0, False)
        low, high = np.percentile(finite, (_LOW, _HIGH))
        high = finite.max() if finite.max() <= high * _HOT else high
        black = 0.0 if low >= -_FEW * (high - low) else max(finite.min(), low - (_HOT - 1) * (high - low))
        whole = bool(np.issubdtype(sample.dtype, np.integer))
        white = high + _ROOM * (high - black) if black < 0 else _white_point(high, whole)
        white = white if white > black else black + 1
        is_finite = len(finite) == len(values)
        return cls(float(finite.min()), float(finite.max()), float(black), float(white), is_finite)


def _white_point(high: float, is_whole: bool) -> float:
    """The number that stands for white: that of a bit depth where values come near it, else the highest of them."""
    points = _WHITE_POINTS if is_whole else (1, *_WHITE_POINTS)
    point = next((point for point in points if high <= point), np.inf)
    return float(point) if high > point / 2 else high * (1 + _ROOM)


def _conversion(span: _Span, image_key: str, image: str) -> str:
    """Lines of Python, ready to run where ``sdata`` is the user's object."""
    width = span.white - span.black
    # what was not scanned becomes white, as glass is
    missing = "" if span.is_finite else f".fillna({span.white:.9g})"
    pixels = f"image.astype('float32'){missing}.data"
    if span.black:
        pixels = f"({pixels} + {-span.black:.9g})"
    return (
        "import spatialdata as sd\n"
        f"image = {image}\n"
        f"sdata[{image_key + '_uint8'!r}] = sd.models.Image2DModel.parse(\n"
        f"    ({pixels}.clip(0, {width:.9g}) * {255 / width!r}).round().astype('uint8'),\n"
        "    c_coords=image.c.values, scale_factors=[2, 2, 2],\n"
        f"    transformations=sd.transformations.get_transformation(sdata[{image_key!r}], get_all=True))\n"
        f"# if the object is backed: sdata.write_element({image_key + '_uint8'!r})"
    )
