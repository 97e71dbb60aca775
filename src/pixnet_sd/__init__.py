"""Dense gene expression from H&E slides, SpatialData in, SpatialData out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets, errors, get, io, pl, tl
    from ._util import settings
    from .model import PixNet
    from .params import ModelParams, PredictParams, TrainParams

__all__ = [
    "ModelParams",
    "PixNet",
    "PredictParams",
    "TrainParams",
    "__version__",
    "datasets",
    "errors",
    "get",
    "io",
    "pl",
    "settings",
    "tl",
]

__version__: str

_PLACES = dict.fromkeys(("ModelParams", "PredictParams", "TrainParams"), "params")
_PLACES |= {"PixNet": "model", "settings": "_util"}


def __getattr__(name: str) -> Any:
    """Import the rooms on first use, so that ``import pixnet_sd`` loads no torch."""
    if name == "__version__":
        return _version()
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pixnet_sd")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
