"""The coordinate system in which image and regions meet, and micrometres per pixel, measured on bins and spots."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely
from scipy.spatial import cKDTree

from pixnet_sd._notes import memory_note, stored_note
from pixnet_sd._util import logger, warn
from pixnet_sd.errors import ElementError, ResolutionError

from ._images import other_slides
from .elements import (
    BinLattice,
    Shapes,
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
    from spatialdata import SpatialData

_RECORD = "sdata.attrs['pixnet_sd']['mpp']"  # by name of the image
_PLAUSIBLE = (0.1, 2.0)  # µm/px: from 100x objectives to overviews in which nuclei are still seen
_SPOT_PITCH_UM = 100.0
# A Visium spot is 55 µm wide; Space Ranger writes the diameter of a 65 µm one (89.5 px at a pitch of 138 px).
_SPOT_DIAMETERS_UM = (55.0, 65.0)
_SPOT_RATIO_TOLERANCE = 0.04
_MOST_SPOTS = 50_000  # a capture area of 11 mm has 14,336
_HEX_NEIGHBOURS = 5  # at one distance on a hexagonal lattice, also along its straight edges; 4 on a square one
# Bins are placed by the pitch of the array that they lie on, so that two lattices of one slide agree to some
# thousandths; centres of spots are rounded to pixels, and their array is known less well.
_BIN_TOLERANCE, _SPOT_TOLERANCE = 0.01, 0.05
_SAME_PX = 0.5  # what alignments may differ by, over the image, and be the same


@dataclass(frozen=True)
class KnownSize:
    """µm per unit of a coordinate system, as one element tells it."""

    key: str  # the element
    value: float
    how: str  # a phrase that says how it was had
    tolerance: float  # by what share another value may differ and still be the same

    def agrees(self, value: float) -> bool:
        """Whether this is another value of the same."""
        return abs(value / self.value - 1) <= self.tolerance


def _known_sizes(
    sdata: SpatialData, coordinate_system: str, image_key: str, region_keys: Collection[str]
) -> list[KnownSize]:
    """Sizes that elements in a coordinate system tell: all lattices of bins, coarsest first, else Visium spots.

    Where regions that are meant tell, no other is asked; elements that miss the image do not count, unless all do.
    """
    for candidates, measure in ((named_as_bins(sdata), _from_bins), (sorted(shapes_of(sdata)), _from_spots)):
        keys = [key for key in candidates if coordinate_system in coordinate_systems(region_element(sdata, key))]
        keys = on_image(sdata, keys, image_key=image_key, coordinate_system=coordinate_system)
        meant, others = ([key for key in keys if (key in region_keys) == is_meant] for is_meant in (True, False))
        sizes = measure(sdata, meant, coordinate_system) or measure(sdata, others, coordinate_system)
        if sizes:
            return sizes
    return []


def named_as_bins(sdata: SpatialData) -> list[str]:
    """Elements that are named as Visium HD bins are, whatever they are, coarsest first, labels last of one size."""
    own = written_by_pixnet(sdata)
    sizes = {key: bin_size_um(key) or 0 for key in (*shapes_of(sdata), *sdata.labels) if key not in own}
    return sorted((key for key, size in sizes.items() if size), key=lambda key: (-sizes[key], key))


def _from_bins(sdata: SpatialData, keys: Sequence[str], coordinate_system: str) -> list[KnownSize]:
    sizes: list[KnownSize] = []
    for key in keys:
        lattice = bin_lattice(sdata, key, exact=not sizes)
        if lattice is None:
            continue
        try:
            sizes.append(size_of_bins(sdata, lattice, coordinate_system))
        except ResolutionError as error:
            logger.info("No pitch from bins %r: %s", key, error)
    return sizes


def size_of_bins(sdata: SpatialData, lattice: BinLattice, coordinate_system: str) -> KnownSize:
    """Size that a lattice of bins tells of a coordinate system; `ResolutionError` if it gets there by no similarity."""
    scale = _scale(sdata, lattice.key, coordinate_system)
    return KnownSize(lattice.key, lattice.size_um / (lattice.pitch * scale), lattice.how, _BIN_TOLERANCE)


def _scale(sdata: SpatialData, key: str, coordinate_system: str) -> float:
    return similarity_scale(affine_matrix(region_element(sdata, key), coordinate_system), f"element {key!r}")


def _from_spots(sdata: SpatialData, keys: Sequence[str], coordinate_system: str) -> list[KnownSize]:
    own, shapes = written_by_pixnet(sdata), shapes_of(sdata)
    sizes = []
    for key in keys:
        pitch = None if key in own else _visium_pitch(shapes[key])
        if pitch is not None:
            value = _SPOT_PITCH_UM / (pitch * _scale(sdata, key, coordinate_system))
            sizes.append(KnownSize(key, value, f"100 µm pitch of Visium spots {key!r}", _SPOT_TOLERANCE))
    return sizes


def _visium_pitch(shapes: Shapes) -> float | None:
    """Pitch of circles on a hexagonal lattice, if it is to their width as that of Visium spots."""
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


def find_mpp(
    sdata: SpatialData,
    *,
    image_key: str,
    coordinate_system: str,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
    region_keys: Collection[str] = (),
) -> tuple[float, str]:
    """Micrometres per pixel of an image at scale 0, and a phrase on where they come from.

    In this order: `mpp` of the caller, or that the coordinate system is in µm; what the object's notes
    record for the image; Visium HD bins, which are lattices of touching squares; Visium spots. `region_keys` are asked
    before other elements. What bins or spots contradict is said: of the caller with a warning, of a record with a
    `ResolutionError`, as is a value that cannot be told, is contradictory or outside 0.1-2 µm/px (unless
    `allow_any_mpp`), or a transformation of the image that is no similarity.
    """
    scale = similarity_scale(affine_matrix(sdata.images[image_key], coordinate_system), f"image {image_key!r}")
    sizes = [
        replace(size, value=size.value * scale)
        for size in _known_sizes(sdata, coordinate_system, image_key, region_keys)
    ]
    if mpp is not None:
        value, rule = _from_caller(coordinate_system, mpp, scale, sizes)
    elif (recorded := memory_note(sdata, "mpp", image_key)) is not None:
        value, rule = float(recorded), f"value recorded in {_RECORD}"
        _check_record(value, stored_note(sdata, "mpp", image_key), image_key, sizes)
    else:
        value, rule = _measured(sdata, image_key, coordinate_system, sizes, region_keys)
    if not np.isfinite(value) or value <= 0:
        raise ResolutionError(f"mpp = {value} ({rule}) is not a positive number of µm per pixel. Give mpp=.")
    low, high = _PLAUSIBLE
    if not allow_any_mpp and not low <= value <= high:
        cause = (
            f"larger than {high}: perhaps {image_key!r} is a downscaled copy (hires or lowres) of the slide image"
            if value > high
            else f"smaller than {low}: perhaps the value is in mm, or pixels per µm"
        )
        raise ResolutionError(
            f"mpp = {value:.6g} µm per pixel (from the {rule}) is {cause}, or a transformation has other units. Choose "
            "the full-resolution image with image_key=, or correct mpp=."
        )
    return value, rule


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


def _check_record(value: float, stored: Any, image_key: str, sizes: list[KnownSize]) -> None:
    """Refuse a record that differs from the store's, where only one was corrected, or that bins or spots refute."""
    record = f"{_RECORD} records {value:.4g} µm/px for image {image_key!r}, and the"
    if stored is not None and stored != value:
        raise ResolutionError(
            f"{record} store {stored} µm/px: another session has corrected one of them. Say which is right with mpp=, "
            "write it with sdata.write_attrs(), or open the store anew."
        )
    if sizes and value > 0 and not any(size.agrees(value) for size in sizes):
        raise ResolutionError(
            f"{record} {sizes[0].how} says {sizes[0].value:.4g} µm/px. Correct or remove the record, or say which is "
            f"right with mpp={sizes[0].value:.4g} or mpp={value:.4g}."
        )


