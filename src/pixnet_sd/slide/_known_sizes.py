"""Micrometres per unit of a coordinate system, measured on elements whose size is known: bins and Visium spots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pixnet_sd._errors import DataError, ElementError, ResolutionError
from pixnet_sd._logging import logger

from ._elements import coordinate_systems, written_by_pixnet
from ._tables import bin_size_um, table_link
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["lattice_pitch", "um_per_unit"]

_SAMPLE = 5000
_LATTICE_RESIDUAL = 0.1  # of the pitch: an index that does not explain the centres is not their lattice
_PITCH_TOLERANCE = 0.05
_SPOT_PITCH_UM = 100.0
# A Visium spot is 55 µm wide; Space Ranger writes the diameter of a 65 µm one (89.5 px at a pitch of 138 px).
_SPOT_DIAMETERS_UM = (55.0, 65.0)
_SPOT_RATIO_TOLERANCE = 0.04
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
        try:
            return _from_bins(sdata, key, size, coordinate_system)
        except ValueError as error:  # ours, and what squidpy raises
            logger.info("No pitch from bins %r: %s", key, error)
    for key in sdata.shapes:
        if coordinate_system in coordinate_systems(sdata.shapes[key]) and _is_visium(sdata.shapes[key]):
            value = _neighbour_pitch_um(sdata, key, _SPOT_PITCH_UM, coordinate_system)
            return value, f"100 µm pitch of Visium spots {key!r}"
    return None


def _bins(sdata: SpatialData, coordinate_system: str) -> Iterator[tuple[str, int]]:
    """Elements named as Visium HD bins with their bin size, coarsest first, labels last of one size."""
    own = written_by_pixnet(sdata)
    elements = {**sdata.shapes, **sdata.labels}
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
    scale = similarity_scale(affine_matrix(sdata.shapes[key], coordinate_system), f"shapes {key!r}")
    pitch = _lattice_of(sdata, key)
    if pitch is not None:
        return size / (pitch * scale), f"lattice pitch of the {size} µm bins {key!r}"
    value = _neighbour_pitch_um(sdata, key, size, coordinate_system)
    edge = size / (_bin_edge(sdata.shapes[key]) * scale)
    if abs(value / edge - 1) > _PITCH_TOLERANCE:  # bins touch: where the nearest is further off, most are missing
        return edge, f"edge length of the {size} µm bins {key!r} (too few neighbours for a pitch)"
    return value, f"neighbour distance of the {size} µm bins {key!r}"


def _neighbour_pitch_um(sdata: SpatialData, key: str, um: float, coordinate_system: str) -> float:
    from squidpy.experimental.utils import derive_mpp_from_shapes

    return float(derive_mpp_from_shapes(sdata, key, coordinate_system, um_between_centers=um))


def _bin_edge(shapes: GeoDataFrame) -> float:
    if "radius" in shapes:
        return float(2 * np.median(shapes["radius"]))
    return float(np.sqrt(np.median(shapely.area(shapes.geometry.to_numpy()))))


def _lattice_of(sdata: SpatialData, key: str) -> float | None:
    """Pitch of bins from the array_row and array_col of a table that annotates them, in the bins' own units."""
    for table_key, table in sdata.tables.items():
        if not {"array_row", "array_col"} <= set(table.obs.columns):
            continue
        try:
            link = table_link(sdata, table_key=table_key)
        except (ElementError, DataError):
            continue
        if link.element_key != key:
            continue
        picked = np.unique(np.linspace(0, len(link.rows) - 1, _SAMPLE).astype(np.int64))
        place = sdata.shapes[key].index.get_indexer(link.instances[picked])
        obs = table.obs[["array_col", "array_row"]].iloc[link.rows[picked]].to_numpy(dtype=np.float64)
        return lattice_pitch(obs[place >= 0], _centres(sdata.shapes[key].geometry.to_numpy()[place[place >= 0]]))
    return None


def lattice_pitch(col_row: NDArray[np.float64], xy: NDArray[np.float64]) -> float | None:
    """Pitch of a square lattice, rotated or not, with gaps or not, from the indices of its points.

    Least squares for ``xy = A (col, row) + t``; the pitch is sqrt(abs(det A)).

    Parameters
    ----------
    col_row
        Lattice indices, shape (n, 2).
    xy
        Centres, shape (n, 2).

    Returns
    -------
    Pitch in units of `xy`; None if the indices do not span the plane or do not explain the centres.
    """
    design = np.column_stack([col_row, np.ones(len(col_row))])
    solution, _, rank, _ = np.linalg.lstsq(design, xy, rcond=None)
    if rank < 3:
        return None
    pitch = float(np.sqrt(abs(np.linalg.det(solution[:2]))))
    residual = float(np.abs(design @ solution - xy).max())
    return pitch if residual <= _LATTICE_RESIDUAL * pitch else None


def _centres(geometry: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(shapely.get_coordinates(shapely.centroid(geometry)), dtype=np.float64)


def _is_visium(shapes: GeoDataFrame) -> bool:
    """Whether circles lie on a hexagonal lattice with the pitch and width of Visium spots."""
    from scipy.spatial import cKDTree

    geometry = shapes.geometry.to_numpy()
    if "radius" not in shapes or len(shapes) <= _HEX_NEIGHBOURS or not (shapely.get_type_id(geometry) == 0).all():
        return False
    xy = _centres(geometry)
    picked = np.unique(np.linspace(0, len(xy) - 1, _SAMPLE).astype(np.int64))
    distance = np.median(cKDTree(xy).query(xy[picked], k=_HEX_NEIGHBOURS + 1)[0][:, 1:], axis=0)
    ratio = distance[0] / (2 * float(np.median(shapes["radius"])))
    widths = (abs(ratio * width / _SPOT_PITCH_UM - 1) < _SPOT_RATIO_TOLERANCE for width in _SPOT_DIAMETERS_UM)
    return bool(any(widths) and distance[-1] < 1.2 * distance[0])
