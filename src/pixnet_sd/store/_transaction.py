"""What is needed to finish a commit, believed only when this user's pixnet_sd wrote it for this very store.

A journal comes from a folder beside the user's data, and so perhaps with an archive, or from someone else. It holds no
paths: every place follows from names of elements, which cannot leave the work folder and the store. It is signed with a
secret of the user, and names the store by its inode, which a copy does not share (the number of the device would change
with every mount).

How a result enters a SpatialData object: complete, or not at all.

For a backed object every element is first written in full into a scratch store beside the user's store. Then, under a
lock and with a journal:

1. elements that are about to be replaced are taken out of the consolidated metadata, so that no reader looks for them;
2. an old element is renamed away and the new one renamed in; nobody else's files are touched;
3. the root ``zarr.json`` is replaced by one that holds the new elements' consolidated metadata and their provenance:
   one rename makes all of them visible together;
4. the scratch is renamed away, the journal goes, then the old elements and the scratch.

A run killed before the journal is there has changed nothing; one killed after it is finished by the next run, which
then knows the results as its own when it is the same call (`written_by`). In every state in between the store opens.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnet_sd._files import clear_left_over
from pixnet_sd._notes import ATTRS_KEY
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

from ._disk import (
    ELEMENT_TYPES,
    check_free_disk,
    check_names,
    check_plain,
    check_writable,
    existing_names,
    explain_disk_errors,
    hold_lock,
    is_name,
    is_ours,
    known_secrets,
    local_store,
    read_json,
    secret,
    work_folder,
    write_json,
)
from ._notes import WRITTEN, element_stamp, json_safe, merged_notes, read_back
from ._stream import Staged, element_type, write_scratch_store

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from spatialdata import SpatialData

__all__ = [
    "COMMIT",
    "JOURNAL",
    "Journal",
    "Move",
    "check_target",
    "commit",
    "read_journal",
    "recover",
    "remove_journal",
    "write_journal",
]

JOURNAL = "journal.json"
COMMIT = "commit"
"""Folder, inside the work folder, of elements that are written when they are committed."""

_PLACE = re.compile(r"(commit/new|map-[\w.-]+/map|table-[\w.-]+/(table|shapes))\.zarr")


@dataclass(frozen=True)
class Move:
    """One element on its way from a scratch store into the store.

    Attributes
    ----------
    name, kind
        Of the element.
    place
        The scratch store, ``{folder}/{store}``, in the work folder.
    replaces
        Whether it takes the place of another.
    """

    name: str
    kind: str
    place: str
    replaces: bool

    @property
    def path(self) -> str:
        """Of the element inside either store."""
        return f"{self.kind}/{self.name}"


@dataclass
class Journal:
    """All that is needed to finish a commit.

    Attributes
    ----------
    moves
        Elements.
    nodes
        Consolidated metadata of them, key → node.
    groups
        Element type → metadata of its group.
    notes
        For ``attrs["pixnet_sd"]``.
    """

    moves: list[Move] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def folders(self) -> list[str]:
        """Folders of the work folder that are not needed once the elements are in the store."""
        return sorted({COMMIT, *(move.place.partition("/")[0] for move in self.moves)})


def write_journal(work: Path, store: Path, journal: Journal) -> None:
    """Write the journal; from here on the next run finishes the commit.

    Raises
    ------
    OSError
        When that fails.
    """
    value = asdict(journal)
    write_json(work / JOURNAL, {"journal": value, "signature": _signature(secret(), store, value)}, scratch=work)


def read_journal(work: Path, store: Path) -> Journal | None:
    """The journal of a commit that was cut off, or None.

    Raises
    ------
    StoreError
        When it is damaged, or was not written here by this user.
    """
    path = work / JOURNAL
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path)
        owner, value = path.lstat().st_uid, found["journal"]
        signed = any(hmac.compare_digest(_signature(key, store, value), found["signature"]) for key in known_secrets())
        if signed and is_ours(owner, work):
            return _parsed(value)
        why = "it is not signed by this user for this store"
    except (KeyError, TypeError, OSError, ValueError) as error:
        why = f"it cannot be read ({error})"
    raise StoreError(
        f"{path} asks for a write into {store} to be finished, but {why}, so nothing of it was done. Was the store "
        f"copied or unpacked with it, or is the run another user's? Look at {work}; if you miss no results that are in "
        "it, delete it."
    )


def remove_journal(work: Path) -> None:
    """The commit is finished."""
    (work / JOURNAL).unlink(missing_ok=True)


def _signature(key: bytes, store: Path, value: dict[str, Any]) -> str:
    text = json.dumps([store.stat().st_ino, value], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _parsed(value: dict[str, Any]) -> Journal:
    """The journal, each part of which is what it should be."""
    journal = Journal(**{**value, "moves": [Move(**move) for move in value["moves"]]})
    paths = [move.path for move in journal.moves]
    if not all(_is_sound(move) for move in journal.moves) or not all(
        isinstance(part, dict) for part in (journal.nodes, journal.groups, journal.notes)
    ):
        raise ValueError("elements that cannot be")
    if not set(journal.groups) <= {move.kind for move in journal.moves}:
        raise ValueError("groups of no element")
    if not all(any(key == path or key.startswith(f"{path}/") for path in paths) for key in journal.nodes):
        raise ValueError("metadata of other elements")
    return journal


def _is_sound(move: Move) -> bool:
    return (
        move.kind in ELEMENT_TYPES
        and is_name(move.name)
        and _PLACE.fullmatch(move.place) is not None
        and isinstance(move.replaces, bool)
    )


LOCK_WAIT_S = 600.0


def check_target(
    sdata: SpatialData, names: Mapping[str, str], *, overwrite: bool = False, needed_bytes: int = 0
) -> None:
    """Everything that can be refused before any work is done; also finishes what a killed run left behind.

    Parameters
    ----------
    sdata
        The object that results will be written to.
    names
        Element name → element type of the coming results.
    overwrite
        Whether elements of the same name and type may be replaced.
    needed_bytes
        Bytes that the results will take on disk, at most.

    Raises
    ------
    StoreError
        Name taken or not allowed, store read-only, old, away or not local, disk too small.
    """
    store = local_store(sdata)
    if store is not None:
        check_writable(store)
        secret()  # the journal will need it
        recover(sdata)
    check_names(sdata, names, overwrite=overwrite)
    if store is not None:
        check_free_disk(store.parent, needed_bytes)


def commit(
    sdata: SpatialData,
    elements: Mapping[str, Any],
    *,
    overwrite: bool = False,
    staged: tuple[Staged, ...] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Add elements to ``sdata``, and to its store when it is backed, all at once.

    Parameters
    ----------
    sdata
        The object; its elements and ``attrs["pixnet_sd"]`` are changed in place. Rasters that were written are replaced
        in memory by what is read back lazily; tables and shapes stay as given, and those of ``staged`` are read as
        `read_back` says.
    elements
        Element name → element, as the models of `spatialdata.models` parse them.
    overwrite
        Whether elements of the same name and type are replaced.
    staged
        Elements already written completely into a scratch store inside the work folder; the folder of that store goes
        afterwards, with all that is in it.
    provenance
        Section → key → info, noted in ``sdata.attrs["pixnet_sd"]`` together with the elements.

    Raises
    ------
    StoreError
        As `check_target`, and when writing fails.
    KeyboardInterrupt
        Once it is too late to stop, when everything is in the store and in the object.
    """
    names = {name: element_type(element) for name, element in elements.items()}
    names.update({item.name: item.kind for item in staged})
    store = local_store(sdata)
    if store is None:
        check_names(sdata, names, overwrite=overwrite)
        _set(sdata, elements)
        _set_notes(sdata, merged_notes({}, sdata.attrs.get(ATTRS_KEY), provenance or {}))
        return
    check_target(sdata, names, overwrite=overwrite)
    work = work_folder(store)
    with _commit_lock(store):
        _settle(store, work, sdata)  # again: another run may have been killed, or have taken a name, while we waited
        check_names(sdata, names, overwrite=overwrite)
        journal = _write_down(store, work, elements, staged, provenance or {})
        given = {name: element for name, element in elements.items() if names[name] not in ("images", "labels")}
        try:
            _bring_in(store, work, journal, sdata, given)
        except KeyboardInterrupt:
            _bring_in(store, work, journal, sdata, given)
            raise


