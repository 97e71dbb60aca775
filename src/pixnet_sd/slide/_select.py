"""Which image is the slide, and in which coordinate system it meets the other elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._errors import ElementError
from pixnet_sd._logging import logger

from ._elements import coordinate_systems, describe_images, names, region_element, scale0, written_by_pixnet
from ._transform import affine_matrix

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["select_coordinate_system", "select_image"]

_FULL_IMAGE = "_full_image"
_RGB_NAMES = {"r", "g", "b", "a", "red", "green", "blue", "alpha", "0", "1", "2", "3"}


def select_image(sdata: SpatialData, *, image_key: str | None = None, coordinate_system: str | None = None) -> str:
    """The slide image: the one named, or the only one that can be meant.

    Images that pixnet_sd wrote are never meant, and images that are not RGB only when no other is there. Where the
    images share a coordinate system and exactly one is called ``*_full_image``, it is the slide: the readers of
    spatialdata-io put smaller copies of it beside it.

    Parameters
    ----------
    sdata
        The object to look in.
    image_key
        Name of the image, if it is not to be found.
    coordinate_system
        Only images in this coordinate system are considered.

    Returns
    -------
    Name of an image element.

    Raises
    ------
    ElementError
        If there is no image, none fits, or several do.
    """
    if image_key is not None:
        _check_image(sdata, image_key, coordinate_system)
        return image_key
    candidates = _image_candidates(sdata, coordinate_system)
    if len(candidates) == 1:
        return candidates[0]
    full = _full_image_of(sdata, candidates)
    if full is None:
        raise ElementError(
            f"Several images could be the slide: {describe_images(sdata, candidates)}. Name one with image_key=."
        )
    logger.info("Image %r taken as the slide; %s are smaller copies.", full, names(k for k in candidates if k != full))
    return full


def _check_image(sdata: SpatialData, image_key: str, coordinate_system: str | None) -> None:
    if image_key not in sdata.images:
        is_other = f" ({image_key!r} is another kind of element)" if image_key in sdata else ""
        raise ElementError(
            f"There is no image {image_key!r}{is_other}. Images: {names(sdata.images)}. Check image_key=."
        )
    systems = coordinate_systems(sdata.images[image_key])
    if coordinate_system is not None and coordinate_system not in systems:
        raise ElementError(
            f"Image {image_key!r} is not in coordinate system {coordinate_system!r}, but in {names(systems)}. Check "
            "coordinate_system=."
        )


def _image_candidates(sdata: SpatialData, coordinate_system: str | None) -> list[str]:
    own = written_by_pixnet(sdata)
    there = [key for key in sdata.images if key not in own]
    if not there:
        found = f" Only images written by pixnet_sd were found: {names(sdata.images)}." if len(sdata.images) else ""
        raise ElementError(f"The SpatialData object has no slide image.{found} Add the H&E image with Image2DModel.")
    if coordinate_system is not None:
        placed = [key for key in there if coordinate_system in coordinate_systems(sdata.images[key])]
        if not placed:
            raise ElementError(
                f"No image is in coordinate system {coordinate_system!r}: {describe_images(sdata, there)}. Check "
                "coordinate_system=."
            )
        there = placed
    return [key for key in there if _looks_rgb(sdata.images[key])] or there


def _looks_rgb(element: Any) -> bool:
    image = scale0(element)
    if image.sizes["c"] not in (3, 4):
        return False
    return all(str(name).lower() in _RGB_NAMES for name in image.coords["c"].values) if "c" in image.coords else True


def _full_image_of(sdata: SpatialData, candidates: list[str]) -> str | None:
    """The one full-resolution image of which every other candidate is a copy, if it is so."""
    full = [key for key in candidates if key.endswith(_FULL_IMAGE)]
    if len(full) != 1:
        return None
    systems = set(coordinate_systems(sdata.images[full[0]]))
    shares = (not systems.isdisjoint(coordinate_systems(sdata.images[key])) for key in candidates)
    return full[0] if all(shares) else None


def select_coordinate_system(
    sdata: SpatialData,
    *,
    image_key: str,
    element_key: str | None = None,
    coordinate_system: str | None = None,
) -> str:
    """The coordinate system in which image and regions meet.

    Of several, the one whose units are closest to pixels of the image: no scale first, then nearest to the identity,
    then by name.

    Parameters
    ----------
    sdata
        The object to look in.
    image_key
        Name of the slide image.
    element_key
        Shapes or labels that must be in it too.
    coordinate_system
        The one to use, if it is not to be found.

    Returns
    -------
    Name of a coordinate system; it may be the empty string.

    Raises
    ------
    ElementError
        If the elements share none, or are not both in the one asked for.
    """
    image_systems = coordinate_systems(sdata.images[image_key])
    shared = set(image_systems)
    found = f"Image {image_key!r} is in {names(image_systems)}"
    if element_key is not None:
        element_systems = coordinate_systems(region_element(sdata, element_key))
        shared &= set(element_systems)
        found += f", element {element_key!r} in {names(element_systems)}"
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ElementError(
                f"Coordinate system {coordinate_system!r} is not shared. {found}. Check coordinate_system=."
            )
        return coordinate_system
    if not shared:
        raise ElementError(
            f"There is no shared coordinate system. {found}. Align them with "
            "spatialdata.transformations.set_transformation."
        )
    return min(shared, key=lambda system: (*_distance_from_pixels(sdata.images[image_key], system), system))


def _distance_from_pixels(image: Any, system: str) -> tuple[float, float]:
    matrix = affine_matrix(image, system)
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    log_scale = abs(np.log(scale)) if scale > 0 else np.inf
    return round(float(log_scale), 9), round(float(np.abs(matrix - np.eye(3)).max()), 9)
