"""Large boxes of a slide at a coarse resolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._slide import Slide

__all__ = ["read_picture"]

_READ_PX = 4096  # side of the boxes read at once, in pixels of the level they come from


def read_picture(slide: Slide, row0: int, row1: int, col0: int, col1: int) -> NDArray[np.uint8]:
    """As `Slide.read`, but box by box, so that memory does not grow with the level that the pixels come from."""
    picture = np.empty((row1 - row0, col1 - col0, 3), np.uint8)
    level_scale = min(slide.pyramid.level_for(slide.working_scale).scale)
    side = max(16, int(_READ_PX * level_scale / slide.working_scale))
    for row in range(row0, row1, side):
        for col in range(col0, col1, side):
            bottom, right = min(row + side, row1), min(col + side, col1)
            picture[row - row0 : bottom - row0, col - col0 : right - col0] = slide.read(row, bottom, col, right)
    return picture
