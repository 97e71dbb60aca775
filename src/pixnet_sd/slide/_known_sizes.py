"""Micrometres per unit of a coordinate system, measured on elements whose size is known: bins and Visium spots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from pixnet_sd._errors import ResolutionError
from pixnet_sd._logging import logger

from ._bins import BinLattice, bin_lattice
from ._elements import coordinate_systems, region_element, written_by_pixnet
from ._extent import on_image
from ._stored_shapes import StoredShapes, sample_positions, shapes_of
from ._tables import bin_size_um
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["KnownSize", "agreed", "known_sizes", "named_as_bins", "size_of_bins"]

_SPOT_PITCH_UM = 100.0
# A Visium spot is 55 µm wide; Space Ranger writes the diameter of a 65 µm one (89.5 px at a pitch of 138 px).
_SPOT_DIAMETERS_UM = (55.0, 65.0)
_SPOT_RATIO_TOLERANCE = 0.04
_MOST_SPOTS = 50_000  # a capture area of 11 mm has 14,336
_HEX_NEIGHBOURS = 5  # at one distance on a hexagonal lattice, also along its straight edges; 4 on a square one
# Bins are placed by the pitch of the array that they lie on, so that two lattices of one slide agree to some
# thousandths; centres of spots are rounded to pixels, and their array is known less well.
_BIN_TOLERANCE, _SPOT_TOLERANCE = 0.01, 0.05


@dataclass(frozen=True)
class KnownSize:
    """µm per unit of a coordinate system, as one element tells it.

    Attributes
    ----------
    key
        The element.
    value
        µm per unit.
    how
        A phrase that says how it was had.
    tolerance
        By what share another value may differ and still be the same.
    """

    key: str
    value: float
    how: str
    tolerance: float

    def agrees(self, value: float) -> bool:
        """Whether this is another value of the same."""
        return abs(value / self.value - 1) <= self.tolerance


def known_sizes(
    sdata: SpatialData, coordinate_system: str, *, image_key: str | None = None, region_keys: Iterable[str] = ()
) -> list[KnownSize]:
    """What elements in a coordinate system tell of its unit: all lattices of Visium HD bins, else Visium spots.

    Parameters
    ----------
    sdata
        The object to look in.
    coordinate_system
        The coordinate system to measure.
    image_key
        Elements that miss this image do not count, unless all do.
    region_keys
        Elements that are meant: where some of them tell, no other is asked.

    Returns
    -------
    One entry an element, the coarsest bins first; none if nothing of known size is there.
    """
    wanted = set(region_keys)
    for told in (_from_bins, _from_spots):
        keys = named_as_bins(sdata) if told is _from_bins else sorted(shapes_of(sdata))
        keys = [key for key in keys if coordinate_system in coordinate_systems(region_element(sdata, key))]
        if image_key is not None:
            keys = on_image(sdata, keys, image_key=image_key, coordinate_system=coordinate_system)
        for some in ([key for key in keys if key in wanted], [key for key in keys if key not in wanted]):
            found = told(sdata, some, coordinate_system)
            if found:
                return found
    return []


def agreed(found: Sequence[KnownSize]) -> KnownSize | None:
    """The first of the sizes found, if all agree; None if there is none.

    Raises
    ------
    ResolutionError
        If they disagree: then several slides meet in one coordinate system, or something is scaled.
    """
    if not found or all(found[0].agrees(other.value) for other in found):
        return found[0] if found else None
    values = "; ".join(f"{each.value:.4g} µm per pixel by the {each.how}" for each in found)
    raise ResolutionError(
        f"Elements of this slide tell different resolutions: {values}. Are several samples in one coordinate system? "
        "Say what is meant: table_key= or shapes_key= of one of them, coordinate_system= or mpp=."
    )


def named_as_bins(sdata: SpatialData) -> list[str]:
    """Elements that are named as Visium HD bins are, whatever they are, coarsest first, labels last of one size."""
    own = written_by_pixnet(sdata)
    sizes = {key: bin_size_um(key) or 0 for key in (*shapes_of(sdata), *sdata.labels) if key not in own}
    return sorted((key for key, size in sizes.items() if size), key=lambda key: (-sizes[key], key))


def _from_bins(sdata: SpatialData, keys: Sequence[str], coordinate_system: str) -> list[KnownSize]:
    found: list[KnownSize] = []
    for key in keys:
        lattice = bin_lattice(sdata, key, exact=not found)
        if lattice is None:
            logger.debug("%r is no lattice of touching squares and tells no size", key)
            continue
        try:
            found.append(size_of_bins(sdata, lattice, coordinate_system))
        except ResolutionError as error:
            logger.info("No pitch from bins %r: %s", key, error)
    return found


def size_of_bins(sdata: SpatialData, lattice: BinLattice, coordinate_system: str) -> KnownSize:
    """What a lattice of bins tells of a coordinate system's unit.

    Raises
    ------
    ResolutionError
        If it gets there by anything but a similarity.
    """
    scale = _scale(sdata, lattice.key, coordinate_system)
    return KnownSize(lattice.key, lattice.size_um / (lattice.pitch * scale), lattice.how, _BIN_TOLERANCE)


def _scale(sdata: SpatialData, key: str, coordinate_system: str) -> float:
    return similarity_scale(affine_matrix(region_element(sdata, key), coordinate_system), f"element {key!r}")


def _from_spots(sdata: SpatialData, keys: Sequence[str], coordinate_system: str) -> list[KnownSize]:
    own, shapes = written_by_pixnet(sdata), shapes_of(sdata)
    found = []
    for key in keys:
        pitch = None if key in own else _visium_pitch(shapes[key])
        if pitch is not None:
            value = _SPOT_PITCH_UM / (pitch * _scale(sdata, key, coordinate_system))
            found.append(KnownSize(key, value, f"100 µm pitch of Visium spots {key!r}", _SPOT_TOLERANCE))
    return found


def _visium_pitch(shapes: GeoDataFrame | StoredShapes) -> float | None:
    """Pitch of circles on a hexagonal lattice, if it is to their width as that of Visium spots."""
    from scipy.spatial import cKDTree

    if isinstance(shapes, StoredShapes):
        if len(shapes) > _MOST_SPOTS:
            return None
        shapes = shapes.load()
    geometry = shapes.geometry.to_numpy()
    if "radius" not in shapes or len(shapes) <= _HEX_NEIGHBOURS or not (shapely.get_type_id(geometry) == 0).all():
        return None
    xy = shapely.get_coordinates(geometry)
    if not np.isfinite(xy).all():
        return None
    distance = cKDTree(xy).query(xy[sample_positions(len(xy))], k=_HEX_NEIGHBOURS + 1)[0][:, 1:]
    nearest, *_, last = np.median(distance, axis=0)
    ratio = nearest / (2 * float(np.median(shapes["radius"])))
    widths = (abs(ratio * width / _SPOT_PITCH_UM - 1) < _SPOT_RATIO_TOLERANCE for width in _SPOT_DIAMETERS_UM)
    if not any(widths) or last >= 1.2 * nearest:
        return None
    return float(distance[distance < 1.2 * nearest].mean())  # the nearest alone are too near where centres are rounded
