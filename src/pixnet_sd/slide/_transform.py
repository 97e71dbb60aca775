"""Maps between pixels and coordinate systems, as 3 x 3 matrices of (x, y, 1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pixnet_sd._errors import ElementError, ResolutionError

from ._elements import coordinate_systems, names

__all__ = ["affine_matrix", "similarity_scale"]

_ANISOTROPY_TOLERANCE = 1e-3
_XY = ("x", "y")


def affine_matrix(element: Any, coordinate_system: str) -> NDArray[np.float64]:
    """Map from an element's own coordinates (of scale 0, for a multiscale raster) to a coordinate system.

    Parameters
    ----------
    element
        Any spatial element.
    coordinate_system
        Name of the target.

    Returns
    -------
    Matrix of (x, y, 1), shape (3, 3).

    Raises
    ------
    ElementError
        If the element is not in that coordinate system.
    """
    systems = coordinate_systems(element)
    if coordinate_system not in systems:
        raise ElementError(
            f"The element has no transformation to coordinate system {coordinate_system!r}; it has {names(systems)}."
        )
    return np.asarray(systems[coordinate_system].to_affine_matrix(_XY, _XY), dtype=np.float64)


def similarity_scale(matrix: ArrayLike, what: str) -> float:
    """Length scale of a similarity (rotation, reflection, uniform scale, translation): sqrt(abs(det A)).

    Parameters
    ----------
    matrix
        Map of (x, y, 1), shape (3, 3).
    what
        What the map belongs to, for the message.

    Returns
    -------
    Units of the target per unit of the source.

    Raises
    ------
    ResolutionError
        If the singular values of the linear part differ by more than 0.1 %, vanish or are not finite.
    """
    linear = np.asarray(matrix, dtype=np.float64)[:2, :2]
    if not np.isfinite(linear).all():
        raise ResolutionError(f"The transformation of {what} holds values that are not finite: {linear.tolist()}.")
    large, small = np.linalg.svd(linear, compute_uv=False)
    if small <= 0 or (large - small) / large > _ANISOTROPY_TOLERANCE:
        raise ResolutionError(
            f"The transformation of {what} scales its two axes differently or shears (singular values {large:.6g} and "
            f"{small:.6g}), so one number of micrometres per pixel does not exist. Only rotation, reflection, uniform "
            "scale and translation are supported: resample the element, or correct its transformation."
        )
    return float(np.sqrt(large * small))
