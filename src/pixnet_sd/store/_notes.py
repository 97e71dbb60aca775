"""What pixnet_sd notes about its results, in ``sdata.attrs["pixnet_sd"]``.

Attributes of images are not saved by SpatialData; those of the object are, in the root ``zarr.json``. Only our own
key is written there, by replacing that file in one step: `SpatialData.write_attrs` would also write every other
attribute that the user has in memory, and fail on one that is not JSON.

What lies in a store, into the object in memory: only the elements that are named.

Whether an element in a store is, file by file, what this package wrote: so a call can know its own results again.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import spatialdata as sd
import zarr

from pixnet_sd._fingerprint import content_sha256, files_sha256
from pixnet_sd._notes import ATTRS_KEY, note_of, stored_note
from pixnet_sd._schemas import check_notes
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

from ._disk import check_plain, hold_lock, local_store, read_json, size_text, sweep_drafts, work_folder, write_json

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = [
    "ATTRS_KEY",
    "WRITTEN",
    "attach_written",
    "element_stamp",
    "image_stamp",
    "json_safe",
    "merged_notes",
    "read_back",
    "record",
    "recorded",
    "stored_note",
    "written_by",
]


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


MAX_READ_BYTES = 2**30
"""Tables and shapes that are larger in memory stay on disk."""

_SHAPE_BYTES = 400  # of a square as an object in memory; a circle takes less

_RASTERS = ("images", "labels")


def read_back(sdata: SpatialData, store: Path, names: Mapping[str, str], *, scratch: Path) -> None:
    """Replace elements in memory by what is in the store now.

    Images and labels come lazily, tables and shapes of up to 1 GiB as a whole. Larger ones are left on disk, and no
    table, shapes or points of the user are read.

    Parameters
    ----------
    sdata
        The object.
    store
        Its store.
    names
        Element name → element type.
    scratch
        Folder for a few links; on any file system that has them.
    """
    rasters = {name: kind for name, kind in names.items() if kind in _RASTERS}
    _read_rasters(sdata, store, rasters)
    # shapes before the tables that annotate them
    for name, kind in sorted(names.items(), key=lambda item: item[1]):
        if kind not in _RASTERS and (store / kind / name).is_dir():
            _read_whole(sdata, store, kind, name, scratch)


def _read_rasters(sdata: SpatialData, store: Path, names: Mapping[str, str]) -> None:
    if not names:
        return
    fresh = sd.read_zarr(store, selection=tuple(set(names.values())))
    for name, kind in names.items():
        if name in getattr(fresh, kind):
            getattr(sdata, kind)[name] = getattr(fresh, kind)[name]


def _read_whole(sdata: SpatialData, store: Path, kind: str, name: str, scratch: Path) -> None:
    """Read a table or shapes, unless they are too large."""
    size = _memory_bytes(store / kind / name, kind)
    elements: Any = getattr(sdata, kind)
    if size <= MAX_READ_BYTES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The table is annotating")
            elements[name] = _alone(store, kind, name, scratch)
        return
    if name in elements:
        del elements[name]  # what it replaced
    how = f"anndata.experimental.read_lazy({str(store / kind / name)!r})" if kind == "tables" else ""
    logger.info(
        "%s[%r] takes %s and was left on disk; spatialdata.read_zarr(%r) reads it%s.",
        *(kind, name, size_text(size), str(store), f" whole, {how} in parts" if how else ""),
    )


def _alone(store: Path, kind: str, name: str, scratch: Path) -> Any:
    """One element, as spatialdata's own reader gives it: of a store that links to nothing else."""
    scratch.mkdir(parents=True, exist_ok=True)
    view = Path(tempfile.mkdtemp(prefix="view-", dir=scratch))
    try:
        root = {key: value for key, value in read_json(store / "zarr.json").items() if key != "consolidated_metadata"}
        write_json(view / "zarr.json", root, scratch=view)
        (view / kind).mkdir()
        shutil.copy(store / kind / "zarr.json", view / kind)
        (view / kind / name).symlink_to((store / kind / name).resolve(), target_is_directory=True)
        return getattr(sd.read_zarr(view, selection=(kind,)), kind)[name]
    finally:
        shutil.rmtree(view, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.rmdir()  # only when nothing is left in it


def _memory_bytes(element: Path, kind: str) -> int:
    """About what an element will take in memory."""
    if kind == "tables":
        x = zarr.open_group(str(element), mode="r")["X"]
        return int(x.nbytes) if isinstance(x, zarr.Array) else 0
    if kind == "shapes":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(element / "shapes.parquet").num_rows) * _SHAPE_BYTES
    return 0


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
