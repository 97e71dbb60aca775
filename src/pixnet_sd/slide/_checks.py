"""Whether regions lie on the slide they are said to lie on."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import ResolutionError

__all__ = ["check_regions_on_image"]

_MOSTLY = 0.5
_NEARLY_ALL = 0.9


def check_regions_on_image(bounds: NDArray[np.float64], *, width: int, height: int, what: str) -> NDArray[np.bool_]:
    """Refuse regions that miss the image, and regions whose axes were swapped; warn when part of them is off it.

    Parameters
    ----------
    bounds
        Boxes of the regions, shape (n, 4): xmin, ymin, xmax, ymax in px of the image.
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
    inside = _share_inside(bounds, width, height)
    swapped = _share_inside(bounds[:, [1, 0, 3, 2]], width, height)
    if inside < _MOSTLY and swapped > _NEARLY_ALL:
        raise ResolutionError(
            f"{what}: {1 - inside:.0%} of {len(bounds)} regions lie outside the image, but {swapped:.0%} would lie "
            "inside with x and y swapped. Geometry is (x, y), x to the right along columns: swap the coordinates or "
            f"correct the transformation. {_extents(bounds, width, height)}"
        )
    touches = (bounds[:, :2] < (width, height)).all(axis=1) & (bounds[:, 2:] > 0).all(axis=1)
    if not touches.any():
        raise ResolutionError(
            f"{what}: none of {len(bounds)} regions touches the image. {_extents(bounds, width, height)} Check "
            "coordinate_system=, image_key=, and the transformations of both."
        )
    off = int((~touches).sum())
    if off:
        message = f"{what}: {off} of {len(bounds)} regions lie wholly outside the image."
        warnings.warn(message, UserWarning, stacklevel=3)
    return np.asarray(touches)


def _share_inside(bounds: NDArray[np.float64], width: int, height: int) -> float:
    centre = (bounds[:, :2] + bounds[:, 2:]) / 2
    return float(((centre >= 0) & (centre <= (width, height))).all(axis=1).mean())


def _extents(bounds: NDArray[np.float64], width: int, height: int) -> str:
    x0, y0 = bounds[:, :2].min(axis=0)
    x1, y1 = bounds[:, 2:].max(axis=0)
    return (
        f"Regions span x {x0:.0f} to {x1:.0f} and y {y0:.0f} to {y1:.0f}, the image x 0 to {width} and y 0 to "
        f"{height}, in working pixels."
    )
