"""How results enter a SpatialData object: complete, or not at all.

For a backed object every element is first written in full into a scratch store beside the user's store. Then, under a
lock and with a journal:

1. elements that are about to be replaced are taken out of the consolidated metadata, so that no reader looks for them;
2. an old element is renamed away and the new one renamed in; nobody else's files are touched;
3. the root ``zarr.json`` is replaced by one with the new elements' metadata and provenance: all become visible at once;
4. the scratch is renamed away, the journal goes, then the old elements and the scratch.

A run killed before the journal is there has changed nothing; one killed after it is finished by the next run. In every
state in between the store opens. The journal may have come with an archive, or from another user: it holds no paths
(every place follows from names of elements, which cannot leave the work folder and the store), is signed with a secret
of the user, and names the store by its inode, which a copy does not share (a device's number changes with each mount).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from spatialdata import SpatialData

from pixnet_sd._files import clear_left_over
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

from ._disk import (
    DISK_MARGIN,
    NAME,
    check_names,
    check_writable,
    existing_names,
    explain_disk_errors,
    hold_lock,
    is_ours,
    known_secrets,
    local_store,
    lock_store,
    plain_files,
    read_json,
    secret,
    size_text,
    work_folder,
    write_json,
)
from ._notes import WRITTEN, element_stamp, image_stamp, json_safe, merge_notes, read_back, take_notes
from ._stream import Staged, element_type, write_scratch_store

JOURNAL = "journal.json"
COMMIT = "commit"  # folder, inside the work folder, of elements that are written when they are committed
STREAM_WAIT_S, COMMIT_WAIT_S = 15.0, 600.0


class Transaction:
    """The results of one call on their way into an object: a context manager.

    Entering it checks all that can be refused before any work is done, and finishes what a killed run left behind;
    results that are streamed go into a `folder` that it locks; `commit` puts everything in at once. ``names`` are the
    coming results, element name → element type. A StoreError tells of a name that cannot be had or that another run is
    writing, and a store that is read-only, old, away or not local.
    """

    def __init__(self, sdata: SpatialData, names: Mapping[str, str], *, overwrite: bool = False) -> None:
        self.sdata, self.store = sdata, local_store(sdata)
        self._names, self._overwrite = dict(names), overwrite
        self._locks = contextlib.ExitStack()
        self.is_late = False  # whether a journal was written, so that the next run finishes

    def __enter__(self) -> Self:
        if self.store is not None:
            check_writable(self.store)
            secret()  # the journal will need it
            recover(self.sdata)
        check_names(self.sdata, self._names, overwrite=self._overwrite)
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def folder(self, name: str) -> Path:
        """Lock the folder of a result that is streamed, for a backed object, until the transaction is left."""
        assert self.store is not None  # in memory nothing is streamed
        path = work_folder(self.store) / name
        busy = f"Another run is writing {name} of {self.store}. Wait for it, or choose another key."
        self._locks.enter_context(hold_lock(path.with_name(f"{name}.lock"), wait_s=STREAM_WAIT_S, busy=busy))
        return path

    def check_room(self, n_bytes: int, n_files: int) -> None:
        """Raise unless the disk has room for the bytes and files that are still to be written, at most."""
        if self.store is None:
            return
        place = self.store.parent
        disk, free, wanted = os.statvfs(place), shutil.disk_usage(place).free, n_bytes * (1 + DISK_MARGIN)
        if wanted > free:
            lack = f"{size_text(wanted)}, but only {size_text(free)} are free"
        elif disk.f_files and n_files > disk.f_favail:  # file systems without a limit say 0
            lack = f"{n_files:,} files, but only {disk.f_favail:,} more can be made"
        else:
            return
        raise StoreError(
            f"The result may take up to {lack} at {place}. Make room, write the object to a larger disk, or predict "
            "fewer genes (`genes=`), fewer regions (larger ones, or farther apart) or a coarser map (`map_um=`)."
        )

    def commit(self, elements: Mapping[str, Any], *, provenance: Mapping[str, Any] | None = None) -> None:
        """Add elements to the object, and to its store when it is backed, all at once.

        Rasters that were written are replaced in memory by what is read back lazily; tables and shapes stay as given,
        and `Staged` ones are read as `read_back` says; their scratch stores go. ``provenance``, section → key → info,
        is noted together with them. A KeyboardInterrupt that comes too late to stop is raised when everything is in.
        """
        names = {name: element_type(element) for name, element in elements.items()}
        notes = dict(provenance or {})
        if self.store is None:
            check_names(self.sdata, names, overwrite=self._overwrite)
            stamps = {name: image_stamp(elements[name]) for name, kind in names.items() if kind == "images"}
            notes |= {WRITTEN: stamps} if stamps else {}
            _set(self.sdata, elements)
            merge_notes(self.sdata.attrs, self.sdata, notes)
            return
        work = work_folder(self.store)
        with lock_store(self.store, wait_s=COMMIT_WAIT_S):
            _settle(self.store, work, self.sdata)  # another run may have been killed, or have taken a name
            check_names(self.sdata, names, overwrite=self._overwrite)
            journal = self._write_down(work, elements, notes)
            in_memory = {
                name: element
                for name, element in elements.items()
                if not isinstance(element, Staged) and names[name] not in ("images", "labels")
            }
            try:
                _bring_in(self.store, work, journal, self.sdata, in_memory)
            except KeyboardInterrupt:
                _bring_in(self.store, work, journal, self.sdata, in_memory)
                raise

    def _write_down(self, work: Path, elements: Mapping[str, Any], notes: Mapping[str, Any]) -> Journal:
        """Write all that is still missing beside the store, the journal last; on failure nothing of it remains."""
        assert self.store is not None
        staged = [element for element in elements.values() if isinstance(element, Staged)]
        fresh = {name: element for name, element in elements.items() if not isinstance(element, Staged)}
        try:
            with explain_disk_errors("Preparing the results", work):
                if fresh:
                    staged += write_scratch_store(work / COMMIT / "new.zarr", fresh)
                journal = _plan(self.store, work, staged, json_safe(notes))
                value = journal.model_dump()  # once it is on disk, the next run finishes the commit
                signed = {"journal": value, "signature": _signature(secret(), self.store, value)}
                write_json(work / JOURNAL, signed, scratch=work)
                self.is_late = True
            return journal
        except BaseException:
            if not (work / JOURNAL).exists():  # else it is too late, and the next run finishes
                shutil.rmtree(work / COMMIT, ignore_errors=True)
            raise


def recover(sdata: SpatialData) -> None:
    """Finish a commit that was killed half-way, attach what it brought in, and remove what it left.

    A StoreError tells that what lies there was not left by a run of this user on this store.
    """
    store = local_store(sdata)
    if store is None or not work_folder(store).is_dir():
        return
    work = work_folder(store)
    plain_files(work, depth=2)
    before = existing_names(sdata)
    with lock_store(store, wait_s=COMMIT_WAIT_S):
        names = _settle(store, work, sdata)
        names = {name: kind for name, kind in names.items() if kind == before.get(name, kind)}
        read_back(sdata, store, names, scratch=work)
    if names:
        take_notes(sdata, store)


class Move(BaseModel):
    """One element on its way from a scratch store, ``{folder}/{store}`` in the work folder, into the store."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, regex_engine="python-re")

    name: str = Field(pattern=NAME)
    kind: Literal["images", "labels", "points", "shapes", "tables"]
    place: str = Field(pattern=r"^(commit/new|map-[\w.-]+/map|table-[\w.-]+/(table|shapes))\.zarr\Z")
    replaces: bool

    @property
    def path(self) -> str:
        """Path of the element inside either store."""
        return f"{self.kind}/{self.name}"


