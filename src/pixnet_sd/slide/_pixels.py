"""Which pixels the network takes: RGB of 8 bits, and for others the lines that make them so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger

__all__ = ["check_uint8", "rgb_channels"]

_INITIALS = ("r", "g", "b")


def rgb_channels(names: Sequence[object], image_key: str) -> tuple[int, int, int]:
    """Positions of red, green and blue among an image's channels.

    Three channels are taken as RGB, reordered when they are named otherwise (``"b", "g", "r"``). Of four channels
    named red, green, blue and alpha the alpha is dropped, without compositing: scanners write it fully opaque.

    Parameters
    ----------
    names
        Channel names in stored order, numbers when the image has none.
    image_key
        Name of the image element, for messages.

    Returns
    -------
    Positions of the red, green and blue channels.

    Raises
    ------
    DataError
        One channel, two, more than four, or four that are not RGBA.
    """
    initials = [str(name)[:1].lower() for name in names]
    if len(names) == 3:
        named = sorted(initials) == sorted(_INITIALS)
        return _positions(initials) if named else (0, 1, 2)
    if len(names) == 4 and sorted(initials) == ["a", "b", "g", "r"]:
        logger.info("image %r is RGBA: its alpha channel is left out", image_key)
        return _positions(initials)
    raise DataError(
        f"image {image_key!r}: found {len(names)} channel(s) ({_shown(names)}), an RGB H&E image is needed. "
        "Give image_key= of the H&E image, or make an element of its three channels r, g, b "
        "(an RGBA image needs c_coords=['r', 'g', 'b', 'a'] to be known as one)."
    )


def _positions(initials: list[str]) -> tuple[int, int, int]:
    red, green, blue = (initials.index(initial) for initial in _INITIALS)
    return red, green, blue


def _shown(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:6])
    return shown + ", ..." if len(names) > 6 else shown


def check_uint8(dtype: np.dtype, sample: np.ndarray, image_key: str, *, is_multiscale: bool) -> None:
    """Refuse pixels that are not ``uint8``, with the lines that convert what was found.

    Parameters
    ----------
    dtype
        Type of the image's pixels.
    sample
        Some of its pixels; the highest decides which conversion is proposed. Not looked at for ``uint8``.
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
    highest = float(np.nanmax(sample)) if sample.size else 0.0
    image = f"sdata[{image_key!r}]" + ("['scale0'].image" if is_multiscale else "")
    raise DataError(
        f"image {image_key!r} has {dtype} pixels (up to {highest:g} in a sample), 0-255 uint8 are needed. Convert it "
        f"with these lines and give image_key={image_key + '_uint8'!r}:\n"
        + _conversion(dtype, highest, image_key, image)
    )


def _conversion(dtype: np.dtype, highest: float, image_key: str, image: str) -> str:
    """Lines of Python, ready to run where ``sdata`` is the user's object."""
    limits = (255, 4095, 65535) if np.issubdtype(dtype, np.integer) else (1, 255, 4095, 65535)
    limit = next((limit for limit in limits if highest <= limit), highest)
    return (
        "import spatialdata as sd\n"
        f"image = {image}\n"
        f"sdata[{image_key + '_uint8'!r}] = sd.models.Image2DModel.parse(\n"
        f"    (image.data.clip(0, {limit:g}) * {255 / limit!r}).round().astype('uint8'),\n"
        "    c_coords=image.c.values, scale_factors=[2, 2, 2],\n"
        f"    transformations=sd.transformations.get_transformation(sdata[{image_key!r}], get_all=True))"
    )
