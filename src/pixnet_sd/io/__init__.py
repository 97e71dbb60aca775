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
    from ._read import open_matrix as open_matrix

__all__ = ["convert_visium_hd", "open_store"]

_MODULES = {
    "pixnet_sd.slide.elements": ("open_store",),
    "pixnet_sd.io._convert": ("convert_visium_hd",),
    "pixnet_sd.io._read": ("open_image", "open_matrix", "open_positions", "placed_bins", "read_outlines"),
    "pixnet_sd.io._folder": ("changed_files", "find_files", "is_visium", "is_visium_hd", "visium_advice"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: whether a folder is of Space Ranger is asked where nothing heavy may be imported."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
