"""The verbs: fit a model, predict a slide, evaluate a prediction, cross-validate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._cross_validate import CrossValidation, cross_validate
    from ._cross_validate import read_scores as read_scores
    from ._cross_validate import write_scores as write_scores
    from ._evaluate import evaluate
    from ._evaluate import matched_values as matched_values
    from ._evaluate import pooled as pooled
    from ._fit import fit
    from ._predict import predict
    from ._predict import predict_regions as predict_regions
    from ._training_data import Source as Source
    from ._training_data import open_sources as open_sources
    from ._training_data import split_slides as split_slides

__all__ = ["CrossValidation", "cross_validate", "evaluate", "fit", "predict"]

_NAMES = {
    "_cross_validate": ("CrossValidation", "cross_validate", "read_scores", "write_scores"),
    "_evaluate": ("evaluate", "matched_values", "pooled"),
    "_fit": ("fit",),
    "_predict": ("predict", "predict_regions"),
    "_training_data": ("Source", "open_sources", "split_slides"),
}
_LATER = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first use: much of it needs torch, and not all that asks for it does."""
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
