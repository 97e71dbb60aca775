"""The coordinate system in which the slide image meets the other elements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._errors import ElementError

from ._elements import coordinate_systems, names, region_element
from ._extent import moved_px, shared_systems
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["select_coordinate_system"]

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
