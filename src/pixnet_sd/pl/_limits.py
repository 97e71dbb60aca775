"""Colour limits, as scanpy takes them: numbers, or percentiles of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from numpy.typing import NDArray

__all__ = ["Bound", "colour_norm"]

Bound = float | str | None
"""A number, a percentile such as ``"p99"``, or None for the default percentile."""


def colour_norm(panels: Sequence[NDArray[np.floating]], vmin: Bound, vmax: Bound) -> Normalize:
    """One scale for some panels: percentiles are taken of each, and the widest limits win.

    Parameters
    ----------
    panels
        Values; those that are not finite do not count.
    vmin, vmax
        Limits; None is ``"p1"`` and ``"p99"``.
    """
    finite = [values for panel in panels if len(values := panel[np.isfinite(panel)])]
    low = min((_limit(values, vmin, "p1") for values in finite), default=0.0)
    high = max((_limit(values, vmax, "p99") for values in finite), default=1.0)
    if finite and not low < high and vmax is None:  # all the same: a rare gene, in most bins of which there is nothing
        high = max(float(values.max()) for values in finite)
    return Normalize(low, high if low < high else low + 1.0)


def _limit(values: NDArray[np.floating], bound: Bound, default: str) -> float:
    bound = default if bound is None else bound
    if not isinstance(bound, str):
        return float(bound)
    return float(np.percentile(values, float(bound.removeprefix("p"))))
