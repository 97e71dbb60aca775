"""Ways in: a Space Ranger folder to a store, in streams, and a store opened without what is big in it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._folder import changed_files as changed_files
from ._folder import find_files as find_files
from ._folder import is_visium as is_visium
from ._folder import is_visium_hd as is_visium_hd
from ._folder import visium_advice as visium_advice

if TYPE_CHECKING:
    from pixnet_sd.slide.elements import open_store

    from ._convert import convert_visium_hd
    from ._read import open_matrix as open_matrix

__all__ = ["convert_visium_hd", "open_store"]

_LATER = {"convert_visium_hd": "pixnet_sd.io._convert", "open_store": "pixnet_sd.slide.elements"}
_READ = ("open_image", "open_matrix", "placed_bins", "read_outlines")
_LATER |= dict.fromkeys(_READ, "pixnet_sd.io._read")


def __getattr__(name: str) -> Any:
    """Import on first use: whether a folder is of Space Ranger is asked where nothing heavy may be imported."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
