"""Notes about results, in ``sdata.attrs["pixnet_sd"]`` and the store's root, and what they say of elements on disk.

Only our own key of the root ``zarr.json`` is written, by replacing that file in one step: `SpatialData.write_attrs`
would also write every other attribute that the user has in memory, and fail on one that is not JSON.
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
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import spatialdata as sd
import zarr
from spatialdata import SpatialData

from pixnet_sd._fingerprint import content_sha256, files_sha256
from pixnet_sd._notes import ATTRS_KEY, note_of
from pixnet_sd._schemas import check_notes
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

from ._disk import local_store, lock_store, plain_files, read_json, size_text, work_folder, write_json

WRITTEN = "written"  # section of the notes: element name → stamp


def record(sdata: SpatialData, section: str, key: str | None, info: Any) -> None:
    """Note ``info`` in place of ``sdata.attrs["pixnet_sd"][section][key]``, and in the store of a backed object.

    The section is ``"mpp"``, ``"maps"``, ``"model"`` …, the key an element's name, or None for the section itself.
    """
    notes = {section: info if key is None else {key: info}}
    store = local_store(sdata)
    if store is None:
        merge_notes(sdata.attrs, sdata, notes)
        return
    with lock_store(store, wait_s=60):
        root = read_json(store / "zarr.json")
        merge_notes(root.setdefault("attributes", {}), sdata, notes)
        try:
            write_json(store / "zarr.json", root, scratch=work_folder(store))
        except OSError as error:
            raise StoreError(f"{store / 'zarr.json'} cannot be replaced: {error.strerror or error}.") from error
    sdata.attrs[ATTRS_KEY] = root["attributes"][ATTRS_KEY]


def merge_notes(attributes: dict[str, Any], sdata: SpatialData, new: Mapping[str, Any]) -> None:
    """Merge notes into attributes: over those of the object, which may be old, theirs, over both the new ones."""
    stored, remembered = check_notes(attributes.get(ATTRS_KEY)), check_notes(sdata.attrs.get(ATTRS_KEY))
    merged = dict(remembered)
    # micrometres per pixel are the user's to set in memory
    for over in (stored, {"mpp": remembered["mpp"]} if "mpp" in remembered else {}, new):
        for section, value in over.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(section), Mapping)
            merged[section] = {**merged[section], **value} if both else value
    if merged:
        attributes[ATTRS_KEY] = json_safe(merged)


def take_notes(sdata: SpatialData, store: Path) -> None:
    """Give an object the notes that its store has."""
    if notes := _stored_notes(store):
        sdata.attrs[ATTRS_KEY] = notes


def json_safe(value: Any) -> Any:
    """Turn ``value`` into JSON types: NumPy becomes lists and numbers, paths text, NaN and infinities None."""
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


MAX_READ_BYTES = 2**30  # tables and shapes that are larger in memory stay on disk
_SHAPE_BYTES = 400  # of a square as an object in memory; a circle takes less


def read_back(sdata: SpatialData, store: Path, names: Mapping[str, str], *, scratch: Path) -> None:
    """Replace elements in memory, element name → type, by what is in the store now.

    Images and labels come lazily, tables and shapes of up to 1 GiB as a whole; larger ones are left on disk. No table,
    shapes or points of the user are read. ``scratch`` is a folder for a few links.
    """
    rasters = {"images", "labels"} & set(names.values())
    fresh = sd.read_zarr(store, selection=tuple(rasters)) if rasters else None
    # shapes before the tables that annotate them
    for name, kind in sorted(names.items(), key=lambda item: item[1]):
        if kind in rasters:
            if name in getattr(fresh, kind):
                getattr(sdata, kind)[name] = getattr(fresh, kind)[name]
        elif (store / kind / name).is_dir():
            _read_whole(sdata, store, kind, name, scratch)


def _read_whole(sdata: SpatialData, store: Path, kind: str, name: str, scratch: Path) -> None:
    """Read a table or shapes, unless they are too large."""
    element, size = store / kind / name, 0
    if kind == "tables":
        x = zarr.open_group(str(element), mode="r")["X"]
        size = int(x.nbytes) if isinstance(x, zarr.Array) else 0
    elif kind == "shapes":
        size = int(pq.read_metadata(element / "shapes.parquet").num_rows) * _SHAPE_BYTES
    elements: Any = getattr(sdata, kind)
    if size <= MAX_READ_BYTES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The table is annotating")
            elements[name] = _alone(store, kind, name, scratch)
        return
    if name in elements:
        del elements[name]  # what it replaced
    how = f"anndata.experimental.read_lazy({str(element)!r})" if kind == "tables" else ""
    logger.info(
        "%s[%r] takes %s and was left on disk; spatialdata.read_zarr(%r) reads it%s.",
        *(kind, name, size_text(size), str(store), f" whole, {how} in parts" if how else ""),
    )


def _alone(store: Path, kind: str, name: str, scratch: Path) -> Any:
    """Read one element with spatialdata's own reader, from a store that links to nothing else."""
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


def element_stamp(element: Path) -> str:
    """Hash names, sizes and dates of all files of an element on disk: anything that is written there changes it."""
    plain_files(element)  # raises at links
    return files_sha256(element)[0]


def image_stamp(image: Any) -> str:
    """Hash the finest level of a multiscale image in memory, channel by channel."""
    pixels = image["scale0"]["image"].data
    return content_sha256(*(np.asarray(pixels[k]) for k in range(pixels.shape[0])))


def written_by(sdata: SpatialData, section: str, key: str, identity: str, names: Mapping[str, str]) -> bool:
    """Whether the store holds the results, name → type, of the call that noted ``identity``, untouched since."""
    store = local_store(sdata)
    if store is None:
        return False
    notes = _stored_notes(store)
    noted = note_of(note_of(notes, section, key), "identity")
    return bool(noted == identity) and len(_untouched(store, notes, names)) == len(names)


def attach_written(sdata: SpatialData, names: Mapping[str, str], *, again: bool = False) -> None:
    """Read the elements, name → type, that this package wrote and the object lacks; ``again``: also those it has."""
    store = local_store(sdata)
    lacking = {name: kind for name, kind in names.items() if again or name not in getattr(sdata, kind)}
    if store is None or not lacking:
        return
    notes = _stored_notes(store)
    untouched = _untouched(store, notes, lacking)
    if untouched:
        read_back(sdata, store, untouched, scratch=work_folder(store))
        attributes = {ATTRS_KEY: notes}
        merge_notes(attributes, sdata, {})
        sdata.attrs.update(attributes)


def _untouched(store: Path, notes: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Select the elements, name → type, that lie in the store as this package wrote them."""
    stamps = {name: note_of(notes, WRITTEN, name) for name in names}
    return {
        name: kind
        for name, kind in names.items()
        if stamps[name] and (store / kind / name).is_dir() and element_stamp(store / kind / name) == stamps[name]
    }


def _stored_notes(store: Path) -> Any:
    return note_of(read_json(store / "zarr.json"), "attributes", ATTRS_KEY) or {}
