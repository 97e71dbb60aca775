"""The local folder behind a SpatialData object: where it is, whether it can be written, whether there is room.

Scratch work happens in one hidden folder beside the store, ``.{store}.pixnet_sd``: on the same file system, so that a
finished element enters the store by rename, and outside the store, so that a reader never meets half an element.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnet_sd._errors import StoreError
from pixnet_sd._logging import logger

from ._planted import NO_FOLLOW, check_ours, open_regular

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = [
    "check_free_disk",
    "check_same_folder",
    "check_writable",
    "delete_folder",
    "explain_disk_errors",
    "folder_id",
    "hold_lock",
    "local_store",
    "read_json",
    "size_text",
    "sweep_drafts",
    "work_folder",
    "write_json",
]

DISK_MARGIN = 0.05
"""Fraction asked for on top of the bytes needed."""


def local_store(sdata: SpatialData) -> Path | None:
    """Resolved folder of the Zarr store behind ``sdata``; None when the object lives in memory.

    Raises
    ------
    StoreError
        When the object is backed by something else than a local folder (an archive, a remote store), or by a store in
        SpatialData's old Zarr v2 format, into which current elements cannot be written without breaking it.
    """
    if sdata.path is None:
        return None
    store = Path(sdata.path).resolve()
    if isinstance(sdata.path, Path) and not store.exists():
        raise StoreError(_away(store))
    if not store.is_dir():
        raise StoreError(
            f"The object is backed by {str(sdata.path)!r}, which is not a local folder. pixnet_sd writes into local "
            "folders only: call `sdata.write('/some/folder.zarr')` and use that copy."
        )
    _check_format(store)
    return store


def _check_format(store: Path) -> None:
    """Refuse Zarr v2 stores and folders that are no SpatialData store."""
    root = store / "zarr.json"
    if not (root.is_file() or (store / ".zgroup").is_file()):
        raise StoreError(_away(root))
    attributes = read_json(root).get("attributes", {}) if root.is_file() else {}
    if attributes.get("spatialdata_attrs", {}).get("version", "0.1") == "0.1":
        raise StoreError(
            f"{store} is not a SpatialData store in the current (Zarr v3) format. Write a fresh copy with "
            "`sdata.write('/some/other.zarr')`, read it with `spatialdata.read_zarr` and use that."
        )


def _away(path: Path) -> str:
    return (
        f"{path} is not there any more: it, or a folder that holds it, was moved, renamed or deleted, or its disk is "
        "not mounted. Bring it back, or open the store where it is now, and make the same call."
    )


def work_folder(store: Path) -> Path:
    """The scratch folder beside ``store``; not created here.

    Raises
    ------
    StoreError
        When something else has its name: a link, a file, a folder of another user.
    """
    folder = store.parent / f".{store.name}.pixnet_sd"
    check_ours(folder)
    return folder


def folder_id(folder: Path) -> tuple[int, int]:
    """What tells a folder from another that is put in its place: device and inode."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def check_same_folder(folder: Path, known: tuple[int, int]) -> None:
    """Raise unless ``folder`` is still the one that `folder_id` told.

    Raises
    ------
    StoreError
        When it is away, or another one is there.
    """
    try:
        same = folder_id(folder) == known
    except FileNotFoundError:
        same = False
    if not same:
        raise StoreError(_away(folder))


def delete_folder(folder: Path) -> None:
    """Delete a folder that may be absent: first what makes a run go on from it, so that a kill leaves no half of it.

    Raises
    ------
    OSError
        When something of it cannot be deleted.
    """
    (folder / "partial.json").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def check_writable(store: Path) -> None:
    """Raise unless elements can be renamed into ``store`` from its scratch folder.

    Raises
    ------
    StoreError
        When the store, one of its element folders or the folder that holds it cannot be written, or when they lie on
        different file systems.
    """
    from ._names import ELEMENT_TYPES

    remedy = "Give yourself write access, or work on a copy: `sdata.write('/some/folder.zarr')`."
    inside = [store, *(store / kind for kind in ELEMENT_TYPES if (store / kind).is_dir())]
    for folder in inside:
        if folder.is_symlink():
            raise StoreError(f"{folder} is a link, through which pixnet_sd does not write. {remedy}")
        _probe(folder, f"The store {store} is read-only ({folder} cannot be written). {remedy}")
    _probe(
        store.parent,
        f"{store.parent} cannot be written, but pixnet_sd prepares its results there, beside {store.name}, before "
        f"moving them in. {remedy}",
    )
    if len({os.stat(folder).st_dev for folder in (*inside, store.parent)}) > 1:
        raise StoreError(
            f"{store} and the folder that holds it lie on different file systems, so results cannot be moved in as a "
            "whole. Copy the store into a folder of one file system."
        )