def _measured(
    sdata: SpatialData, image_key: str, system: str, sizes: list[KnownSize], region_keys: Collection[str]
) -> tuple[float, str]:
    """The size that all elements agree on, of an image that they are known to belong to."""
    if not sizes:
        present = [key for key, shapes in sdata.shapes.items() if system in coordinate_systems(shapes)]
        raise ResolutionError(
            f"Micrometres per pixel of image {image_key!r} are unknown: coordinate system {system!r} holds no Visium "
            "HD bins (touching squares, name ending in _008um or alike) and no Visium spots; shapes there: "
            f"{names(present)}. Give mpp= (see the scanner's metadata), or mpp='coordinate_system' if that coordinate "
            "system is in µm."
        )
    size = sizes[0]
    if not all(size.agrees(other.value) for other in sizes):
        values = "; ".join(f"{each.value:.4g} µm per pixel by the {each.how}" for each in sizes)
        raise ResolutionError(
            f"Elements of this slide tell different resolutions: {values}. Are several samples in one coordinate "
            "system? Say what is meant: table_key= or shapes_key= of one of them, coordinate_system= or mpp=."
        )
    # several slides in one coordinate system need not be to one scale: elements tell that of the slide they are on
    others = [] if size.key in region_keys else other_slides(sdata, image_key=image_key, coordinate_system=system)
    if others:
        raise ResolutionError(
            f"Images {names([image_key, *others])} meet in coordinate system {system!r}, and which of them "
            f"{size.key!r} belongs to cannot be told, so micrometres per pixel of {image_key!r} are not known: "
            f"{size.value:.4g} by the {size.how}. Give mpp=, or name regions that belong to the image with "
            "table_key= or shapes_key=."
        )
    # rounded, because the last digits of a fit differ between machines, and results are recognised by their mpp
    return float(f"{size.value:.10g}"), size.how


