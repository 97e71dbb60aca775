"""Device and tiles: what training and prediction share. Knows no SpatialData."""

from __future__ import annotations

from ._device import (
    AHEAD,
    BLOCK_WRITERS,
    Buffers,
    Copies,
    Writer,
    fixed_shapes,
    freed_memory,
    make_fabric,
    prefetch,
    two_threads,
)
from ._tiles import (
    ALIGN_PX,
    MARGIN_SHARE,
    N_SYMMETRIES,
    MeasuredRegions,
    ReadTile,
    Tile,
    TrainingSlide,
    TrainingTiles,
    apply_symmetry,
    jitter_stain,
    training_tiles,
    undo_symmetry,
)

__all__ = [
    "AHEAD",
    "ALIGN_PX",
    "BLOCK_WRITERS",
    "MARGIN_SHARE",
    "N_SYMMETRIES",
    "Buffers",
    "Copies",
    "MeasuredRegions",
    "ReadTile",
    "Tile",
    "TrainingSlide",
    "TrainingTiles",
    "Writer",
    "apply_symmetry",
    "fixed_shapes",
    "freed_memory",
    "jitter_stain",
    "make_fabric",
    "prefetch",
    "training_tiles",
    "two_threads",
    "undo_symmetry",
]
