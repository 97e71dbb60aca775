"""A slide image as the network sees it: one resolution, any box of it, whatever the store looks like; its tissue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label
from skimage.color import rgb2gray
from skimage.filters import threshold_otsu
from spatialdata import SpatialData

from pixnet_sd._util import logger
from pixnet_sd.geometry import MAP_STRIDE

from ._find import find_mpp, named_as_bins, select_coordinate_system, select_image
from .elements import affine_matrix, bin_lattice, coordinate_systems
from .image import HUGE_BLOCK_PX, ImagePyramid, loaded_px, make_taps, resample

_WHITE = 255
_READ_PX = 4096  # side of the boxes that `read_picture` reads at once, in pixels of the level they come from


@dataclass(frozen=True, eq=False)
class Slide:
    """One H&E image, to be read at ``working_mpp`` as if stored so, by any thread; pickles, backed without its pixels.

    Three frames, all (x, y) with pixel i covering [i, i + 1): *image px*, of the element's scale 0; *working px*,
    ``image px * mpp / working_mpp``; and the coordinate system.
    """

    image_key: str
    coordinate_system: str  # in which other elements meet the image
    mpp: float  # µm per image px
    mpp_rule: str  # a phrase on where that comes from
    working_mpp: float  # µm per working px
    height_px: int  # of the image
    width_px: int
    to_system: NDArray[np.float64]  # (3, 3), image px (x, y, 1) to the coordinate system
    pyramid: ImagePyramid
    channels: tuple[str, ...] = ()  # names of those taken as red, green and blue
    name: str = ""  # among several slides

    @property
    def working_scale(self) -> float:
        """Image px per working px."""
        return self.working_mpp / self.mpp

    @property
    def working_shape(self) -> tuple[int, int]:
        """(height, width) in working px, the last of each possibly only in part inside the image."""
        scale = self.working_scale
        return math.ceil(self.height_px / scale - 1e-6), math.ceil(self.width_px / scale - 1e-6)

    @property
    def map_shape(self) -> tuple[int, int]:
        """(height, width) of the map grid: map px (i, j) covers working rows [4i, 4i + 4), columns [4j, 4j + 4)."""
        height, width = self.working_shape
        return -(-height // MAP_STRIDE), -(-width // MAP_STRIDE)

    @property
    def system_from_working(self) -> NDArray[np.float64]:
        """(3, 3), working px (x, y, 1) to the coordinate system."""
        return self.to_system @ np.diag([self.working_scale, self.working_scale, 1.0])

    @property
    def working_from_system(self) -> NDArray[np.float64]:
        """(3, 3), the coordinate system (x, y, 1) to working px."""
        return np.asarray(np.linalg.inv(self.system_from_working), np.float64)

    def taken(self) -> str:
        """One line on which image was taken, of which resolution, and where."""
        return (
            f"Image {self.image_key!r} ({self.height_px:,} x {self.width_px:,} px; {', '.join(self.channels)}) in "
            f"coordinate system {self.coordinate_system!r}: {self.mpp:.6g} µm per pixel, from the {self.mpp_rule}."
        )

    def at(self, working_mpp: float) -> Slide:
        """The same slide at another resolution, µm per working px."""
        return replace(self, working_mpp=working_mpp)

    def named(self, name: str) -> Slide:
        """The same slide with a name among several."""
        return replace(self, name=name)

    def read(self, row0: int, row1: int, col0: int, col1: int) -> NDArray[np.uint8]:
        """Pixels of a box in working px, (h, w, 3), white outside the slide, the same in every box that holds it."""
        height, width = self.working_shape
        top, bottom, left, right = max(row0, 0), min(row1, height), max(col0, 0), min(col1, width)
        if top >= bottom or left >= right:
            return np.full((row1 - row0, col1 - col0, 3), _WHITE, np.uint8)
        level = self.pyramid.level_for(self.working_scale)
        rows, cols = (
            make_taps(start, stop, self.working_scale / scale, size, origin / scale)
            for start, stop, scale, size, origin in zip(
                (top, left), (bottom, right), level.scale, level.shape, level.origin, strict=True
            )
        )
        inside = resample(level.read(rows.start, rows.stop, cols.start, cols.stop), rows, cols)
        margins = (top - row0, row1 - bottom), (left - col0, col1 - right), (0, 0)
        return np.pad(inside, margins, constant_values=_WHITE) if np.any(margins) else inside


def open_slide(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
    working_mpp: float = 0.5,
    element_key: str | None = None,
    region_keys: Sequence[str] = (),
) -> Slide:
    """Find the slide image, as `select_image`, `select_coordinate_system` and `find_mpp` do, and open it."""
    image_key = select_image(sdata, image_key=image_key, coordinate_system=coordinate_system)
    aligned = list(region_keys)
    if not aligned and mpp is None and len(coordinate_systems(sdata.images[image_key])) > 1:
        # bins will tell µm per pixel, so that these too have to lie on the image in one way only
        aligned = [key for key in named_as_bins(sdata) if bin_lattice(sdata, key) is not None]
    coordinate_system = select_coordinate_system(
        sdata, image_key=image_key, element_key=element_key, region_keys=aligned, coordinate_system=coordinate_system
    )
    place = {"image_key": image_key, "coordinate_system": coordinate_system}
    meant = [key for key in (*region_keys, element_key) if key is not None]
    mpp, rule = find_mpp(sdata, **place, mpp=mpp, allow_any_mpp=allow_any_mpp, region_keys=meant)
    slide = slide_at(sdata, **place, mpp=mpp, mpp_rule=rule, working_mpp=working_mpp)
    logger.info("%s", slide.taken())
    _warn_if_poor(slide)
    return slide


def slide_at(
    sdata: SpatialData, *, image_key: str, coordinate_system: str, mpp: float, working_mpp: float, mpp_rule: str = ""
) -> Slide:
    """Make an image readable of which all is known; parameters and errors as of `open_slide`."""
    element = sdata.images[image_key]
    pyramid = ImagePyramid.of(element, image_key)
    return Slide(
        *(image_key, coordinate_system, mpp, mpp_rule, working_mpp, *pyramid.levels[0].shape),
        to_system=affine_matrix(element, coordinate_system),
        pyramid=pyramid,
        channels=pyramid.channels,
    )


def _warn_if_poor(slide: Slide) -> None:
    if slide.mpp > slide.working_mpp * (1 + 1e-3):
        logger.warning(
            "image %r has %.4g µm/px and is enlarged to the working %.4g µm/px: detail finer than its pixels is not "
            "there. If a larger image of the slide exists, give image_key=, or set working_mpp=%.2g.",
            *(slide.image_key, slide.mpp, slide.working_mpp, slide.mpp),
        )
    n_px = loaded_px(slide.pyramid.level_for(slide.working_scale).pixels.data)
    if n_px > HUGE_BLOCK_PX:
        remedy = (
            "parse it anew with Image2DModel.parse(..., chunks=(3, 1024, 1024)) and write it"
            if slide.pyramid.is_backed
            else "write the object first (sdata.write(path)) and go on with spatialdata.read_zarr(path)"
        )
        logger.warning(
            "every tile of image %r loads a block of about %.0f million pixels, which is slow: %s.",
            *(slide.image_key, n_px / 1e6, remedy),
        )


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
    """Tissue of a slide on the map grid, bool: all False for a blank slide, all True for one without glass.

    Otsu's threshold on an overview of about 8 µm/px always finds two classes: are they different at all, and is the
    brighter one glass? Black pixels, which were not scanned, count as glass. The outline keeps pale tissue: gaps below
    0.15 mm are closed, holes below 0.16 mm² filled, pieces below 0.01 mm² left out.
    """
    sides_um = (slide.height_px * slide.mpp, slide.width_px * slide.mpp)
    finest = math.sqrt(sides_um[0] * sides_um[1] / _OVERVIEW_MAX_PX)
    mpp = max(min(_OVERVIEW_MPP, min(sides_um) / _OVERVIEW_MIN_SIDE_PX), finest, slide.working_mpp)
    coarse = slide.at(mpp)
    height, width = coarse.working_shape
    overview = _overview_tissue(read_picture(coarse, 0, height, 0, width), mpp)
    ratio = MAP_STRIDE * slide.working_mpp / mpp  # a map pixel has the value of where its centre lies
    rows, cols = (
        np.minimum(((np.arange(n) + 0.5) * ratio).astype(np.int64), size - 1)
        for n, size in zip(slide.map_shape, overview.shape, strict=True)
    )
    return overview[rows[:, None], cols]


def _overview_tissue(picture: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w, 3) uint8 -> (h, w) bool."""
    scanned = picture.max(axis=-1) > 0
    picture = np.where(scanned[..., None], picture, np.uint8(255))
    grey = rgb2gray(picture)
    darker = grey <= threshold_otsu(grey)  # type: ignore[no-untyped-call]
    dark = _without_small(darker, min(_MAX_PIECE * grey.size, (_GRAIN_UM / mpp) ** 2)) & scanned
    bright = scanned & ~dark
    colours = [np.median(picture[part], axis=0) for part in (bright, dark) if part.any()]
    is_one_class = len(colours) < 2 or np.abs(colours[0] - colours[1]).max() < _MIN_CONTRAST
    glass = scanned if is_one_class else bright
    if not glass.any() or not _is_glass(picture[glass]):
        return scanned
    return np.zeros_like(dark) if is_one_class else _outline(dark, mpp) & scanned