def _write_down(
    store: Path,
    work: Path,
    elements: Mapping[str, Any],
    staged: tuple[Staged, ...],
    provenance: Mapping[str, Any],
) -> Journal:
    """Write all that is still missing beside the store, the journal last; on failure nothing of it remains."""
    try:
        with explain_disk_errors("Preparing the results", work):
            fresh = write_scratch_store(work / COMMIT / "new.zarr", elements) if elements else ()
            journal = _plan(store, work, (*fresh, *staged), json_safe(provenance))
            write_journal(work, store, journal)
        return journal
    except BaseException:
        if not (work / JOURNAL).exists():  # else it is too late, and the next run finishes
            shutil.rmtree(work / COMMIT, ignore_errors=True)
        raise


def _bring_in(store: Path, work: Path, journal: Journal, sdata: SpatialData, given: Mapping[str, Any]) -> None:
    """Move the elements into the store and attach them to the object; may be repeated from where it stopped."""
    _finish(store, work, journal, sdata)
    names = {move.name: move.kind for move in journal.moves if move.name not in given}
    read_back(sdata, store, names, scratch=work)
    _set(sdata, given)
    _set_notes(sdata, read_json(store / "zarr.json")["attributes"].get(ATTRS_KEY, {}))


def recover(sdata: SpatialData) -> None:
    """Finish a commit that was killed half-way and remove what it left; attach what it brought in.

    Raises
    ------
    StoreError
        When what lies there was not left by a run of this user on this store.
    """
    store = local_store(sdata)
    if store is None or not work_folder(store).is_dir():
        return
    work = work_folder(store)
    check_plain(work, depth=2)
    before = existing_names(sdata)
    with _commit_lock(store):
        names = _settle(store, work, sdata)
        names = {name: kind for name, kind in names.items() if kind == before.get(name, kind)}
        read_back(sdata, store, names, scratch=work)
    if names:
        _set_notes(sdata, read_json(store / "zarr.json")["attributes"].get(ATTRS_KEY, {}))


