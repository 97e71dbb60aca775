"""Shapes and labels elements as regions in the pixels of a slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pixnet_sd._errors import DataError
from pixnet_sd.nn.regions import Circles, LabelGrid, Polygons

from ._elements import region_element
from ._labels import regions_from_labels
from ._shapes import regions_from_shapes
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["regions_of"]


def regions_of(
    sdata: SpatialData, element_key: str, *, coordinate_system: str, from_system: ArrayLike
) -> tuple[Circles | Polygons | LabelGrid, pd.Index]:
    """Regions of a shapes or labels element, in the pixels of a slide.

    Parameters
    ----------
    sdata
        The object to look in.
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
    if element_key in sdata.labels:
        labels, ids = regions_from_labels(sdata, element_key, coordinate_system)
        return labels.transform(from_system), ids
    twice = element.index.duplicated()
    if twice.any():
        raise DataError(
            f"Shapes {element_key!r}: {int(twice.sum())} of {len(element)} ids occurred before (first "
            f"{element.index[twice].tolist()[0]!r}), so rows of a table cannot be matched. Make the index unique."
        )
    shapes = regions_from_shapes(element, f"Shapes {element_key!r}")
    return shapes.transform(np.asarray(from_system, dtype=np.float64) @ to_system), pd.Index(element.index)
