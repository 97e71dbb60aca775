"""The gene map as an image element: layout, writer, reader, factors."""

from __future__ import annotations

from ._element import (
    FactorHead,
    MapLayout,
    check_not_rewritten,
    factor_names,
    factors_key,
    head_key,
    image_pyramid,
    image_transforms,
    is_as_written,
    map_key,
    map_layout,
    map_transforms,
    open_map,
    read_head,
    tissue_labels,
)
from ._writer import GeneMapWriter

__all__ = [
    "FactorHead",
    "GeneMapWriter",
    "MapLayout",
    "check_not_rewritten",
    "factor_names",
    "factors_key",
    "head_key",
    "image_pyramid",
    "image_transforms",
    "is_as_written",
    "map_key",
    "map_layout",
    "map_transforms",
    "open_map",
    "read_head",
    "tissue_labels",
]
