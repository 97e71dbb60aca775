"""From the output folder of an instrument to a SpatialData store, in streams."""

from __future__ import annotations

from ._convert import convert_visium_hd

__all__ = ["convert_visium_hd"]
