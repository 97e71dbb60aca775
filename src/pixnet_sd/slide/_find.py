"""Which image is the slide, the coordinate system in which regions meet it, and its micrometres per pixel."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from pixnet_sd._notes import memory_note, stored_note
from pixnet_sd._util import logger, warn
from pixnet_sd.errors import ElementError, ResolutionError

from .elements import (
    BinLattice,
    Shapes,
    StoredShapes,
    affine_matrix,
    bin_lattice,
    bin_size_um,
    coordinate_systems,
    image_extent,
    moved_px,
    names,
    on_image,
    region_element,
    sample_positions,
    scale0,
    shapes_of,
    shared_systems,
    similarity_scale,
    written_by_pixnet,
)
from .image import Looks, coarsest, computed, is_cheap_to_look_at, levels_of

_SAME_PLACE = 0.02  # of the extent: copies are cropped to whole pixels
_PIXELS = 1.5  # of the smaller image
_MOST_PX, _ENOUGH_PX = 2**24, 2**20  # of a level that is read, and that are compared
_GRID, _CELL_PX = 24, 4  # cells along each side that are compared, and pixels of the smaller image in one
_ALIKE = 0.8  # correlation of grey levels
_FLAT, _SAME = 1.0, 2.0  # deviation of grey levels below which there is nothing to compare, and of colours that are one
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


def select_image(sdata: SpatialData, *, image_key: str | None = None, coordinate_system: str | None = None) -> str:
    """Name of the slide image: the one given, else of those not ours that look most like H&E, the others' original."""
    if image_key is not None:
        if image_key not in sdata.images:
            raise ElementError(f"There is no image {image_key!r}. Images: {names(sdata.images)}. Check image_key=.")
        systems = coordinate_systems(sdata.images[image_key])
        if coordinate_system is not None and coordinate_system not in systems:
            raise ElementError(
                f"Image {image_key!r} is not in coordinate system {coordinate_system!r}, but in {names(systems)}. "
                "Check coordinate_system=."
            )
        return image_key
    looks = {key: Looks.of(sdata.images[key]) for key in _placed_images(sdata, coordinate_system)}
    best = min(look.rank for look in looks.values())
    likely = [key for key, look in looks.items() if look.rank == best]
    # the one of which every other is a copy; of as many pixels, one with more levels
    order = sorted(likely, key=lambda key: (-_n_px(sdata.images[key]), -len(levels_of(sdata.images[key]))))
    full = (large for large in order if all(is_copy(sdata, large, key) for key in likely if key != large))
    taken = next(full, None)
    if taken is None:
        why = {key: looks[key].describe() for key in likely}
        raise ElementError(f"Several images could be the slide: {_described(sdata, why)}. Name one with image_key=.")
    if len(likely) > 1:
        copies = names(key for key in likely if key != taken)
        logger.info("Image %r taken as the slide; %s are copies of it.", taken, copies)
    beside = {key: look.describe() for key, look in looks.items() if look.rank > best}
    if any(looks[key].is_rgb for key in beside):
        logger.info("Image %r taken as the slide; not H&E: %s.", taken, _described(sdata, beside))
    return taken


def other_slides(sdata: SpatialData, *, image_key: str, coordinate_system: str) -> list[str]:
    """Images that overlap one in a coordinate system, look like H&E, and are not copies of it."""
    image = sdata.images[image_key]
    others = [key for key in _placed_images(sdata, coordinate_system) if key != image_key]
    others = [key for key in others if _overlap(image, sdata.images[key], coordinate_system)]
    whole = [key for key in others if is_copy(sdata, key, image_key)]  # of which the image is a copy
    others = [key for key in others if not any(is_copy(sdata, large, key) for large in (image_key, *whole))]
    others = [key for key in others if Looks.of(sdata.images[key]).rank == 0]
    copies = {small for small in others for large in others if small != large and is_copy(sdata, large, small)}
    return [key for key in others if key not in copies] or others[:1]


def _overlap(one: Any, other: Any, coordinate_system: str) -> bool:
    boxes = [shapely.Polygon(image_extent(element, coordinate_system)) for element in (one, other)]
    return bool(boxes[0].intersection(boxes[1]).area > 0) if all(box.is_valid for box in boxes) else True


