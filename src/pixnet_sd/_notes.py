"""Notes of this package about objects and tables, ``attrs["pixnet_sd"]`` and ``uns["pixnet_sd"]``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialdata import SpatialData


ATTRS_KEY = "pixnet_sd"
TABLE_NOTE = f"uns/{ATTRS_KEY}"  # folder, in that of a table


def note_of(notes: Any, section: str, key: str | None = None) -> Any:
    """Read one entry of notes, or a section of them; None where there is none."""
    entries = notes.get(section) if isinstance(notes, Mapping) else None
    return entries if key is None else note_of(entries, key)


def memory_note(sdata: SpatialData, section: str, key: str | None = None) -> Any:
    """Read a note of an object in memory."""
    return note_of(sdata.attrs.get(ATTRS_KEY), section, key)


def file_note(store: Path, section: str, key: str | None = None) -> Any:
    """Read a note from the root of a store."""
    root = json.loads((store / "zarr.json").read_text(encoding="utf-8"))
    return note_of(note_of(root, "attributes", ATTRS_KEY), section, key)


def stored_note(sdata: SpatialData, section: str, key: str | None = None) -> Any:
    """Read a note from the store of a backed object, which others may have written to since; else from memory."""
    if not isinstance(sdata.path, Path):
        return memory_note(sdata, section, key)
    with contextlib.suppress(OSError, ValueError):
        return file_note(sdata.path, section, key)
    return None


def remember(sdata: SpatialData, section: str, value: Any) -> None:
    """Note a section in memory only, of an object whose store cannot be written."""
    sdata.attrs[ATTRS_KEY] = {**(sdata.attrs.get(ATTRS_KEY) or {}), section: value}


def table_note(table: Any) -> Any:
    """Read what this package noted in a table that it wrote; None for any other."""
    return table.uns.get(ATTRS_KEY)


def table_uns(note: Any) -> dict[str, Any]:
    """Make the entry of ``uns`` that holds a table's note."""
    return {ATTRS_KEY: note}
