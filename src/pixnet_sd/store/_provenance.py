"""What pixnet_sd notes about its results, in ``sdata.attrs["pixnet_sd"]``.

Attributes of images are not saved by SpatialData; those of the object are, in the root ``zarr.json``. Only our own
key is written there, by replacing that file in one step: `SpatialData.write_attrs` would also write every other
attribute that the user has in memory, and fail on one that is not JSON.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._errors import StoreError
from pixnet_sd._notes import ATTRS_KEY, note_of, stored_note
from pixnet_sd._schemas import check_notes

from ._disk import hold_lock, local_store, read_json, sweep_drafts, work_folder, write_json

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["ATTRS_KEY", "json_safe", "merged_notes", "record", "recorded", "stored_note"]


def record(sdata: SpatialData, section: str, key: str | None, info: Any) -> None:
    """Note ``info`` under ``sdata.attrs["pixnet_sd"][section][key]``, and in the store of a backed object.

    Parameters
    ----------
    sdata
        The object; its attributes are changed in place.
    section
        ``"mpp"``, ``"maps"``, ``"tables"``, ``"model"`` …
    key
        Element name, or None to note ``info`` as the section itself (``"model"``: a path).
    info
        Anything that JSON can hold, and NumPy scalars and arrays, paths, tuples; a mapping that is there already is
        replaced, not merged.

    Raises
    ------
    StoreError
        When the store cannot be written.
    """
    notes = {section: info if key is None else {key: info}}
    store = local_store(sdata)
    if store is None:
        sdata.attrs[ATTRS_KEY] = merged_notes({}, sdata.attrs.get(ATTRS_KEY), notes)
        return
    scratch = work_folder(store)
    with hold_lock(scratch / "lock", wait_s=60, busy=f"Another run is writing into {store}; try again later."):
        sweep_drafts(scratch)
        root = read_json(store / "zarr.json")
        attributes = root.setdefault("attributes", {})
        attributes[ATTRS_KEY] = merged_notes(attributes.get(ATTRS_KEY), sdata.attrs.get(ATTRS_KEY), notes)
        try:
            write_json(store / "zarr.json", root, scratch=scratch)
        except OSError as error:
            raise StoreError(f"{store / 'zarr.json'} cannot be replaced: {error.strerror or error}.") from error
    sdata.attrs[ATTRS_KEY] = attributes[ATTRS_KEY]


def recorded(sdata: SpatialData, section: str, key: str | None = None) -> Any:
    """What `record` noted in the object in memory, or None."""
    return note_of(sdata.attrs.get(ATTRS_KEY), section, key)


def merged_notes(on_disk: Any, in_memory: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge notes: over those in memory, which may be old, those of the store, over both the new ones.

    Micrometres per pixel are the user's to set in memory, and go over those of the store.
    """
    stored, remembered = check_notes(on_disk), check_notes(in_memory)
    merged = _two_levels(_two_levels(remembered, stored), {"mpp": remembered["mpp"]} if "mpp" in remembered else {})
    safe = json_safe(_two_levels(merged, new))
    return dict(safe)


def _two_levels(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section, key by key; what lies below a key is replaced whole."""
    merged = dict(base)
    for section, value in over.items():
        old = merged.get(section)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[section] = {**old, **value}
        else:
            merged[section] = value
    return merged


def json_safe(value: Any) -> Any:
    """``value`` as plain JSON types: NumPy becomes lists and numbers, paths text, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return json_safe(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [json_safe(v) for v in value]
    if isinstance(value, os.PathLike):
        return str(Path(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    raise StoreError(f"Cannot note a {type(value).__name__} in sdata.attrs[{ATTRS_KEY!r}]: it is not JSON.")