class Journal(BaseModel):
    """All that is needed to finish a commit."""

    model_config = ConfigDict(strict=True, extra="forbid")

    moves: list[Move]
    nodes: dict[str, Any]  # consolidated metadata of the elements, key → node
    groups: dict[str, Any]  # element type → metadata of its group
    notes: dict[str, Any]  # section → key → info


def _read_journal(work: Path, store: Path) -> Journal | None:
    """Read the journal of a commit that was cut off, if there is one; raises unless this user wrote it here."""
    path = work / JOURNAL
    if not os.path.lexists(path):
        return None
    try:
        content = read_json(path)
        owner, value = path.lstat().st_uid, content["journal"]
        signed = any(
            hmac.compare_digest(_signature(key, store, value), content["signature"]) for key in known_secrets()
        )
        if signed and is_ours(owner, work):
            journal = Journal.model_validate(value)
            paths, kinds = [move.path for move in journal.moves], {move.kind for move in journal.moves}
            if journal.groups.keys() <= kinds and all(_is_under(key, *paths) for key in journal.nodes):
                return journal
            raise ValueError("groups or metadata that cannot be")
        why = "it is not signed by this user for this store"
    except (KeyError, TypeError, OSError, ValueError) as error:
        why = f"it cannot be read ({error})"
    raise StoreError(
        f"{path} asks for a write into {store} to be finished, but {why}, so nothing of it was done. Was the store "
        f"copied or unpacked with it, or is the run another user's? Look at {work}; if you miss no results that are in "
        "it, delete it."
    )


