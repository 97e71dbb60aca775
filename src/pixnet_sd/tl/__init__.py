"""The verbs: fit a model, predict a slide, evaluate a prediction, cross-validate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._cross_validate import CrossValidation, cross_validate
    from ._evaluate import evaluate
    from ._fit import fit
    from ._predict import predict

__all__ = ["CrossValidation", "cross_validate", "evaluate", "fit", "predict"]


def __getattr__(name: str) -> Any:
    """Import a verb on first use: all need torch, but not all that they are made of does, and plots use that."""
    if name in __all__:
        module = "cross_validate" if name == "CrossValidation" else name
        return getattr(import_module(f"._{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
