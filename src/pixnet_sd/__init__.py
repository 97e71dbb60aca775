"""Dense gene expression from H&E slides, SpatialData in, SpatialData out."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets, errors, get, io, pl, tl
    from ._settings import settings
    from .store import PixNet

__all__ = ["PixNet", "__version__", "datasets", "errors", "get", "io", "pl", "settings", "tl"]

try:
    __version__ = version("pixnet_sd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import the rooms on first use, so that ``import pixnet_sd`` loads no torch."""
    if name in ("datasets", "errors", "get", "io", "pl", "tl"):
        return importlib.import_module(f".{name}", __name__)
    if name == "PixNet":
        return importlib.import_module(".store", __name__).PixNet
    if name == "settings":
        return importlib.import_module("._settings", __name__).settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
