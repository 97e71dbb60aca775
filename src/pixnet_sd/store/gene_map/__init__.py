"""The gene map as an image element: layout, writer, reader, factors."""

from __future__ import annotations

from ._gene_map import (
    FactorHead,
    GeneMapReader,
    GeneMapWriter,
    check_not_rewritten,
    factor_names,
    factors_key,
    head_key,
    is_as_written,
    open_map,
    read_head,
)
from ._layout import estimate_bytes
from ._writer import image_pyramid, image_transforms, map_key, tissue_labels

__all__ = [
    "FactorHead",
    "GeneMapReader",
    "GeneMapWriter",
    "check_not_rewritten",
    "estimate_bytes",
    "factor_names",
    "factors_key",
    "head_key",
    "image_pyramid",
    "image_transforms",
    "is_as_written",
    "map_key",
    "open_map",
    "read_head",
    "tissue_labels",
]