def _placed_images(sdata: SpatialData, coordinate_system: str | None) -> list[str]:
    """Images that are not ours, in a coordinate system if one is given."""
    own = written_by_pixnet(sdata)
    images = [key for key in sdata.images if key not in own]
    if not images:
        ours = f" Only images written by pixnet_sd were found: {names(sdata.images)}." if len(sdata.images) else ""
        raise ElementError(f"The SpatialData object has no slide image.{ours} Add the H&E image with Image2DModel.")
    if coordinate_system is None:
        return images
    placed = [key for key in images if coordinate_system in coordinate_systems(sdata.images[key])]
    if not placed:
        raise ElementError(
            f"No image is in coordinate system {coordinate_system!r}: "
            f"{_described(sdata, dict.fromkeys(images, ''))}. Check coordinate_system=."
        )
    return placed


def _described(sdata: SpatialData, images: Mapping[str, str]) -> str:
    """One phrase an image: name, shape, channels, what else is said of it, and coordinate systems."""
    phrases = []
    for key, said in images.items():
        image = scale0(sdata.images[key])
        shape = " x ".join(f"{image.sizes[axis]} {axis}" for axis in ("c", "y", "x"))
        channels = f"channels {', '.join(map(str, image.coords['c'].values[:6]))}" if "c" in image.coords else ""
        systems = f"coordinate systems: {names(coordinate_systems(sdata.images[key]))}"
        phrases.append(f"{key!r} ({'; '.join(filter(None, (shape, channels, said, systems)))})")
    return "; ".join(phrases)


def _n_px(element: Any) -> int:
    return int(np.prod(scale0(element).shape[-2:]))


def is_copy(sdata: SpatialData, large: str, small: str) -> bool:
    """Whether an image shows the same as another that has fewer pixels, or is the same as one with as many."""
    one, other = sdata.images[large], sdata.images[small]
    systems = [system for system in shared_systems(one, other) if _cover_the_same(one, other, system)]
    if _n_px(one) < _n_px(other) or not systems:
        return False
    own = {system for system in coordinate_systems(other) if _is_identity(other, system)}
    # as readers place pictures that come with a slide; others' pixels must go together: two samples may overlap
    if any(own - {system} and _is_identity(one, system) for system in systems):
        return True
    return _look_alike(one, other, same_colours=_n_px(one) == _n_px(other))


def _is_identity(element: Any, system: str) -> bool:
    return bool(np.allclose(affine_matrix(element, system), np.eye(3), atol=1e-6))


def _cover_the_same(one: Any, other: Any, system: str) -> bool:
    corners = image_extent(one, system), image_extent(other, system)
    sides = [float(np.hypot(*(c[1:] - c[:-1]).T).max()) for c in corners]
    smallest = min(scale0(other).shape[-2:])
    tolerance = max(_SAME_PLACE * sides[0], _PIXELS * sides[1] / smallest)
    return bool(np.hypot(*(corners[0] - corners[1]).T).max() <= tolerance)


def _look_alike(one: Any, other: Any, *, same_colours: bool) -> bool:
    """Whether pixels over a grid of places go together, or there is nothing to compare."""
    levels = [coarsest(element, 2 * _GRID) for element in (one, other)]
    if same_colours:  # the coarsest levels that have as many pixels, for these are averaged alike
        pairs = [(a, b) for a in levels_of(one) for b in levels_of(other) if a.shape == b.shape]
        levels = list(pairs[-1]) if pairs else [levels_of(one)[0], levels_of(other)[0]]
    if not all(level.shape[-2] * level.shape[-1] <= _MOST_PX and is_cheap_to_look_at(level) for level in levels):
        return not same_colours
    n = int(np.clip(min(levels[1].shape[-2:]) // _CELL_PX, 1, _GRID))
    colours = [_on_grid(level, n) for level in levels]
    if same_colours:
        same = levels[0].dtype == levels[1].dtype and colours[0].shape == colours[1].shape
        return bool(same and np.abs(colours[0] - colours[1]).max() < _SAME)
    grey = [each[:3].mean(axis=0) for each in colours]
    if min(each.std() for each in grey) < _FLAT:
        return True
    return bool(np.corrcoef(grey[0], grey[1])[0, 1] > _ALIKE)


def _on_grid(level: Any, n: int) -> NDArray[np.float64]:
    """Means of a level over n x n cells, (channels, n²)."""
    every = int(np.ceil(np.sqrt(level.shape[-2] * level.shape[-1] / _ENOUGH_PX)))
    pixels = computed(level.data[:, ::every, ::every]).astype(np.float64)
    rows, cols = (np.linspace(0, size, n + 1).astype(int) for size in pixels.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], axis=1), cols[:-1], axis=2)
    return np.asarray(sums / np.outer(np.diff(rows), np.diff(cols))).reshape(len(pixels), -1)


