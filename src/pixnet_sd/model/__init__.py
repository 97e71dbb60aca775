"""The network, exact aggregation, objectives, and the checkpoint that keeps them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._aggregation import build_operator, count_pixels
    from ._checkpoint import PixNet, dispersion_of, gene_columns
    from ._encoder import Encoder, build_encoder, hash_weights
    from ._network import (
        Decoder,
        Factors,
        Head,
        Network,
        apply_head,
        receptive_radius_px,
        sees_whole_tile,
    )
    from ._objectives import (
        ENOUGH_COUNTS,
        Densities,
        Objective,
        Part,
        Totals,
        log_normalised,
        make_objective,
        pearson_per_gene,
    )
    from ._operators import Move, Operator, SparseOperator, TiledOperator, sharing_pixels, staged_array
    from ._record import CHECKSUMS, DecoderConfig, ModelRecord, library_versions, link_of, outputs_of, read_record

__all__ = [
    "CHECKSUMS",
    "ENOUGH_COUNTS",
    "Decoder",
    "DecoderConfig",
    "Densities",
    "Encoder",
    "Factors",
    "Head",
    "ModelRecord",
    "Move",
    "Network",
    "Objective",
    "Operator",
    "Part",
    "PixNet",
    "SparseOperator",
    "TiledOperator",
    "Totals",
    "apply_head",
    "build_encoder",
    "build_operator",
    "count_pixels",
    "dispersion_of",
    "gene_columns",
    "hash_weights",
    "library_versions",
    "link_of",
    "log_normalised",
    "make_objective",
    "outputs_of",
    "pearson_per_gene",
    "read_record",
    "receptive_radius_px",
    "sees_whole_tile",
    "sharing_pixels",
    "staged_array",
]

_MODULES = ("_record", "_operators", "_aggregation", "_encoder", "_objectives", "_network", "_checkpoint")


def __getattr__(name: str) -> Any:
    """Import on first use: all but the record needs torch, and not all that asks for the record has it loaded."""
    if name in __all__:
        for module in _MODULES:  # each imports only modules before it, the cheapest come first
            room = import_module(f".{module}", __name__)
            if hasattr(room, name):
                return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