def _is_glass(pixels: np.ndarray) -> bool:
    """Whether the typical of (n, 3) pixels is bright and nearly grey."""
    colour = np.median(pixels, axis=0)
    return bool(colour.max() >= _GLASS_MIN_VALUE and 1 - colour.min() / colour.max() <= _GLASS_MAX_SATURATION)


def _outline(dark: np.ndarray, mpp: float) -> np.ndarray:
    """Close gaps by a disk, through distances, of which the cost does not grow with it; fill holes, drop specks."""
    radius = min(_BRIDGE_UM / mpp, _MAX_BRIDGE * min(dark.shape))
    margin = int(radius) + 1
    grown = distance_transform_edt(~np.pad(dark, margin)) <= radius
    tissue = dark | (distance_transform_edt(grown) > radius)[margin:-margin, margin:-margin]
    hole, speck = (min(_MAX_PIECE * dark.size, (side / mpp) ** 2) for side in (_HOLE_UM, _SPECK_UM))
    return _without_small(~_without_small(~tissue, hole), speck)


def _without_small(mask: np.ndarray, n_px: float) -> np.ndarray:
    """Leave out the connected pieces of fewer than ``n_px`` pixels."""
    pieces, _ = label(mask)
    large = np.bincount(pieces.ravel()) >= n_px
    return mask & large[pieces]
