"""Which image is the slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._errors import ElementError
from pixnet_sd._logging import logger

from ._channels import Naming, naming_of
from ._copies import is_copy
from ._elements import coordinate_systems, describe_images, names, scale0, written_by_pixnet
from ._extent import overlap
from ._image import is_cheap_to_look_at
from ._look import is_bright_field, levels_of, pixel_sample

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["other_slides", "select_image"]


def select_image(sdata: SpatialData, *, image_key: str | None = None, coordinate_system: str | None = None) -> str:
    """Find the slide image: the one named, or the only one that can be meant.

    Images that pixnet_sd wrote are never meant. Of others those come first that look like H&E: three channels that are
    named as colours, or not named, on a bright ground, or that are named otherwise and bright. Of several the one is
    taken of which all others are smaller copies, as the readers of spatialdata-io put them beside it: they cover the
    same place in a coordinate system that they share, and look the same.

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
    there = _placed_images(sdata, coordinate_system)
    looks = {key: _Looks.of(sdata.images[key]) for key in there}
    likely = _likely(looks)
    if len(likely) > 1:
        full = _full_image_of(sdata, likely)
        if full is None:
            why = {key: look.describe() for key, look in looks.items() if key in likely}
            raise ElementError(
                f"Several images could be the slide: {describe_images(sdata, why)}. Name one with image_key=."
            )
        copies = names(key for key in likely if key != full)
        logger.info("Image %r taken as the slide; %s are copies of it.", full, copies)
        likely = [full]
    beside = {key: look.describe() for key, look in looks.items() if look.rank > looks[likely[0]].rank}
    if any(_is_rgb(looks[key]) for key in beside):
        logger.info("Image %r taken as the slide; not H&E: %s.", likely[0], describe_images(sdata, beside))
    return likely[0]


def other_slides(sdata: SpatialData, *, image_key: str, coordinate_system: str) -> list[str]:
    """Images that overlap one in a coordinate system, look like H&E, and are not copies of it."""
    others = [key for key in _placed_images(sdata, coordinate_system) if key != image_key]
    others = [key for key in others if overlap(sdata.images[image_key], sdata.images[key], coordinate_system)]
    whole = [key for key in others if is_copy(sdata, key, image_key)]  # of which the image is a copy
    others = [key for key in others if not any(is_copy(sdata, large, key) for large in (image_key, *whole))]
    others = [key for key in others if _Looks.of(sdata.images[key]).rank == 0]
    copies = {small for small in others for large in others if small != large and is_copy(sdata, large, small)}
    return [key for key in others if key not in copies] or others[:1]


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


def _placed_images(sdata: SpatialData, coordinate_system: str | None) -> list[str]:
    """Images that are not ours, in a coordinate system."""
    own = written_by_pixnet(sdata)
    there = [key for key in sdata.images if key not in own]
    if not there:
        found = f" Only images written by pixnet_sd were found: {names(sdata.images)}." if len(sdata.images) else ""
        raise ElementError(f"The SpatialData object has no slide image.{found} Add the H&E image with Image2DModel.")
    if coordinate_system is None:
        return there
    placed = [key for key in there if coordinate_system in coordinate_systems(sdata.images[key])]
    if not placed:
        raise ElementError(
            f"No image is in coordinate system {coordinate_system!r}: "
            f"{describe_images(sdata, dict.fromkeys(there, ''))}. Check coordinate_system=."
        )
    return placed


@dataclass(frozen=True)
class _Looks:
    """What speaks for an image being H&E.

    Attributes
    ----------
    naming
        What its channels' names say.
    is_bright
        Whether its pixels are bright-field; None if that cannot be told.
    """

    naming: Naming
    is_bright: bool | None

    @classmethod
    def of(cls, element: Any) -> _Looks:
        image = scale0(element)
        if image.dims != ("c", "y", "x"):
            return cls("other", None)
        naming = naming_of(image.coords["c"].values.tolist() if "c" in image.coords else range(image.sizes["c"]))
        looked_at = naming in ("rgb", "numbered", "unknown") and is_cheap_to_look_at(levels_of(element)[-1])
        return cls(naming, is_bright_field(pixel_sample(element)) if looked_at else None)

    @property
    def rank(self) -> int:
        """0 for what looks like H&E, then what is named so, then three or four other channels, then anything else."""
        is_named = self.naming in ("rgb", "numbered")
        if self.is_bright is not False and (is_named or (self.naming == "unknown" and self.is_bright)):
            return 0
        return 1 if is_named else 3 if self.naming in ("other", "stains") else 2

    def describe(self) -> str:
        """In words, for a message."""
        said = {"stains": "channels named as stains", "unknown": "channels not named as colours", "other": ""}
        looks = {True: "bright as H&E", False: "dark as fluorescence", None: ""}
        return ", ".join(filter(None, (said.get(self.naming, ""), looks[self.is_bright])))


def _is_rgb(looks: _Looks) -> bool:
    return looks.naming in ("rgb", "numbered")


def _likely(looks: dict[str, _Looks]) -> list[str]:
    best = min(look.rank for look in looks.values())
    return [key for key, look in looks.items() if look.rank == best]


def _full_image_of(sdata: SpatialData, candidates: Sequence[str]) -> str | None:
    """The one image of which every other candidate is a copy; of as many pixels, one with more levels."""
    by_size = sorted(candidates, key=lambda key: (-_n_pixels(sdata, key), -len(levels_of(sdata.images[key]))))
    for largest in (key for key in by_size if _n_pixels(sdata, key) == _n_pixels(sdata, by_size[0])):
        if all(is_copy(sdata, largest, key) for key in candidates if key != largest):
            return largest
    return None


def _n_pixels(sdata: SpatialData, key: str) -> int:
    return int(np.prod(scale0(sdata.images[key]).shape[-2:]))
