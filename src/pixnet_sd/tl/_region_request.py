"""Which regions a call of `predict` asks for, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._errors import ElementError, PixNetError
from pixnet_sd._logging import logger
from pixnet_sd.nn.regions import Circles, Regions, squares
from pixnet_sd.slide import MAP_STRIDE, Slide, check_regions_on_image, regions_of
from pixnet_sd.store import circles_element, image_transforms, squares_element

__all__ = ["RegionRequest", "request_regions"]


@dataclass(frozen=True)
class RegionRequest:
    """Regions to predict.

    Attributes
    ----------
    table_key
        Name of the table to be.
    element_key
        Element that it will annotate.
    element
        That element, when it has to be made; None for one that is there.
    regions
        In working pixels.
    ids
        Instance id of each region.
    diameter_um
        At which a region is drawn: a circle's diameter, a bin's side, else that of a disk of the median area.
    """

    table_key: str
    element_key: str
    element: Any | None
    regions: Regions
    ids: pd.Index
    diameter_um: float

    def centres_px(self, slide: Slide) -> NDArray[np.float64]:
        """Centres in pixels of the image's scale 0, (n, 2)."""
        return self.regions.centre_xy * slide.working_scale

    def area_um2(self, slide: Slide) -> NDArray[np.float64]:
        """Areas, µm²."""
        return self.regions.area * slide.working_mpp**2


def request_regions(
    sdata: SpatialData,
    slide: Slide,
    tissue: NDArray[np.bool_],
    *,
    radius_um: float | None,
    spacing_um: float | None,
    bin_um: float | None,
    shapes_key: str | None,
    key_added: str,
) -> RegionRequest | None:
    """Turn the arguments of :func:`pixnet_sd.tl.predict` into regions.

    Returns
    -------
    The regions, or None when none are asked for.

    Raises
    ------
    PixNetError
        Arguments that do not go together, or that give no region.
    """
    _check_arguments(radius_um, spacing_um, bin_um, shapes_key)
    if shapes_key is not None:
        return _at_shapes(sdata, slide, shapes_key, radius_um, key_added)
    if radius_um is not None:
        spacing = spacing_um if spacing_um is not None else 2 * radius_um
        centres = _grid_on_tissue(slide, tissue, spacing, f"radius_um={radius_um:g}, spacing_um={spacing:g}")
        return _circles(sdata, slide, centres, radius_um, f"{key_added}_circles_{radius_um:g}um", None)
    if bin_um is not None:
        centres = _grid_on_tissue(slide, tissue, bin_um, f"bin_um={bin_um:g}")
        return _bins(sdata, slide, centres, bin_um, f"{key_added}_bins_{bin_um:g}um")
    return None


def _check_arguments(
    radius_um: float | None, spacing_um: float | None, bin_um: float | None, shapes_key: str | None
) -> None:
    for name, value in (("radius_um", radius_um), ("spacing_um", spacing_um), ("bin_um", bin_um)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise PixNetError(f"{name}={value}: a positive number of micrometres is needed.")
    if bin_um is not None and (radius_um is not None or shapes_key is not None):
        raise PixNetError("bin_um asks for bins over the tissue: leave out radius_um and shapes_key, or call twice.")
    if spacing_um is not None and (radius_um is None or shapes_key is not None):
        raise PixNetError("spacing_um is the pitch of a grid of circles: give it with radius_um, without shapes_key.")


def _grid_on_tissue(slide: Slide, tissue: NDArray[np.bool_], pitch_um: float, what: str) -> NDArray[np.float64]:
    """Centres, working pixels, of a square grid over the slide that lie on tissue."""
    pitch = pitch_um / slide.working_mpp
    height, width = slide.working_shape
    x, y = np.meshgrid(np.arange(pitch / 2, width, pitch), np.arange(pitch / 2, height, pitch))
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    cell = np.floor(centres / MAP_STRIDE).astype(np.int64)
    centres = centres[tissue[cell[:, 1], cell[:, 0]]]
    if not len(centres):
        raise PixNetError(
            f"{what} gives no region: the slide is {width * slide.working_mpp:.0f} x {height * slide.working_mpp:.0f} "
            f"µm, of which {100 * tissue.mean():.1f} % was found to be tissue."
        )
    return np.asarray(centres)


def _circles(
    sdata: SpatialData,
    slide: Slide,
    centres: NDArray[np.float64],
    radius_um: float,
    key: str,
    ids: pd.Index | None,
) -> RegionRequest:
    index = pd.RangeIndex(len(centres)) if ids is None else ids
    element = circles_element(
        centres * slide.working_scale,
        radius_um / slide.mpp,
        image_transforms(sdata, slide.image_key),
        index=list(index),
    )
    regions = Circles(centres, np.full(len(centres), radius_um / slide.working_mpp))
    return RegionRequest(key, f"{key}_shapes", element, regions, index, 2 * radius_um)


def _bins(sdata: SpatialData, slide: Slide, centres: NDArray[np.float64], bin_um: float, key: str) -> RegionRequest:
    transforms = image_transforms(sdata, slide.image_key)
    element = squares_element(centres * slide.working_scale, bin_um / slide.mpp, transforms)
    regions = squares(centres, bin_um / slide.working_mpp)
    return RegionRequest(key, f"{key}_shapes", element, regions, pd.RangeIndex(len(centres)), bin_um)


def _at_shapes(
    sdata: SpatialData, slide: Slide, shapes_key: str, radius_um: float | None, key_added: str
) -> RegionRequest:
    if shapes_key not in sdata.shapes and shapes_key not in sdata.labels:
        there = ", ".join(repr(k) for k in (*sdata.shapes, *sdata.labels)) or "none"
        raise ElementError(f"There is no shapes or labels element {shapes_key!r}. There are: {there}.")
    regions, ids = regions_of(
        sdata, shapes_key, coordinate_system=slide.coordinate_system, from_system=slide.working_from_system
    )
    height, width = slide.working_shape
    keep = check_regions_on_image(regions.bounds, width=width, height=height, what=f"Element {shapes_key!r}")
    if not keep.all():
        n_off, n = int((~keep).sum()), len(keep)
        logger.warning("%d of %d regions of %r lie off the image and are left out", n_off, n, shapes_key)
        regions, ids = regions.subset(np.flatnonzero(keep)), ids[keep]
    key = f"{key_added}_{shapes_key}"
    if radius_um is not None:
        return _circles(sdata, slide, regions.centre_xy, radius_um, f"{key}_circles_{radius_um:g}um", ids)
    diameter_um = 2 * float(np.sqrt(np.median(regions.area) / np.pi)) * slide.working_mpp
    return RegionRequest(key, shapes_key, None, regions, ids, diameter_um)
