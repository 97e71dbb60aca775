"""The network, exact aggregation, objectives, and the checkpoint that keeps them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._aggregation import build_operator, count_pixels
    from ._checkpoint import PixNet
    from ._encoder import Encoder, build_encoder, hash_weights
    from ._network import (
        Aggregation,
        Decoder,
        DecoderConfig,
        Factors,
        Head,
        Network,
        apply_head,
        receptive_radius_px,
        sees_whole_tile,
    )
    from ._objectives import Densities, Objective, ObjectiveName, Part, log_normalised, make_objective
    from ._operators import Move, Operator, TiledOperator, staged_array
    from ._record import CHECKSUMS, ModelRecord, library_versions, link_of, outputs_of, read_record

__all__ = [
    "CHECKSUMS",
    "Aggregation",
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
    "ObjectiveName",
    "Operator",
    "Part",
    "PixNet",
    "TiledOperator",
    "apply_head",
    "build_encoder",
    "build_operator",
    "count_pixels",
    "hash_weights",
    "library_versions",
    "link_of",
    "log_normalised",
    "make_objective",
    "outputs_of",
    "read_record",
    "receptive_radius_px",
    "sees_whole_tile",
    "staged_array",
]

_LATER = {
    "Aggregation": "_network",
    "CHECKSUMS": "_record",
    "Decoder": "_network",
    "DecoderConfig": "_network",
    "Densities": "_objectives",
    "Encoder": "_encoder",
    "Factors": "_network",
    "Head": "_network",
    "ModelRecord": "_record",
    "Move": "_operators",
    "Network": "_network",
    "Objective": "_objectives",
    "ObjectiveName": "_objectives",
    "Operator": "_operators",
    "Part": "_objectives",
    "PixNet": "_checkpoint",
    "TiledOperator": "_operators",
    "apply_head": "_network",
    "build_encoder": "_encoder",
    "build_operator": "_aggregation",
    "count_pixels": "_aggregation",
    "hash_weights": "_encoder",
    "library_versions": "_record",
    "link_of": "_record",
    "log_normalised": "_objectives",
    "make_objective": "_objectives",
    "outputs_of": "_record",
    "read_record": "_record",
    "receptive_radius_px": "_network",
    "sees_whole_tile": "_network",
    "staged_array": "_operators",
}


def __getattr__(name: str) -> Any:
    """Import on first use: much of it needs torch, and not all that asks for it does."""
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
