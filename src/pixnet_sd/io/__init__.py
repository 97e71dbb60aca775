"""Ways in: a Space Ranger folder to a store, in streams, and a store opened without what is big in it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixnet_sd.slide.elements import open_store

    from ._convert import convert_visium_hd
    from ._folder import changed_files as changed_files
    from ._folder import find_files as find_files
    from ._folder import is_visium as is_visium
    from ._folder import is_visium_hd as is_visium_hd
    from ._folder import visium_advice as visium_advice
    from ._matrix import open_matrix as open_matrix

__all__ = ["convert_visium_hd", "open_store"]

_LATER = {
    "open_store": "pixnet_sd.slide.elements",
    "changed_files": "pixnet_sd.io._folder",
    "convert_visium_hd": "pixnet_sd.io._convert",
    "find_files": "pixnet_sd.io._folder",
    "is_visium": "pixnet_sd.io._folder",
    "is_visium_hd": "pixnet_sd.io._folder",
    "open_matrix": "pixnet_sd.io._matrix",
    "visium_advice": "pixnet_sd.io._folder",
}


def __getattr__(name: str) -> Any:
    """Import on first use: much of it needs torch, and not all that asks for it does."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
