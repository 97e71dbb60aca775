"""Micrometres per pixel of the slide image, and which rule says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from pixnet_sd._errors import ResolutionError
from pixnet_sd._logging import logger
from pixnet_sd._warn import warn

from ._elements import coordinate_systems, names
from ._known_sizes import um_per_unit
from ._transform import affine_matrix, similarity_scale

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["find_mpp"]

_PLAUSIBLE = (0.1, 2.0)  # µm/px: from 100x objectives to overviews in which nuclei are still seen
_DISAGREEMENT = 0.1


def find_mpp(
    sdata: SpatialData,
    *,
    image_key: str,
    coordinate_system: str,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
) -> tuple[float, str]:
    """Micrometres per pixel of an image at scale 0.

    In this order: what the caller says; what ``sdata.attrs["pixnet_sd"]["mpp"]`` records for the image; Visium HD bins;
    Visium spots. Every answer is logged with the rule that gave it.

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

    Returns
    -------
    µm per pixel, and a sentence on where it comes from.

    Raises
    ------
    ResolutionError
        If it cannot be told, is outside 0.1-2 µm/px, or the transformation of the image is no similarity.
    """
    scale = similarity_scale(affine_matrix(sdata.images[image_key], coordinate_system), f"image {image_key!r}")
    value, rule = _value(sdata, image_key, coordinate_system, mpp, scale)
    if not np.isfinite(value) or value <= 0:
        raise ResolutionError(f"mpp = {value} ({rule}) is not a positive number of µm per pixel. Give mpp=.")
    if not allow_any_mpp and not _PLAUSIBLE[0] <= value <= _PLAUSIBLE[1]:
        raise ResolutionError(_absurd(value, rule, image_key))
    logger.info("Image %r: %.6g µm per pixel, from the %s.", image_key, value, rule)
    return value, rule


def _value(
    sdata: SpatialData, image_key: str, system: str, mpp: float | Literal["coordinate_system"] | None, scale: float
) -> tuple[float, str]:
    if mpp is not None:
        return _from_caller(sdata, system, mpp, scale)
    recorded = sdata.attrs.get("pixnet_sd", {}).get("mpp", {}).get(image_key)
    if recorded is not None:
        return float(recorded), 'value recorded in sdata.attrs["pixnet_sd"]["mpp"]'
    measured = um_per_unit(sdata, system)
    if measured is None:
        raise ResolutionError(_unknown(sdata, image_key, system))
    # rounded, because the last digits of a fit differ between machines, and results are recognised by their mpp
    return float(f"{measured[0] * scale:.10g}"), measured[1]


def _from_caller(
    sdata: SpatialData, system: str, mpp: float | Literal["coordinate_system"], scale: float
) -> tuple[float, str]:
    if isinstance(mpp, str):
        if mpp != "coordinate_system":
            raise ResolutionError(f"mpp = {mpp!r}: give a number of µm per pixel, or 'coordinate_system'.")
        value, rule = scale, f"coordinate system {system!r}, in µm as mpp='coordinate_system' says"
    else:
        value, rule = float(mpp), "argument mpp="
    measured = um_per_unit(sdata, system)
    if measured is not None and value > 0 and abs(measured[0] * scale / value - 1) > _DISAGREEMENT:
        warn(
            f"mpp = {value:.4g} µm/px ({rule}) disagrees with {measured[0] * scale:.4g} µm/px, the {measured[1]}. "
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
        f"bins (name ending in _008um or alike) and no Visium spots; shapes there: {names(there)}. Give mpp= (see the "
        "scanner's metadata), or mpp='coordinate_system' if that coordinate system is in µm."
    )
