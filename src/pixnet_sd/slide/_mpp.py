"""Micrometres per pixel of the slide image, and which rule says so."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pixnet_sd._errors import ResolutionError
from pixnet_sd._notes import ATTRS_KEY, note_of, stored_note
from pixnet_sd._warn import warn

from ._elements import coordinate_systems, names
from ._known_sizes import KnownSize, agreed, known_sizes
from ._select import other_slides
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["find_mpp"]

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