def _settle(store: Path, work: Path, sdata: SpatialData) -> dict[str, str]:
    """Finish or forget an interrupted commit; name → type of what a finished one brought in."""
    names = {}
    journal = read_journal(work, store)
    if journal is not None:
        names = {move.name: move.kind for move in journal.moves}
        logger.warning("Finishing the write of %s into %s, which was interrupted.", ", ".join(names), store)
        _finish(store, work, journal, sdata)
    for leftover in (work / COMMIT, work / "old", *work.glob("view-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    clear_left_over(work)
    for name in {path.name.removesuffix(".lock") for kind in ("map", "table") for path in work.glob(f"{kind}-*")}:
        _sweep(work / name)
    return names


def _sweep(folder: Path) -> None:
    """Remove the lock file of a run that was killed, and its folder unless the same call can go on from it."""
    lock = folder.with_name(f"{folder.name}.lock")
    with contextlib.suppress(StoreError), hold_lock(lock, wait_s=0, busy="that run is alive"):
        if not (folder / "partial.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _commit_lock(store: Path) -> AbstractContextManager[None]:
    """One commit into a store at a time."""
    return hold_lock(
        work_folder(store) / "lock", wait_s=LOCK_WAIT_S, busy=f"Another run is writing into {store}; try again later."
    )


def _plan(store: Path, work: Path, staged: tuple[Staged, ...], notes: dict[str, Any]) -> Journal:
    """Collect what has to be moved and the metadata that the root will show."""
    journal = Journal(notes=notes)
    stamps = journal.notes.setdefault(WRITTEN, {})
    for item in staged:
        path = f"{item.kind}/{item.name}"
        stamps[item.name] = element_stamp(item.scratch_store / path)
        metadata = read_json(item.scratch_store / "zarr.json")["consolidated_metadata"]["metadata"]
        journal.nodes.update({key: node for key, node in metadata.items() if _is_under(key, path)})
        journal.groups.setdefault(item.kind, read_json(item.scratch_store / item.kind / "zarr.json"))
        place = item.scratch_store.relative_to(work).as_posix()
        journal.moves.append(Move(item.name, item.kind, place, (store / path).exists()))
    return journal


def _finish(store: Path, work: Path, journal: Journal, sdata: SpatialData) -> None:
    """Steps 1 to 4 of the module's docstring; may be repeated from any point at which it stopped, or after the last."""
    _check_folders(store, work, journal)
    try:
        if (work / JOURNAL).exists():
            _hide(store, work, [move.path for move in journal.moves if move.replaces])
            for kind, group in journal.groups.items():
                _require_group(store / kind, group, work)
            placed = [move.path for move in journal.moves if _place(store, work, move)]
            _list_labels(store, work, [path.partition("/")[2] for path in placed if path.startswith("labels/")])
            _publish(store, work, journal, placed, sdata.attrs.get(ATTRS_KEY))
            _put_away(work, journal.folders)
            remove_journal(work)
    except OSError as error:
        raise StoreError(
            f"Writing into {store} failed: {error}. The store still opens; the results wait in {work} and are moved in "
            "by the next run that writes to this store."
        ) from error
    shutil.rmtree(work / "old", ignore_errors=True)


def _check_folders(store: Path, work: Path, journal: Journal) -> None:
    """Raise when a folder that something is moved from or to is a link."""
    places = [path for move in journal.moves for path in _up_to(work, f"{move.place}/{move.path}")]
    olds = [path for move in journal.moves for path in _up_to(work, f"old/{move.path}")]
    for path in (store, work, *(store / move.kind for move in journal.moves), *places, *olds):
        if path.is_symlink():
            raise StoreError(
                f"{path} is a link, and nothing is moved through one. Look at it, and delete {work} if you miss no "
                "results that are in it."
            )


def _up_to(folder: Path, relative: str) -> Iterator[Path]:
    """All of the folders on the way, the last included."""
    for part in relative.split("/"):
        folder = folder / part
        yield folder


def _put_away(work: Path, folders: Iterable[str]) -> None:
    """Rename folders to where a kill cannot leave a half-deleted one that looks like unfinished work."""
    for name in folders:
        if (work / name).exists():
            (work / "old").mkdir(exist_ok=True)
            (work / name).rename(work / "old" / f"{name}-{uuid.uuid4().hex}")


def _is_under(key: str, path: str) -> bool:
    return key == path or key.startswith(path + "/")


def _hide(store: Path, work: Path, paths: list[str]) -> None:
    """Take elements out of the consolidated metadata: listed but absent, they would break every read."""
    root = read_json(store / "zarr.json")
    nodes = (root.get("consolidated_metadata") or {}).get("metadata", {})
    hidden = [key for key in nodes if any(_is_under(key, path) for path in paths)]
    if hidden:
        for key in hidden:
            del nodes[key]
        write_json(store / "zarr.json", root, scratch=work)


def _require_group(folder: Path, group: dict[str, Any], work: Path) -> None:
    """Make the group of an element type where the store has none yet."""
    if not (folder / "zarr.json").is_file():
        folder.mkdir(exist_ok=True)
        write_json(folder / "zarr.json", group, scratch=work)


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
    if not names:
        return
    group = read_json(path)
    listed = group.setdefault("attributes", {}).setdefault("ome", {}).setdefault("labels", [])
    missing = [name for name in names if name not in listed]
    if missing:
        listed.extend(missing)
        write_json(path, group, scratch=work)


def _publish(store: Path, work: Path, journal: Journal, placed: list[str], notes_in_memory: Any) -> None:
    """Replace the root ``zarr.json``: consolidated metadata, where the store has it, and provenance."""
    root = read_json(store / "zarr.json")
    attributes = root.setdefault("attributes", {})
    notes = merged_notes(attributes.get(ATTRS_KEY), notes_in_memory, journal.notes)
    if notes:
        attributes[ATTRS_KEY] = notes
    consolidated = root.get("consolidated_metadata")
    if consolidated:
        nodes = consolidated["metadata"]
        for kind in journal.groups:
            inherited = {"consolidated_metadata": {**consolidated, "metadata": {}}}
            nodes[kind] = {**read_json(store / kind / "zarr.json"), **inherited}
        nodes.update({k: n for k, n in journal.nodes.items() if any(_is_under(k, path) for path in placed)})
        consolidated["metadata"] = dict(sorted(nodes.items(), key=lambda item: (item[0].count("/"), item[0])))
    write_json(store / "zarr.json", root, scratch=work)


def _set(sdata: SpatialData, elements: Mapping[str, Any]) -> None:
    """Set elements in memory."""
    for name, element in elements.items():
        getattr(sdata, element_type(element))[name] = element


def _set_notes(sdata: SpatialData, notes: dict[str, Any]) -> None:
    """Keep the attribute away from objects that pixnet_sd has nothing to say about."""
    if notes:
        sdata.attrs[ATTRS_KEY] = notes
