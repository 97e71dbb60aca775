"""Micrometres per unit of a coordinate system, measured on elements whose size is known: bins and Visium spots.

Micrometres per pixel of the slide image, and which rule says so.

The coordinate system in which the slide image meets the other elements.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely

from pixnet_sd._notes import ATTRS_KEY, note_of, stored_note
from pixnet_sd._util import logger, warn
from pixnet_sd.errors import ElementError, ResolutionError

from ._find import other_slides
from .elements import (
    BinLattice,
    StoredShapes,
    affine_matrix,
    bin_lattice,
    bin_size_um,
    coordinate_systems,
    moved_px,
    names,
    on_image,
    region_element,
    sample_positions,
    shapes_of,
    shared_systems,
    similarity_scale,
    written_by_pixnet,
)

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = [
    "KnownSize",
    "agreed",
    "find_mpp",
    "known_sizes",
    "named_as_bins",
    "select_coordinate_system",
    "size_of_bins",
]

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


_PLAUSIBLE = (0.1, 2.0)  # µm/px: from 100x objectives to overviews in which nuclei are still seen


def find_mpp(
    sdata: SpatialData,
    *,
    image_key: str,
    coordinate_system: str,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
    region_keys: Collection[str] = (),
) -> tuple[float, str]:
    """Micrometres per pixel of an image at scale 0.

    In this order: what the caller says; what ``sdata.attrs["pixnet_sd"]["mpp"]`` records for the image; Visium HD bins,
    which are lattices of touching squares; Visium spots. What bins or spots contradict is said: of the caller with a
    warning, of a record with an error.

    Parameters
    ----------
    sdata
        The object to look in.
    image_key
        Name of the image.
    coordinate_system
        Coordinate system that the image shares with bins or spots.
    mpp
        The value, or ``"coordinate_system"`` if that coordinate system is in µm.
    allow_any_mpp
        Accept a value outside 0.1-2 µm/px.
    region_keys
        Elements that are meant, which are asked before others.

    Returns
    -------
    µm per pixel, and a sentence on where it comes from.

    Raises
    ------
    ResolutionError
        If it cannot be told, elements or a record contradict one another, it is outside 0.1-2 µm/px, or the
        transformation of the image is no similarity.
    """
    scale = similarity_scale(affine_matrix(sdata.images[image_key], coordinate_system), f"image {image_key!r}")
    found = known_sizes(sdata, coordinate_system, image_key=image_key, region_keys=region_keys)
    sizes = [KnownSize(size.key, size.value * scale, size.how, size.tolerance) for size in found]
    value, rule = _value(sdata, image_key, coordinate_system, mpp, scale, sizes, region_keys)
    if not np.isfinite(value) or value <= 0:
        raise ResolutionError(f"mpp = {value} ({rule}) is not a positive number of µm per pixel. Give mpp=.")
    if not allow_any_mpp and not _PLAUSIBLE[0] <= value <= _PLAUSIBLE[1]:
        raise ResolutionError(_absurd(value, rule, image_key))
    return value, rule


def _value(
    sdata: SpatialData,
    image_key: str,
    system: str,
    mpp: float | Literal["coordinate_system"] | None,
    scale: float,
    sizes: list[KnownSize],
    region_keys: Collection[str],
) -> tuple[float, str]:
    if mpp is not None:
        return _from_caller(system, mpp, scale, sizes)
    recorded = note_of(sdata.attrs.get(ATTRS_KEY), "mpp", image_key)
    if recorded is not None:
        _check_stored(float(recorded), stored_note(sdata, "mpp", image_key), image_key)
        _check_recorded(float(recorded), image_key, sizes)
        return float(recorded), 'value recorded in sdata.attrs["pixnet_sd"]["mpp"]'
    measured = agreed(sizes)
    if measured is None:
        raise ResolutionError(_unknown(sdata, image_key, system))
    if measured.key not in region_keys:
        _check_only_slide(sdata, image_key, system, measured)
    # rounded, because the last digits of a fit differ between machines, and results are recognised by their mpp
    return float(f"{measured.value:.10g}"), measured.how


def _check_only_slide(sdata: SpatialData, image_key: str, system: str, measured: KnownSize) -> None:
    """Several slides in one coordinate system need not be to one scale: elements tell that of the slide they are on."""
    others = other_slides(sdata, image_key=image_key, coordinate_system=system)
    if others:
        raise ResolutionError(
            f"Images {names([image_key, *others])} meet in coordinate system {system!r}, and which of them "
            f"{measured.key!r} belongs to cannot be told, so micrometres per pixel of {image_key!r} are not known: "
            f"{measured.value:.4g} by the {measured.how}. Give mpp=, or name regions that belong to the image with "
            "table_key= or shapes_key=."
        )


def _check_stored(value: float, stored: Any, image_key: str) -> None:
    """A record that was corrected in the store since, or only in memory."""
    if stored is not None and stored != value:
        raise ResolutionError(
            f"sdata.attrs['pixnet_sd']['mpp'] records {value:.4g} µm/px for image {image_key!r}, and the store "
            f"{stored} µm/px: another session has corrected one of them. Say which is right with mpp=, write it with "
            "sdata.write_attrs(), or open the store anew."
        )


def _check_recorded(value: float, image_key: str, sizes: list[KnownSize]) -> None:
    """A record has been made for some image some time: what lies on the slide now knows better."""
    if sizes and value > 0 and not any(size.agrees(value) for size in sizes):
        raise ResolutionError(
            f"sdata.attrs['pixnet_sd']['mpp'] records {value:.4g} µm/px for image {image_key!r}, and the "
            f"{sizes[0].how} says {sizes[0].value:.4g} µm/px. Correct or remove the record, or say which is right with "
            f"mpp={sizes[0].value:.4g} or mpp={value:.4g}."
        )


def _from_caller(
    system: str, mpp: float | Literal["coordinate_system"], scale: float, sizes: list[KnownSize]
) -> tuple[float, str]:
    if isinstance(mpp, str):
        if mpp != "coordinate_system":
            raise ResolutionError(f"mpp = {mpp!r}: give a number of µm per pixel, or 'coordinate_system'.")
        value, rule = scale, f"coordinate system {system!r}, in µm as mpp='coordinate_system' says"
    else:
        value, rule = float(mpp), "argument mpp="
    if sizes and value > 0 and not any(size.agrees(value) for size in sizes):
        warn(
            f"mpp = {value:.4g} µm/px ({rule}) disagrees with {sizes[0].value:.4g} µm/px, the {sizes[0].how}. "
            "The given value is used."
        )
    return value, rule


def _absurd(value: float, rule: str, image_key: str) -> str:
    low, high = _PLAUSIBLE
    cause = (
        f"larger than {high}: perhaps {image_key!r} is a downscaled copy (hires or lowres) of the slide image"
        if value > high
        else f"smaller than {low}: perhaps the value is in mm, or pixels per µm"
    )
    return (
        f"mpp = {value:.6g} µm per pixel (from the {rule}) is {cause}, or a transformation has other units. Choose the "
        "full-resolution image with image_key=, or correct mpp=."
    )


def _unknown(sdata: SpatialData, image_key: str, system: str) -> str:
    there = [key for key, shapes in sdata.shapes.items() if system in coordinate_systems(shapes)]
    return (
        f"Micrometres per pixel of image {image_key!r} are unknown: coordinate system {system!r} holds no Visium HD "
        f"bins (touching squares, name ending in _008um or alike) and no Visium spots; shapes there: {names(there)}. "
        "Give mpp= (see the scanner's metadata), or mpp='coordinate_system' if that coordinate system is in µm."
    )


_SAME_PX = 0.5  # what alignments may differ by, over the image, and be the same


def select_coordinate_system(
    sdata: SpatialData,
    *,
    image_key: str,
    element_key: str | None = None,
    region_keys: Iterable[str] = (),
    coordinate_system: str | None = None,
) -> str:
    """Choose the coordinate system in which image and regions meet.

    Of several, the one whose units are closest to pixels of the image: no scale first, then nearest to the identity,
    then by name. They all have to say the same of where the regions lie on the image.

    Parameters
    ----------
    sdata
        The object to look in.
    image_key
        Name of the slide image.
    element_key
        Shapes or labels that must be in it too.
    region_keys
        Shapes or labels that are wanted there: systems with more of them come first.
    coordinate_system
        The one to use, if it is not to be found.

    Returns
    -------
    Name of a coordinate system; it may be the empty string.

    Raises
    ------
    ElementError
        If the elements share none, are not both in the one asked for, or are aligned in several ways.
    """
    image = sdata.images[image_key]
    shared = coordinate_systems(image)
    found = f"Image {image_key!r} is in {names(shared)}"
    if element_key is not None:
        element = region_element(sdata, element_key)
        found += f", element {element_key!r} in {names(coordinate_systems(element))}"
        shared = {system: shared[system] for system in shared_systems(image, element)}
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ElementError(f"Coordinate system {coordinate_system!r} is not shared. {found}.")
        return coordinate_system
    if not shared:
        raise ElementError(
            f"There is no shared coordinate system. {found}. Align them with "
            "spatialdata.transformations.set_transformation."
        )
    regions = {key: region_element(sdata, key) for key in (element_key, *region_keys) if key is not None}
    systems = _with_most(shared, regions)
    for key, element in regions.items():
        _check_one_alignment(image, image_key, element, key, [s for s in systems if s in coordinate_systems(element)])
    return min(systems, key=lambda system: (*_distance_from_pixels(image, system), system))


def _with_most(systems: Iterable[str], regions: dict[str, Any]) -> list[str]:
    """Systems that the most of some elements are in."""
    n = {system: sum(system in coordinate_systems(element) for element in regions.values()) for system in systems}
    return [system for system, count in n.items() if count == max(n.values())]


def _check_one_alignment(image: Any, image_key: str, element: Any, key: str, systems: Sequence[str]) -> None:
    if len(systems) < 2:
        return
    systems = sorted(systems, key=lambda system: (*_distance_from_pixels(image, system), system))
    off = moved_px(image, element, systems)
    other = [system for system in systems if off[system] > _SAME_PX]
    if other:
        differ = ", ".join(f"{off[system]:.4g} px elsewhere in {system!r}" for system in other)
        same = names(system for system in systems if system not in other)
        raise ElementError(
            f"Image {image_key!r} and regions {key!r} are aligned differently in several coordinate systems: against "
            f"{same} regions lie up to {differ}. Say which is right with coordinate_system=."
        )


def _distance_from_pixels(image: Any, system: str) -> tuple[float, float]:
    matrix = affine_matrix(image, system)
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    log_scale = abs(np.log(scale)) if scale > 0 else np.inf
    return round(float(log_scale), 9), round(float(np.abs(matrix - np.eye(3)).max()), 9)
