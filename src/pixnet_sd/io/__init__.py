"""Ways in: a Space Ranger folder to a store, in streams, and a store opened without what is big in it."""

from __future__ import annotations

from pixnet_sd.slide import open_store

from ._convert import convert_visium_hd

__all__ = ["convert_visium_hd", "open_store"]
