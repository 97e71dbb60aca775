"""The verbs: fit a model, predict a slide, evaluate a prediction."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._evaluate import evaluate
    from ._fit import fit
    from ._predict import predict

__all__ = ["evaluate", "fit", "predict"]


def __getattr__(name: str) -> Any:
    """Import a verb on first use: all need torch, but not all that they are made of does, and plots use that."""
    if name in __all__:
        return getattr(import_module(f"._{name}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
