"""Whether regions lie on the slide they are said to lie on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import ResolutionError
from pixnet_sd._warn import warn
from pixnet_sd.nn.regions import Regions

__all__ = ["check_regions_on_image"]

_MOSTLY = 0.5
_NEARLY_ALL = 0.9
_CHUNK = 2**17  # regions whose boxes are looked at in one go


def check_regions_on_image(
    regions: Regions | NDArray[np.float64], *, width: int, height: int, what: str
) -> NDArray[np.bool_]:
    """Refuse regions that miss the image, and regions whose axes were swapped; warn when part of them is off it.

    Parameters
    ----------
    regions
        Regions in px of the image, or their boxes, shape (n, 4): xmin, ymin, xmax, ymax. Boxes of millions of regions
        are made some at a time.
    width, height
        Size of the image, px.
    what
        Name of the regions, for messages.

    Returns
    -------
    Whether each region's box touches the image, shape (n,).

    Raises
    ------
    ResolutionError
        If no region touches the image, or most lie outside and would lie inside with x and y swapped.
    """
    n = len(regions)
    touches = np.zeros(n, bool)
    inside, swapped = 0.0, 0.0
    extent = np.array([np.inf, np.inf, -np.inf, -np.inf])
    for start, box in _boxes(regions):
        x0, y0, x1, y1 = np.ascontiguousarray(box.T)  # numpy reduces short rows slowly
        inside += _inside((x0 + x1) / 2, (y0 + y1) / 2, width, height) / n
        swapped += _inside((x0 + x1) / 2, (y0 + y1) / 2, height, width) / n
        touches[start : start + len(box)] = (x0 < width) & (y0 < height) & (x1 > 0) & (y1 > 0)
        extent[:2], extent[2:] = (
            np.minimum(extent[:2], [x0.min(), y0.min()]),
            np.maximum(extent[2:], [x1.max(), y1.max()]),
        )
    if inside < _MOSTLY and swapped > _NEARLY_ALL:
        raise ResolutionError(
            f"{what}: {1 - inside:.0%} of {n} regions lie outside the image, but {swapped:.0%} would lie "
            "inside with x and y swapped. Geometry is (x, y), x to the right along columns: swap the coordinates or "
            f"correct the transformation. {_extents(extent, width, height)}"
        )
    if not touches.any():
        raise ResolutionError(
            f"{what}: none of {n} regions touches the image. {_extents(extent, width, height)} Check "
            "coordinate_system=, image_key=, and the transformations of both."
        )
    off = int((~touches).sum())
    if off:
        message = f"{what}: {off} of {n} regions lie wholly outside the image."
        warn(message)
    return touches


def _inside(x: NDArray[np.float64], y: NDArray[np.float64], width: float, height: float) -> int:
    """How many points lie on an image."""
    return int(((x >= 0) & (x <= width) & (y >= 0) & (y <= height)).sum())


def _boxes(regions: Regions | NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    for start in range(0, len(regions), _CHUNK):
        part = np.arange(start, min(start + _CHUNK, len(regions)))
        if isinstance(regions, np.ndarray):
            yield start, regions[part]
        else:
            yield start, (regions if len(part) == len(regions) else regions.subset(part)).bounds


def _extents(extent: NDArray[np.float64], width: int, height: int) -> str:
    x0, y0, x1, y1 = extent
    return (
        f"Regions span x {x0:.0f} to {x1:.0f} and y {y0:.0f} to {y1:.0f}, the image x 0 to {width} and y 0 to "
        f"{height}, in working pixels."
    )
