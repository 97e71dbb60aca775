"""Whether regions lie on the slide they are said to lie on.

Shapes and labels elements as regions in the pixels of a slide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import ResolutionError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons, Regions

from ._elements import affine_matrix, region_element, similarity_scale
from ._lattice import bins_of_element
from ._shapes import label_ids, plain_ids, regions_from_labels, regions_from_shapes
from ._stored import StoredShapes

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["check_regions_on_image", "regions_of"]

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


_MANY = 1_000_000


def regions_of(
    sdata: SpatialData, element_key: str, *, coordinate_system: str, from_system: ArrayLike
) -> tuple[Lattice | Circles | Polygons | LabelGrid, pd.Index]:
    """Regions of a shapes or labels element, in the pixels of a slide.

    Bins of which a table in the object or its store tells the lattice (``array_row``, ``array_col``) are the turned
    squares of that lattice, however they are drawn, in row-major order of the lattice. Everything else is taken as
    drawn, in its own order.

    Parameters
    ----------
    sdata
        The object to look in; of what only the store behind it has, bins are not loaded, everything else is.
    element_key
        Name of the element.
    coordinate_system
        Coordinate system that the element shares with the slide.
    from_system
        Map of (x, y, 1) from there to the pixels wanted, shape (3, 3); `Slide.working_from_system` for working pixels.

    Returns
    -------
    The regions, and their instance ids in the same order: the index of shapes, the values of labels.

    Raises
    ------
    ElementError
        If there is no such element, or it is not in the coordinate system.
    ResolutionError
        If it gets there by anything but a similarity.
    DataError
        If it is empty, or its geometries or ids cannot be used.
    """
    element = region_element(sdata, element_key)
    to_system = affine_matrix(element, coordinate_system)
    similarity_scale(to_system, f"element {element_key!r}")
    is_labels = element_key in sdata.labels
    drawn = label_ids(sdata, element_key) if is_labels else element.index
    ids = plain_ids(drawn, "Labels" if is_labels else "Shapes", element_key)
    bins = bins_of_element(sdata, element_key, ids, coordinate_system=coordinate_system, from_system=from_system)
    if bins is not None:
        return bins.lattice, bins.instances
    if is_labels:
        return regions_from_labels(sdata, element_key, ids, coordinate_system).transform(from_system), ids
    if len(element) > _MANY:
        logger.warning(
            "shapes %r: %.1f million shapes are taken as polygons, which takes gigabytes; no table has the "
            "array_row and array_col that would tell their lattice.",
            *(element_key, len(element) / 1e6),
        )
    shapes = element.load() if isinstance(element, StoredShapes) else element
    regions = regions_from_shapes(shapes, f"Shapes {element_key!r}")
    return regions.transform(np.asarray(from_system, dtype=np.float64) @ to_system), ids
