"""The verbs: fit a model, predict a slide, evaluate a prediction."""

from __future__ import annotations

from ._evaluate import evaluate
from ._fit import fit
from ._predict import predict

__all__ = ["evaluate", "fit", "predict"]
