"""Shapes and labels elements as regions in the pixels of a slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pixnet_sd._logging import logger
from pixnet_sd.nn.lattice import Lattice
from pixnet_sd.nn.regions import Circles, LabelGrid, Polygons

from ._elements import region_element
from ._ids import plain_ids
from ._labels import label_ids, regions_from_labels
from ._lattice import bins_of_element
from ._shapes import regions_from_shapes
from ._stored_shapes import StoredShapes
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["regions_of"]

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
