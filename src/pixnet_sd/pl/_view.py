"""Which part of a slide is drawn, and how finely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pixnet_sd._errors import PixNetError
from pixnet_sd.slide import Slide

__all__ = ["View", "coarsest_level", "shifted", "view_of"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """A box of a slide, in µm from the image's top left corner, x to the right and y down.

    Attributes
    ----------
    x0, y0, x1, y1
        The box.
    um_per_px
        What a pixel of the screen spans; nothing finer is worth reading.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    um_per_px: float

    @property
    def width(self) -> float:
        """µm."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """µm."""
        return self.y1 - self.y0

    def bounds_in(self, to_um: ArrayLike) -> tuple[float, float, float, float]:
        """Box around the view in other coordinates: x0, y0, x1, y1.

        Parameters
        ----------
        to_um
            Map of (x, y, 1) from these to µm, shape (3, 3).
        """
        corners = np.array([[self.x0, self.x1, self.x1, self.x0], [self.y0, self.y0, self.y1, self.y1], [1.0] * 4])
        x, y, _ = np.linalg.inv(np.asarray(to_um, np.float64)) @ corners
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    def pixels_in(self, to_um: ArrayLike, shape: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a raster of some shape that the view touches; `to_um` as in `bounds_in`."""
        x0, y0, x1, y1 = self.bounds_in(to_um)
        rows, cols = (
            slice(min(max(math.floor(low + 1e-6), 0), size), max(min(math.ceil(high - 1e-6), size), 0))
            for low, high, size in ((y0, y1, shape[0]), (x0, x1, shape[1]))
        )
        return rows, cols


def view_of(slide: Slide, crop_um: Sequence[float] | None, shown_px: float, *, what: str = "the slide image") -> View:
    """The part of a slide that is asked for, clipped to the image.

    Parameters
    ----------
    slide
        The slide.
    crop_um
        x0, y0, x1, y1 in µm from the image's top left corner; None: all of it.
    shown_px
        Screen pixels along the longer side.
    what
        Name of the image, for messages.

    Raises
    ------
    PixNetError
        The crop misses the image.
    """
    width, height = slide.width_px * slide.mpp, slide.height_px * slide.mpp
    x0, y0, x1, y1 = (0.0, 0.0, width, height) if crop_um is None else crop_um
    left, top, right, bottom = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    if left >= right or top >= bottom:
        raise PixNetError(
            f"crop_um={tuple(crop_um or ())} misses {what}, which spans x 0 to {width:g} and y 0 to {height:g} µm."
        )
    return View(left, top, right, bottom, max(right - left, bottom - top) / shown_px)


def coarsest_level(pitches_um: Sequence[float], um_per_px: float) -> int:
    """Of levels, finest first, the coarsest that is no coarser than the screen; the finest if all are."""
    fine_enough = [k for k, pitch in enumerate(pitches_um) if pitch <= um_per_px * (1 + 1e-3)]
    return fine_enough[-1] if fine_enough else 0


def shifted(x: float, y: float) -> Matrix:
    """Map of (x, y, 1) that moves points."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
