"""Whether an element in a store is, file by file, what this package wrote: so a call can know its own results again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._fingerprint import content_sha256, files_sha256

from ._disk import local_store, read_json, work_folder
from ._planted import check_plain
from ._provenance import ATTRS_KEY, merged_notes
from ._read_back import read_back

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["WRITTEN", "attach_written", "element_stamp", "image_stamp", "written_by"]

WRITTEN = "written"
"""Section of the notes: element name → stamp."""


def element_stamp(element: Path) -> str:
    """Hash names, sizes and dates of all files of an element on disk: anything that is written there changes it.

    Raises
    ------
    StoreError
        When there is a link or the like in the element.
    """
    check_plain(element)
    return files_sha256(element)[0]


def image_stamp(image: Any) -> str:
    """Hash the finest level of a multiscale image in memory, channel by channel."""
    pixels = image["scale0"]["image"].data
    return content_sha256(*(np.asarray(pixels[k]) for k in range(pixels.shape[0])))


def written_by(sdata: SpatialData, section: str, key: str, identity: str, names: Mapping[str, str]) -> bool:
    """Whether the store holds the results of a call with this identity, untouched since.

    Parameters
    ----------
    sdata
        The object; False for one in memory.
    section, key
        Where the call notes itself (``"tables"``, name of the table).
    identity
        Of the call, as noted there under ``"identity"``.
    names
        Element name → element type of its results.
    """
    store = local_store(sdata)
    if store is None:
        return False
    notes = _notes(store)
    note = _mapping(_mapping(notes.get(section)).get(key))
    return note.get("identity") == identity and len(_untouched(store, notes, names)) == len(names)


def attach_written(sdata: SpatialData, names: Mapping[str, str], *, again: bool = False) -> None:
    """Read what this package wrote and the object lacks, as after Ctrl-C between the store and the object.

    Parameters
    ----------
    sdata
        The object; one in memory has no store to lack anything of.
    names
        Element name → element type of those that are wanted; images and labels come lazily.
    again
        Whether those that the object has are read again, too.
    """
    store = local_store(sdata)
    if store is None:
        return
    lacking = {name: kind for name, kind in names.items() if again or name not in getattr(sdata, kind)}
    notes = _notes(store) if lacking else {}
    untouched = _untouched(store, notes, lacking)
    if untouched:
        read_back(sdata, store, untouched, scratch=work_folder(store))
        sdata.attrs[ATTRS_KEY] = merged_notes(notes, sdata.attrs.get(ATTRS_KEY), {})


def _untouched(store: Path, notes: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    stamps = _mapping(notes.get(WRITTEN))
    return {
        name: kind
        for name, kind in names.items()
        if name in stamps and (store / kind / name).is_dir() and element_stamp(store / kind / name) == stamps[name]
    }


def _notes(store: Path) -> Mapping[str, Any]:
    return _mapping(_mapping(read_json(store / "zarr.json").get("attributes")).get(ATTRS_KEY))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
