"""Notes of this package about an object, ``attrs["pixnet_sd"]``, as its store has them by now."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["ATTRS_KEY", "note_of", "remember", "stored_note"]

ATTRS_KEY = "pixnet_sd"


def note_of(notes: Any, section: str, key: str | None = None) -> Any:
    """Read one entry of notes, or a section of them; None where there is none."""
    found = notes.get(section) if isinstance(notes, Mapping) else None
    if key is None:
        return found
    return found.get(key) if isinstance(found, Mapping) else None


def stored_note(sdata: SpatialData, section: str, key: str | None = None) -> Any:
    """Read a note from the store of a backed object, which others may have written to since; else from memory."""
    if not isinstance(sdata.path, Path):
        return note_of(sdata.attrs.get(ATTRS_KEY), section, key)
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        root = json.loads((sdata.path / "zarr.json").read_text(encoding="utf-8"))
        return note_of(root["attributes"].get(ATTRS_KEY), section, key)
    return None


def remember(sdata: SpatialData, section: str, value: Any) -> None:
    """Note a section in memory only, of an object whose store cannot be written."""
    sdata.attrs[ATTRS_KEY] = {**(sdata.attrs.get(ATTRS_KEY) or {}), section: value}