def _signature(key: bytes, store: Path, value: dict[str, Any]) -> str:
    text = json.dumps([store.stat().st_ino, value], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _settle(store: Path, work: Path, sdata: SpatialData) -> dict[str, str]:
    """Finish or forget an interrupted commit; name → type of what a finished one brought in."""
    names: dict[str, str] = {}
    journal = _read_journal(work, store)
    if journal is not None:
        names = {move.name: move.kind for move in journal.moves}
        logger.warning("Finishing the write of %s into %s, which was interrupted.", ", ".join(names), store)
        _finish(store, work, journal, sdata)
    for leftover in (work / COMMIT, work / "old", *work.glob("view-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    clear_left_over(work)
    for name in {path.name.removesuffix(".lock") for kind in ("map", "table") for path in work.glob(f"{kind}-*")}:
        # the lock file of a run that was killed goes, and its folder unless the same call can go on from it
        lock = hold_lock(work / f"{name}.lock", wait_s=0, busy="that run is alive")
        with contextlib.suppress(StoreError), lock:
            if not (work / name / "partial.json").is_file():
                shutil.rmtree(work / name, ignore_errors=True)
    return names


def _plan(store: Path, work: Path, staged: list[Staged], notes: dict[str, Any]) -> Journal:
    """Collect what has to be moved and the metadata that the root will show."""
    journal = Journal(moves=[], nodes={}, groups={}, notes=notes)
    stamps = journal.notes.setdefault(WRITTEN, {})
    for item in staged:
        path = f"{item.kind}/{item.name}"
        stamps[item.name] = element_stamp(item.scratch_store / path)
        metadata = read_json(item.scratch_store / "zarr.json")["consolidated_metadata"]["metadata"]
        journal.nodes.update({key: node for key, node in metadata.items() if _is_under(key, path)})
        journal.groups.setdefault(item.kind, read_json(item.scratch_store / item.kind / "zarr.json"))
        place = item.scratch_store.relative_to(work).as_posix()
        move = {"name": item.name, "kind": item.kind, "place": place, "replaces": (store / path).exists()}
        journal.moves.append(Move.model_validate(move))
    return journal


def _bring_in(store: Path, work: Path, journal: Journal, sdata: SpatialData, in_memory: Mapping[str, Any]) -> None:
    """Move the elements into the store and attach them to the object; may be repeated from where it stopped."""
    _finish(store, work, journal, sdata)
    names = {move.name: move.kind for move in journal.moves if move.name not in in_memory}
    read_back(sdata, store, names, scratch=work)
    _set(sdata, in_memory)
    take_notes(sdata, store)


def _finish(store: Path, work: Path, journal: Journal, sdata: SpatialData) -> None:
    """Steps 1 to 4 of the module's docstring; may be repeated from any point at which it stopped, or after the last."""
    _check_folders(store, work, journal)
    try:
        if (work / JOURNAL).exists():
            _hide(store, work, [move.path for move in journal.moves if move.replaces])
            for kind, group in journal.groups.items():
                if not (store / kind / "zarr.json").is_file():
                    (store / kind).mkdir(exist_ok=True)
                    write_json(store / kind / "zarr.json", group, scratch=work)
            placed = [move.path for move in journal.moves if _place(store, work, move)]
            _list_labels(store, work, [path.partition("/")[2] for path in placed if path.startswith("labels/")])
            _publish(store, work, journal, placed, sdata)
            # renamed, so that a kill cannot leave a half-deleted folder that looks like unfinished work
            for name in {COMMIT, *(move.place.partition("/")[0] for move in journal.moves)}:
                if (work / name).exists():
                    (work / "old").mkdir(exist_ok=True)
                    (work / name).rename(work / "old" / f"{name}-{uuid.uuid4().hex}")
            (work / JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"Writing into {store} failed: {error}. The store still opens; the results wait in {work} and are moved in "
            "by the next run that writes to this store."
        ) from error
    shutil.rmtree(work / "old", ignore_errors=True)


def _check_folders(store: Path, work: Path, journal: Journal) -> None:
    """Raise when a folder that something is moved from or to is a link."""
    folders = [store, work, *(store / move.kind for move in journal.moves)]
    for move in journal.moves:
        for end in (work / move.place / move.path, work / "old" / move.path):
            folders += [end, *(folder for folder in end.parents if folder.is_relative_to(work))]
    for link in filter(Path.is_symlink, folders):
        raise StoreError(
            f"{link} is a link, and nothing is moved through one. Look at it, and delete {work} if you miss no results "
            "that are in it."
        )


def _is_under(key: str, *paths: str) -> bool:
    return any(key == path or key.startswith(path + "/") for path in paths)


def _hide(store: Path, work: Path, paths: list[str]) -> None:
    """Take elements out of the consolidated metadata: listed but absent, they would break every read."""
    root = read_json(store / "zarr.json")
    nodes = (root.get("consolidated_metadata") or {}).get("metadata", {})
    if hidden := [key for key in nodes if _is_under(key, *paths)]:
        for key in hidden:
            del nodes[key]
        write_json(store / "zarr.json", root, scratch=work)


def _place(store: Path, work: Path, move: Move) -> bool:
    """Rename one element in, the old one away before; False when the user has put another there meanwhile."""
    source, target, old = work / move.place / move.path, store / move.path, work / "old" / move.path
    if not source.exists():
        return bool(target.exists())  # moved before the interruption
    if target.exists():
        if not move.replaces or old.exists():
            logger.warning("%s holds another element by now and is left alone; our result is dropped.", target)
            return False
        old.parent.mkdir(parents=True, exist_ok=True)
        target.rename(old)
    source.rename(target)
    return True


def _list_labels(store: Path, work: Path, names: list[str]) -> None:
    """OME-Zarr lists the label images in the attributes of their group."""
    path = store / "labels" / "zarr.json"
    group = read_json(path) if names else {}
    listed = group.setdefault("attributes", {}).setdefault("ome", {}).setdefault("labels", [])
    if missing := [name for name in names if name not in listed]:
        listed.extend(missing)
        write_json(path, group, scratch=work)


def _publish(store: Path, work: Path, journal: Journal, placed: list[str], sdata: SpatialData) -> None:
    """Replace the root ``zarr.json``: consolidated metadata, where the store has it, and provenance."""
    root = read_json(store / "zarr.json")
    merge_notes(root.setdefault("attributes", {}), sdata, journal.notes)
    consolidated = root.get("consolidated_metadata")
    if consolidated:
        nodes = consolidated["metadata"]
        for kind in journal.groups:
            inherited = {"consolidated_metadata": {**consolidated, "metadata": {}}}
            nodes[kind] = {**read_json(store / kind / "zarr.json"), **inherited}
        nodes.update({k: n for k, n in journal.nodes.items() if _is_under(k, *placed)})
        consolidated["metadata"] = dict(sorted(nodes.items(), key=lambda item: (item[0].count("/"), item[0])))
    write_json(store / "zarr.json", root, scratch=work)


def _set(sdata: SpatialData, elements: Mapping[str, Any]) -> None:
    """Set elements in memory."""
    for name, element in elements.items():
        getattr(sdata, element_type(element))[name] = element
