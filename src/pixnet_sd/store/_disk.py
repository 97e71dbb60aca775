"""Free memory, without a dependency for it.

What lies in a work folder may have come with an archive or from another user: no link in it is ever followed.

A secret of this user, by which a run knows again what an earlier run of the same user has written.

Element names: which are taken, which are allowed.

The local folder behind a SpatialData object: where it is, whether it can be written, whether there is room.

Scratch work happens in one hidden folder beside the store, ``.{store}.pixnet_sd``: on the same file system, so that a
finished element enters the store by rename, and outside the store, so that a reader never meets half an element.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = [
    "ELEMENT_TYPES",
    "available_memory",
    "check_free_disk",
    "check_names",
    "check_ours",
    "check_plain",
    "check_same_folder",
    "check_writable",
    "delete_folder",
    "existing_names",
    "explain_disk_errors",
    "folder_id",
    "hold_lock",
    "is_name",
    "known_secrets",
    "local_store",
    "open_regular",
    "plain_files",
    "read_json",
    "secret",
    "size_text",
    "sweep_drafts",
    "work_folder",
    "write_json",
]


def available_memory() -> int:
    """Bytes of memory that a new array may take: what Linux calls available, elsewhere half of all there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 8 * 2**30


NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Flags that keep an open from following a link and from waiting for the other end of a pipe."""

_KINDS = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}


def check_ours(folder: Path) -> None:
    """Raise unless ``folder`` is absent, or a folder of this user.

    Raises
    ------
    StoreError
        For a link, a file, and a folder of another user, who could change what lies in it at any time.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{folder} cannot be looked at: {error.strerror or error}.") from error
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(
            f"{folder} is {_kind(found.st_mode)}, where pixnet_sd keeps unfinished work in a folder. Look at it, and "
            "delete it."
        )
    if not is_ours(found.st_uid, folder.parent):
        raise StoreError(
            f"{folder} holds unfinished work of another user (number {found.st_uid}). When no run of theirs is at "
            "work, let them make their call again or delete the folder, or use a copy of the store."
        )


def is_ours(owner: int, folder: Path) -> bool:
    """Whether files of ``owner`` are this user's; some file systems give all files in ``folder`` one owner."""
    if not hasattr(os, "geteuid") or owner == os.geteuid():
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid == owner
    except OSError:
        return False


def plain_files(folder: Path, *, depth: int | None = None) -> Iterator[os.DirEntry[str]]:
    """Regular files under ``folder``, ``depth`` levels of it or all.

    Raises
    ------
    StoreError
        At the first thing that is neither a folder nor a regular file.
    """
    waiting = [(os.fspath(folder), 1)]
    while waiting:
        path, level = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:  # another run's, and done with
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth is None or level < depth:
                    waiting.append((entry.path, level + 1))
            elif entry.is_file(follow_symlinks=False):
                yield entry
            else:
                _refuse(entry)


def check_plain(folder: Path, *, depth: int | None = None) -> None:
    """Raise at a link, pipe or the like under ``folder``; see `plain_files`."""
    for _ in plain_files(folder, depth=depth):
        pass