def select_coordinate_system(
    sdata: SpatialData,
    *,
    image_key: str,
    element_key: str | None = None,
    region_keys: Iterable[str] = (),
    coordinate_system: str | None = None,
) -> str:
    """Name of the coordinate system, perhaps an empty one, in which image and regions meet, if it is not given.

    It has `element_key`, and of `region_keys` as many as any; of several, that in units closest to pixels of the image.
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
    candidates.sort(key=lambda system: (*_distance_from_pixels(affine_matrix(image, system)), system))
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


def _distance_from_pixels(matrix: NDArray[np.float64]) -> tuple[float, float]:
    """By how much the unit of a coordinate system differs from a pixel, and its map from the identity."""
    area = abs(np.linalg.det(matrix[:2, :2]))
    return round(float(abs(np.log(area)) if area > 0 else np.inf), 9), round(float(np.abs(matrix - np.eye(3)).max()), 9)


@dataclass(frozen=True)
class KnownSize:
    """µm per unit of a coordinate system, as one element tells it."""

    key: str  # the element
    value: float
    how: str  # a phrase
    tolerance: float  # by what share another value may differ and still be the same

    def agrees(self, value: float) -> bool:
        """Whether this is another value of the same."""
        return abs(value / self.value - 1) <= self.tolerance


def _known_sizes(
    sdata: SpatialData, coordinate_system: str, image_key: str, region_keys: Collection[str]
) -> list[KnownSize]:
    """Sizes that bins tell, coarsest first, else Visium spots: of the regions that are meant, else of others there."""
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
    pitches = np.array(_SPOT_DIAMETERS_UM) * nearest / (2 * float(np.median(shapes["radius"])))
    if (np.abs(pitches / _SPOT_PITCH_UM - 1) >= _SPOT_RATIO_TOLERANCE).all() or last >= 1.2 * nearest:
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

    In this order: `mpp` of the caller, or that the coordinate system is in µm; the object's notes; Visium HD bins;
    Visium spots. `region_keys` are asked before other elements.
    """
    scale = similarity_scale(affine_matrix(sdata.images[image_key], coordinate_system), f"image {image_key!r}")
    known = _known_sizes(sdata, coordinate_system, image_key, region_keys)
    sizes = [replace(size, value=size.value * scale) for size in known]
    if mpp == "coordinate_system":
        value, rule = scale, f"coordinate system {coordinate_system!r}, in µm as mpp='coordinate_system' says"
    elif mpp is not None:
        value, rule = float(mpp), "argument mpp="
    elif (recorded := memory_note(sdata, "mpp", image_key)) is not None:
        value, rule = float(recorded), f"value recorded in {_RECORD}"
        _check_record(value, stored_note(sdata, "mpp", image_key), image_key, sizes)
    else:
        value, rule = _measured(sdata, image_key, coordinate_system, sizes, region_keys)
    if not np.isfinite(value) or value <= 0:
        raise ResolutionError(f"mpp = {value} ({rule}) is not a positive number of µm per pixel. Give mpp=.")
    if mpp is not None and sizes and not any(size.agrees(value) for size in sizes):
        warn(
            f"mpp = {value:.4g} µm/px ({rule}) disagrees with {sizes[0].value:.4g} µm/px, the {sizes[0].how}. "
            "The given value is used."
        )
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