def _probe(folder: Path, message: str) -> None:
    """Create an unnamed file: `os.access` alone is wrong for network mounts and for the superuser."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(message)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(f"{message} ({error.strerror or error})") from error


def size_text(n_bytes: float) -> str:
    """Bytes for people: ``"1.25 GB"`` (10⁹ bytes), below a tenth of that ``"3.10 MB"``."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def check_free_disk(path: Path, needed_bytes: int) -> None:
    """Raise when the disk that holds ``path`` has not ``needed_bytes`` plus 5 % free.

    Raises
    ------
    StoreError
        Saying how much is needed and how much is free.
    """
    free = shutil.disk_usage(path).free
    wanted = needed_bytes * (1 + DISK_MARGIN)
    if wanted > free:
        raise StoreError(
            f"The result may take up to {size_text(wanted)}, but only {size_text(free)} are free at {path}. Free "
            "some space, write the object to a larger disk, or predict fewer genes (`genes=`), fewer regions (larger "
            "ones, or farther apart) or a coarser map (`map_um=`)."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from ``path``.

    Raises
    ------
    OSError
        When it cannot be read.
    StoreError
        When it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: it holds a JSON {type(value).__name__} where an object is needed.")
    return value


def write_json(path: Path, value: dict[str, Any], *, scratch: Path) -> None:
    """Replace ``path`` by ``value`` in one step; ``scratch`` is a folder on the same file system."""
    scratch.mkdir(exist_ok=True)
    draft = scratch / f"{uuid.uuid4().hex}.json.tmp"
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def sweep_drafts(scratch: Path) -> None:
    """Delete what a killed `write_json` has left in a folder; whoever writes there holds its lock."""
    for draft in scratch.glob("*.json.tmp"):
        with contextlib.suppress(OSError):
            draft.unlink()


@contextlib.contextmanager
def hold_lock(path: Path, *, wait_s: float, busy: str) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel frees it when the process dies, however it dies.

    Parameters
    ----------
    path
        Lock file; created with its folder, not with folders above, and removed at the end.
    wait_s
        Seconds to wait for another holder.
    busy
        Message of the error raised after that.

    Raises
    ------
    StoreError
        When another process holds it for longer than ``wait_s``, or it cannot be made.
    """
    handle = _acquire(path, time.monotonic() + wait_s, busy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock goes: who waited for this file sees that it is gone and retries
        os.close(handle)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # only when nothing is left in it


def _acquire(path: Path, deadline: float, busy: str) -> int:
    """Open and lock ``path``, again when its last holder removed it meanwhile."""
    while True:
        try:
            path.parent.mkdir(exist_ok=True)
            handle = open_regular(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # the folder went between the two calls, or never was
            if path.parent.parent.is_dir():
                continue
            raise StoreError(_away(path.parent.parent)) from None
        except OSError as error:
            raise StoreError(f"{path.parent} cannot be written: {error.strerror or error}.") from error
        if _try_lock(handle) and _same_file(handle, path):
            return handle
        os.close(handle)
        if time.monotonic() > deadline:
            raise StoreError(busy)
        time.sleep(0.02)


def _try_lock(handle: int) -> bool:
    """Whether the lock was taken; file systems (and Windows) without locks count as taken."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("This file system has no locks (%s): do not write into one store from two runs at once.", error)
    return True


def _same_file(handle: int, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


@contextlib.contextmanager
def explain_disk_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that says what was being done, and that nothing is lost.

    Parameters
    ----------
    doing
        Begin of the message, such as ``"Writing the predicted regions"``.
    folder
        Where; inside the work folder of a store.

    Raises
    ------
    StoreError
        For any `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{doing} in {folder} failed: {error.strerror or error}; {_free_text(folder)} are free there. The store is "
            "unchanged. Mend that, and the same call goes on from what is done."
        ) from error


def _free_text(folder: Path) -> str:
    try:
        present = next(path for path in (folder, *folder.parents) if path.exists())
        return size_text(shutil.disk_usage(present).free)
    except OSError:
        return "unknown bytes"