def _refuse(entry: os.DirEntry[str]) -> None:
    try:
        kind = _kind(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:  # gone since
        return
    raise StoreError(
        f"{entry.path} is {kind}. pixnet_sd never makes one among its unfinished work, and does not follow it: nothing "
        "was done. Look at the folder that it is in, and delete that."
    )


def open_regular(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a regular file, whatever lies there by now; the handle.

    Raises
    ------
    OSError
        As `os.open`.
    StoreError
        When it is a link, a pipe or the like.
    """
    try:
        handle = os.open(path, flags | NO_FOLLOW, mode)
    except OSError:
        if path.is_symlink():
            raise StoreError(f"{path} is a link, which pixnet_sd does not follow. Look at it, and delete it.") from None
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise StoreError(f"{path} is {_kind(found.st_mode)} where a file is needed. Look at it, and delete it.")
    return handle


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


_BYTES = 32
_NAME = "journal.key"


def secret() -> bytes:
    """The secret, made on first use.

    Raises
    ------
    StoreError
        When it can be kept neither in the user's folder for state nor in the one for temporary files.
    """
    troubles = []
    for folder in _folders():
        try:
            _make_private(folder)
            return _read(folder / _NAME) if (folder / _NAME).exists() else _make(folder / _NAME)
        except (OSError, StoreError) as error:
            troubles.append(f"{folder}: {error}")
    raise StoreError(
        f"No place for a small private file ({'; '.join(troubles)}). Set XDG_STATE_HOME to a folder of yours that can "
        "be written."
    )


def known_secrets() -> Iterator[bytes]:
    """Every secret of this user that there is; none is made."""
    for folder in _folders():
        with contextlib.suppress(OSError, StoreError):
            _check_private(folder)
            yield _read(folder / _NAME)


def _folders() -> list[Path]:
    """The user's folder for state, then, where a home cannot be written, the one for temporary files."""
    folders = []
    chosen = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(chosen):
        folders.append(Path(chosen) / "pixnet_sd")
    else:
        with contextlib.suppress(RuntimeError):  # a user without a home
            folders.append(Path.home() / ".local" / "state" / "pixnet_sd")
    return [*folders, Path(tempfile.gettempdir()) / f"pixnet_sd-{_user()}"]


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_private(folder)


def _check_private(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != _user() or found.st_mode & 0o022:
        raise StoreError("not a folder that only this user can write")


def _read(path: Path) -> bytes:
    handle = open_regular(path, os.O_RDONLY)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        value = file.read(_BYTES + 1)
    if found.st_uid != _user() or found.st_mode & 0o077 or len(value) != _BYTES:
        raise StoreError(f"{path} is not a secret of this user; delete it")
    return value


def _make(path: Path) -> bytes:
    """Whole or not at all; of two runs at once the first one's stays."""
    draft = path.with_name(f"{_NAME}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(handle)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # no hard links there
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return _read(path)


ELEMENT_TYPES = ("images", "labels", "points", "shapes", "tables")


def existing_names(sdata: SpatialData) -> dict[str, str]:
    """Name → element type of every element in memory and, for a backed object, in its store.

    The store's folders are listed directly: consolidated metadata may not know an element yet.
    """
    store = local_store(sdata)
    names: dict[str, str] = {}
    for kind in ELEMENT_TYPES:
        if store is not None and (store / kind).is_dir():
            names.update({entry.name: kind for entry in (store / kind).iterdir() if entry.is_dir()})
    for kind in ELEMENT_TYPES:
        names.update(dict.fromkeys(getattr(sdata, kind).keys(), kind))
    return names


def check_names(sdata: SpatialData, names: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Raise unless elements can be added under ``names``.

    Parameters
    ----------
    sdata
        The object, in memory or backed.
    names
        Element name → element type (``"images"``, ``"labels"``, ``"points"``, ``"shapes"``, ``"tables"``).
    overwrite
        Whether an element of the same name *and* type may be replaced.

    Raises
    ------
    StoreError
        For a name with characters that SpatialData does not allow, for a name that is taken, and for one that differs
        from a taken one only in case (they are the same file on some systems).
    """
    taken = existing_names(sdata)
    spelled = {name.lower(): name for name in taken}
    for name, kind in names.items():
        _check_characters(name)
        if name in taken:
            _check_replaceable(name, kind, taken[name], overwrite)
        elif name.lower() in spelled:
            raise StoreError(
                f"{name!r} differs from the existing element {spelled[name.lower()]!r} only in upper and lower case. "
                "Choose another `key_added`."
            )
        spelled[name.lower()] = name


def is_name(name: str) -> bool:
    """Whether SpatialData allows an element to be called so."""
    allowed = bool(name) and all(c.isalnum() or c in "_-." for c in name)
    return allowed and name not in (".", "..") and not name.startswith("__")


def _check_characters(name: str) -> None:
    """SpatialData's own rule, with a message that names the remedy."""
    if not is_name(name):
        raise StoreError(
            f"{name!r} cannot be the name of an element: use letters, digits, '_', '-' and '.' only, and do not start "
            "with '__'."
        )


def _check_replaceable(name: str, kind: str, existing: str, overwrite: bool) -> None:
    """Only an element of the same type, and only when asked to."""
    if kind != existing:
        raise StoreError(
            f"There is already an element {name!r} under {existing}, so it cannot be used for {kind} (names are unique "
            "across element types). Choose another `key_added`."
        )
    if not overwrite:
        raise StoreError(
            f"{existing}[{name!r}] exists already. Pass `overwrite=True` to replace it, or choose another `key_added`."
        )


if sys.platform != "win32":
    import fcntl


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