def select_coordinate_system(
    sdata: SpatialData,
    *,
    image_key: str,
    element_key: str | None = None,
    region_keys: Iterable[str] = (),
    coordinate_system: str | None = None,
) -> str:
    """Name of the coordinate system, perhaps an empty one, in which image and regions meet, if it is not given.

    It has `element_key`, and of `region_keys` as many as any. Of several, the one whose units are closest to pixels of
    the image: no scale first, then nearest to the identity, then by name. They all have to say the same of where the
    regions lie on the image. `ElementError` if none is shared, the given one is not, or regions are aligned in several
    ways.
    """
    image = sdata.images[image_key]
    shared = list(coordinate_systems(image))
    where = f"Image {image_key!r} is in {names(shared)}"
    if element_key is not None:
        element = region_element(sdata, element_key)
        where += f", element {element_key!r} in {names(coordinate_systems(element))}"
        shared = shared_systems(image, element)
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ElementError(f"Coordinate system {coordinate_system!r} is not shared. {where}.")
        return coordinate_system
    if not shared:
        raise ElementError(
            f"There is no shared coordinate system. {where}. Align them with "
            "spatialdata.transformations.set_transformation."
        )
    regions = {key: region_element(sdata, key) for key in (element_key, *region_keys) if key is not None}
    n_regions = {system: sum(system in coordinate_systems(each) for each in regions.values()) for system in shared}
    candidates = [system for system in shared if n_regions[system] == max(n_regions.values())]
    candidates.sort(key=lambda system: (*_distance_from_pixels(image, system), system))
    for key, each in regions.items():
        systems = [system for system in candidates if system in coordinate_systems(each)]
        off = moved_px(image, each, systems) if len(systems) > 1 else {}
        differ = [f"{px:.4g} px elsewhere in {system!r}" for system, px in off.items() if px > _SAME_PX]
        if differ:
            same = names(system for system, px in off.items() if px <= _SAME_PX)
            raise ElementError(
                f"Image {image_key!r} and regions {key!r} are aligned differently in several coordinate systems: "
                f"against {same} regions lie up to {', '.join(differ)}. Say which is right with coordinate_system=."
            )
    return candidates[0]


def _distance_from_pixels(image: Any, system: str) -> tuple[float, float]:
    """By how much the unit of a coordinate system differs from a pixel, and its map from the identity."""
    matrix = affine_matrix(image, system)
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    log_scale = abs(np.log(scale)) if scale > 0 else np.inf
    return round(float(log_scale), 9), round(float(np.abs(matrix - np.eye(3)).max()), 9)
