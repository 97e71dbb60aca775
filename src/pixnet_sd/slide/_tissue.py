"""Where on a slide there is tissue, so that empty glass is not predicted."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt, label
from skimage.color import rgb2gray
from skimage.filters import threshold_otsu

from ._picture import read_picture
from ._slide import MAP_STRIDE, Slide

__all__ = ["tissue_mask"]

_OVERVIEW_MPP = 8.0  # coarse enough that nuclei and the gaps between cells melt together
_OVERVIEW_MAX_PX = 4e6
_OVERVIEW_MIN_SIDE_PX = 32
_GRAIN_UM = 50.0  # Otsu's class in pieces smaller than this square is noise of the glass
_BRIDGE_UM = 75.0  # radius of the closing: fat and loose stroma are threads of tissue with glass showing between them
_SPECK_UM = 100.0  # what is smaller than this square after the closing is dust
_HOLE_UM = 400.0  # and holes smaller than this one are lumina and fat
_MAX_BRIDGE, _MAX_PIECE = 0.05, 0.01  # of the picture's short side and area, for pictures of less than a millimetre
_GLASS_MIN_VALUE, _GLASS_MAX_SATURATION = 170.0, 0.15  # glass is bright and grey: white point 200 and up, on scanners
_MIN_CONTRAST = 12.0  # grey levels; two classes closer than this are one class and its noise


def tissue_mask(slide: Slide) -> np.ndarray:
    """Tissue of a slide on the map grid.

    Otsu's threshold on an overview of about 8 µm/px, then two questions that a threshold cannot answer, since it always
    finds two classes: are they different at all, and is the brighter one glass? The outline is drawn generously, so
    that pale tissue is not lost: gaps below 0.15 mm are closed and holes below 0.16 mm² filled; pieces below 0.01 mm²
    are left out. Black pixels count as glass: they are parts that were not scanned.

    Parameters
    ----------
    slide
        The slide.

    Returns
    -------
    (map height, map width) bool. All False for a blank slide, all True for one without glass.
    """
    overview = _read_overview(slide.at(_overview_mpp(slide)))
    return _on_map_grid(_overview_tissue(overview, _overview_mpp(slide)), slide)


def _overview_mpp(slide: Slide) -> float:
    """µm per overview pixel: 8, finer for a tiny image, coarser for a huge one, never finer than the working px."""
    sides_um = (slide.height_px * slide.mpp, slide.width_px * slide.mpp)
    finest = math.sqrt(sides_um[0] * sides_um[1] / _OVERVIEW_MAX_PX)
    return max(min(_OVERVIEW_MPP, min(sides_um) / _OVERVIEW_MIN_SIDE_PX), finest, slide.working_mpp)


def _read_overview(slide: Slide) -> np.ndarray:
    height, width = slide.working_shape
    return read_picture(slide, 0, height, 0, width)


def _overview_tissue(picture: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w, 3) uint8 -> (h, w) bool."""
    not_scanned = picture.max(axis=-1) == 0
    picture = np.where(not_scanned[..., None], np.uint8(255), picture)
    dark = _otsu(picture, mpp) & ~not_scanned
    glass = ~dark & ~not_scanned
    if _is_one_class(picture, dark, glass):
        is_blank = not_scanned.all() or _is_glass(picture[~not_scanned])
        return np.zeros_like(dark) if is_blank else ~not_scanned
    return _outline(dark, mpp) & ~not_scanned if _is_glass(picture[glass]) else ~not_scanned


def _otsu(picture: np.ndarray, mpp: float) -> np.ndarray:
    """The darker of two classes of grey levels, without grains."""
    grey = rgb2gray(picture)
    dark = grey <= threshold_otsu(grey)  # type: ignore[no-untyped-call]
    return _without_small(dark, min(_MAX_PIECE * grey.size, (_GRAIN_UM / mpp) ** 2))


def _is_one_class(picture: np.ndarray, dark: np.ndarray, bright: np.ndarray) -> bool:
    if not dark.any() or not bright.any():
        return True
    return bool(np.abs(np.median(picture[bright], axis=0) - np.median(picture[dark], axis=0)).max() < _MIN_CONTRAST)


def _is_glass(pixels: np.ndarray) -> bool:
    """Whether the typical of (n, 3) pixels is bright and nearly grey."""
    colour = np.median(pixels, axis=0)
    return bool(colour.max() >= _GLASS_MIN_VALUE and 1 - colour.min() / colour.max() <= _GLASS_MAX_SATURATION)


def _outline(dark: np.ndarray, mpp: float) -> np.ndarray:
    """Close gaps, fill holes, drop specks."""
    tissue = _closed(dark, min(_BRIDGE_UM / mpp, _MAX_BRIDGE * min(dark.shape)))
    hole, speck = (min(_MAX_PIECE * dark.size, (side / mpp) ** 2) for side in (_HOLE_UM, _SPECK_UM))
    return _without_small(~_without_small(~tissue, hole), speck)


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    """Morphological closing by a disk, through distances: its cost does not grow with the radius."""
    margin = int(radius) + 1
    grown = distance_transform_edt(~np.pad(mask, margin)) <= radius
    closed = distance_transform_edt(grown) > radius
    return mask | closed[margin:-margin, margin:-margin]


def _without_small(mask: np.ndarray, n_px: float) -> np.ndarray:
    """Leave out the connected pieces of fewer than ``n_px`` pixels."""
    pieces, _ = label(mask)
    large = np.bincount(pieces.ravel()) >= n_px
    return mask & large[pieces]


def _on_map_grid(overview: np.ndarray, slide: Slide) -> np.ndarray:
    """Value of the overview pixel in which each map pixel's centre lies."""
    ratio = MAP_STRIDE * slide.working_mpp / _overview_mpp(slide)
    rows, cols = (
        np.minimum(((np.arange(n) + 0.5) * ratio).astype(np.int64), size - 1)
        for n, size in zip(slide.map_shape, overview.shape, strict=True)
    )
    return overview[rows[:, None], cols]
