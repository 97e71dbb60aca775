"""Micrometres per unit of a coordinate system, measured on elements whose size is known: bins and Visium spots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from pixnet_sd._errors import ResolutionError
from pixnet_sd._logging import logger

from ._elements import coordinate_systems, written_by_pixnet
from ._ids import check_unique
from ._lattice import pitch_of_element
from ._shapes import edge_length
from ._stored_shapes import StoredShapes, sample_positions, shapes_of
from ._tables import bin_size_um
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["um_per_unit"]

_PITCH_TOLERANCE = 0.05
_SPOT_PITCH_UM = 100.0
# A Visium spot is 55 µm wide; Space Ranger writes the diameter of a 65 µm one (89.5 px at a pitch of 138 px).
_SPOT_DIAMETERS_UM = (55.0, 65.0)
_SPOT_RATIO_TOLERANCE = 0.04
_MOST_SPOTS = 50_000  # a capture area of 11 mm has 14,336
_HEX_NEIGHBOURS = 5  # at one distance on a hexagonal lattice, also along its straight edges; 4 on a square one


def um_per_unit(sdata: SpatialData, coordinate_system: str) -> tuple[float, str] | None:
    """Micrometres per unit of a coordinate system, from Visium HD bins (the coarsest that will do) or Visium spots.

    Parameters
    ----------
    sdata
        The object to look in.
    coordinate_system
        The coordinate system to measure.

    Returns
    -------
    The size and a phrase that says how it was had; None if nothing of known size is there.
    """
    for key, size in _bins(sdata, coordinate_system):
        if key not in sdata.labels:
            shapes = shapes_of(sdata)[key]
            check_unique((shapes.sample if isinstance(shapes, StoredShapes) else shapes).index, f"Shapes {key!r}")
        try:
            return _from_bins(sdata, key, size, coordinate_system)
        except ValueError as error:  # ours, and what squidpy raises
            logger.info("No pitch from bins %r: %s", key, error)
    for key, shapes in shapes_of(sdata).items():
        if coordinate_system in coordinate_systems(shapes) and _is_visium(shapes):
            value = _neighbour_pitch_um(sdata, key, _SPOT_PITCH_UM, coordinate_system)
            return value, f"100 µm pitch of Visium spots {key!r}"
    return None


def _bins(sdata: SpatialData, coordinate_system: str) -> Iterator[tuple[str, int]]:
    """Elements named as Visium HD bins with their bin size, coarsest first, labels last of one size."""
    own = written_by_pixnet(sdata)
    elements = {**shapes_of(sdata), **sdata.labels}
    sizes = {key: bin_size_um(key) for key in elements if key not in own}
    found = [(key, size) for key, size in sizes.items() if size and _placed(elements[key], coordinate_system)]
    return iter(sorted(found, key=lambda item: (-item[1], item[0])))


def _placed(element: Any, coordinate_system: str) -> bool:
    return coordinate_system in coordinate_systems(element)


def _from_bins(sdata: SpatialData, key: str, size: int, coordinate_system: str) -> tuple[float, str]:
    if key in sdata.labels:
        if not key.endswith("_labels"):
            raise ResolutionError(f"{key!r} is not named as rasterized bins are.")
        scale = similarity_scale(affine_matrix(sdata.labels[key], coordinate_system), f"labels {key!r}")
        return size / scale, f"{size} µm label pixels of {key!r}"
    shapes = shapes_of(sdata)[key]
    scale = similarity_scale(affine_matrix(shapes, coordinate_system), f"shapes {key!r}")
    pitch = pitch_of_element(sdata, key)
    if pitch is not None:
        return size / (pitch * scale), f"lattice pitch of the {size} µm bins {key!r}"
    if isinstance(shapes, StoredShapes):
        return size / (edge_length(shapes.sample) * scale), f"edge length of the {size} µm bins {key!r}"
    value = _neighbour_pitch_um(sdata, key, size, coordinate_system)
    edge = size / (edge_length(shapes) * scale)
    if abs(value / edge - 1) > _PITCH_TOLERANCE:  # bins touch: where the nearest is further off, most are missing
        return edge, f"edge length of the {size} µm bins {key!r} (too few neighbours for a pitch)"
    return value, f"neighbour distance of the {size} µm bins {key!r}"


def _neighbour_pitch_um(sdata: SpatialData, key: str, um: float, coordinate_system: str) -> float:
    from spatialdata import SpatialData
    from squidpy.experimental.utils import derive_mpp_from_shapes

    shapes = shapes_of(sdata)[key]
    if isinstance(shapes, StoredShapes):
        sdata = SpatialData(shapes={key: shapes.load()})
    return float(derive_mpp_from_shapes(sdata, key, coordinate_system, um_between_centers=um))


def _is_visium(shapes: GeoDataFrame | StoredShapes) -> bool:
    """Whether circles lie on a hexagonal lattice with the pitch and width of Visium spots."""
    from scipy.spatial import cKDTree

    if isinstance(shapes, StoredShapes):
        if len(shapes) > _MOST_SPOTS:
            return False
        shapes = shapes.load()

    geometry = shapes.geometry.to_numpy()
    if "radius" not in shapes or len(shapes) <= _HEX_NEIGHBOURS or not (shapely.get_type_id(geometry) == 0).all():
        return False
    xy = shapely.get_coordinates(geometry)
    distance = np.median(cKDTree(xy).query(xy[sample_positions(len(xy))], k=_HEX_NEIGHBOURS + 1)[0][:, 1:], axis=0)
    ratio = distance[0] / (2 * float(np.median(shapes["radius"])))
    widths = (abs(ratio * width / _SPOT_PITCH_UM - 1) < _SPOT_RATIO_TOLERANCE for width in _SPOT_DIAMETERS_UM)
    return bool(any(widths) and distance[-1] < 1.2 * distance[0])
