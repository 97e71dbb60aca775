"""The store behind an object, and the work folder beside it: places, names, room, locks, links and a secret.

Unfinished work lies in one hidden folder beside the store, ``.{store}.pixnet_sd``: on the same file system, so that a
finished element enters the store by rename, and outside the store, so that a reader never meets half an element. What
lies there may have come with an archive or from another user: no link in it is ever followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spatialdata import SpatialData

from pixnet_sd._files import file_kind, replace_file, try_lock
from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError

ELEMENT_TYPES = ("images", "labels", "points", "shapes", "tables")

DISK_MARGIN = 0.05  # fraction asked for on top of the bytes needed
NAME = r"^(?!__|\.{1,2}\Z)[\w.-]+\Z"  # of an element, as SpatialData allows it


def local_store(sdata: SpatialData) -> Path | None:
    """Resolve the folder of the Zarr store behind ``sdata``; None when the object lives in memory.

    A StoreError tells of an archive, a remote store, and SpatialData's old format, which current elements would break.
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
    root = store / "zarr.json"
    if not (root.is_file() or (store / ".zgroup").is_file()):
        raise StoreError(_away(root))
    attributes = read_json(root).get("attributes", {}) if root.is_file() else {}
    if attributes.get("spatialdata_attrs", {}).get("version", "0.1") == "0.1":
        raise StoreError(
            f"{store} is not a SpatialData store in the current (Zarr v3) format. Write a fresh copy with "
            "`sdata.write('/some/other.zarr')`, read it with `spatialdata.read_zarr` and use that."
        )
    return store


def _away(path: Path) -> str:
    return (
        f"{path} is not there any more: it, or a folder that holds it, was moved, renamed or deleted, or its disk is "
        "not mounted. Bring it back, or open the store where it is now, and make the same call."
    )


def work_folder(store: Path) -> Path:
    """Name the work folder beside ``store``; a StoreError tells of a link, a file or another user's folder there."""
    folder = store.parent / f".{store.name}.pixnet_sd"
    try:
        about = folder.lstat()
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise StoreError(f"{folder} cannot be looked at: {error.strerror or error}.") from error
    if not stat.S_ISDIR(about.st_mode):
        raise StoreError(
            f"{folder} is {file_kind(about.st_mode)}, where pixnet_sd keeps unfinished work in a folder. Look at it, "
            "and delete it."
        )
    if not is_ours(about.st_uid, folder.parent):
        raise StoreError(
            f"{folder} holds unfinished work of another user (number {about.st_uid}). When no run of theirs is at "
            "work, let them make their call again or delete the folder, or use a copy of the store."
        )
    return folder


def is_ours(owner: int, folder: Path) -> bool:
    """Whether files of ``owner`` are this user's; some file systems give all files in ``folder`` one owner."""
    if owner == os.geteuid():
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid == owner
    except OSError:
        return False


class Partial:
    """A folder of unfinished work, which the next run with the same identity (JSON) takes up."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        self._place: tuple[int, int] | None = None  # device and inode

    def is_there(self) -> bool:
        """Whether work with the same identity is there."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            if read_json(self.folder / "partial.json") == self._identity:
                self._place = _place(self.folder)
                return True
        return False

    @contextlib.contextmanager
    def made(self, doing: str) -> Iterator[None]:
        """Make the folder in place of what is there, see `explain_disk_errors`; on failure nothing remains."""
        if self.folder.exists():
            logger.info("The unfinished work in %s was made with other settings and is deleted.", self.folder)
        with explain_disk_errors(doing, self.folder):
            self.delete()
            try:
                self.folder.mkdir()
                self._place = _place(self.folder)
                yield
                # last: from here on it may be taken up
                write_json(self.folder / "partial.json", self._identity, scratch=self.folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    self.delete()
                raise

    @contextlib.contextmanager
    def used(self, doing: str) -> Iterator[None]:
        """`check`, and explain what goes wrong, see `explain_disk_errors`."""
        with explain_disk_errors(doing, self.folder):
            self.check()
            yield

    def check(self) -> None:
        """Raise a StoreError when the folder is away, or another is in its place: nothing of ours goes into that."""
        if not self.folder.exists() or _place(self.folder) != self._place:
            raise StoreError(_away(self.folder))

    def delete(self) -> None:
        """Delete the folder, which may be absent: first what makes a run go on, so that a kill leaves no half of it."""
        (self.folder / "partial.json").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)


def _place(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def plain_files(folder: Path, *, depth: int | None = None) -> list[os.DirEntry[str]]:
    """Find the files under ``folder``, ``depth`` levels or all; a StoreError tells of a link, pipe or the like."""
    files, waiting = [], [(os.fspath(folder), 1)]
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
                files.append(entry)
            elif os.path.lexists(entry.path):  # else gone since
                raise StoreError(
                    f"{entry.path} is {file_kind(entry.stat(follow_symlinks=False).st_mode)}, which pixnet_sd neither "
                    "makes nor follows: nothing was done. Look at the folder that it is in, and delete that."
                )
    return files


def open_regular(path: Path, flags: int) -> int:
    """Open a file and return the handle; as `os.open`, but a StoreError tells of a link, pipe or the like."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # nor waits for a pipe's other end
    except OSError:
        if path.is_symlink():
            raise StoreError(f"{path} is a link, which pixnet_sd does not follow. Look at it, and delete it.") from None
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise StoreError(f"{path} is {file_kind(mode)} where a file is needed. Look at it, and delete it.")
    return handle


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from ``path``; a StoreError tells that it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: it holds a JSON {type(value).__name__} where an object is needed.")
    return value


def write_json(path: Path, value: dict[str, Any], *, scratch: Path) -> None:
    """Replace ``path`` by ``value`` in one step; ``scratch`` is a folder on the same file system."""
    path.parent.stat()  # raises where it was deleted: it is not made anew
    scratch.mkdir(exist_ok=True)
    with replace_file(path, aside=scratch) as draft:
        draft.write_text(json.dumps(value, indent=2), encoding="utf-8")


@contextlib.contextmanager
def hold_lock(path: Path, *, wait_s: float, busy: str) -> Iterator[None]:
    """Hold the lock file ``path``, made with its folder; the kernel frees it when the process dies, however it dies.

    When another process holds it for more than ``wait_s`` seconds, a StoreError says ``busy``.
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
        with contextlib.suppress(FileNotFoundError):
            if try_lock(handle) is not False and os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        os.close(handle)
        if time.monotonic() > deadline:
            raise StoreError(busy)
        time.sleep(0.02)


def lock_store(store: Path, *, wait_s: float) -> contextlib.AbstractContextManager[None]:
    """Let one run at a time write into a store."""
    busy = f"Another run is writing into {store}; try again later."
    return hold_lock(work_folder(store) / "lock", wait_s=wait_s, busy=busy)


def existing_names(sdata: SpatialData) -> dict[str, str]:
    """Map the names of all elements, in memory and in the store, to their types."""
    store = local_store(sdata)
    names: dict[str, str] = {}
    for kind in ELEMENT_TYPES:
        # listed directly: consolidated metadata may not know an element yet
        if store is not None and (store / kind).is_dir():
            names.update({entry.name: kind for entry in (store / kind).iterdir() if entry.is_dir()})
    names.update({name: kind for kind, name, _ in sdata.gen_elements()})
    return names


def check_names(sdata: SpatialData, names: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Raise a StoreError unless elements can be added under ``names``, element name → element type.

    ``overwrite`` allows an element of the same name *and* type to be replaced. Names that differ only in case are the
    same file on some systems.
    """
    taken = existing_names(sdata)
    spelled = {name.lower(): name for name in taken}
    for name, kind in names.items():
        other = spelled.get(name.lower(), name)
        if re.match(NAME, name) is None:
            raise StoreError(
                f"{name!r} cannot be the name of an element: use letters, digits, '_', '-' and '.' only, and do not "
                "start with '__'."
            )
        if name in taken and (taken[name] != kind or not overwrite):
            remedy = "Pass `overwrite=True` to replace it, or choose" if taken[name] == kind else "Choose"
            raise StoreError(
                f"{taken[name]}[{name!r}] exists already (names are unique across element types). {remedy} another "
                "`key_added`."
            )
        if name not in taken and other != name:
            raise StoreError(
                f"{name!r} differs from the element {other!r} only in upper and lower case. Choose another `key_added`."
            )
        spelled[name.lower()] = name


def check_writable(store: Path) -> None:
    """Raise a StoreError unless elements can be renamed into ``store`` from its work folder."""
    remedy = "Give yourself write access, or work on a copy: `sdata.write('/some/folder.zarr')`."
    inside = [store, *(store / kind for kind in ELEMENT_TYPES if (store / kind).is_dir())]
    for folder in (*inside, store.parent):
        if folder in inside and folder.is_symlink():
            raise StoreError(f"{folder} is a link, through which pixnet_sd does not write. {remedy}")
        try:  # `os.access` is wrong for network mounts and for the superuser
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written ({error.strerror or error}), but results are prepared beside {store} and "
                f"moved in. {remedy}"
            ) from error
    if len({os.stat(folder).st_dev for folder in (*inside, store.parent)}) > 1:
        raise StoreError(
            f"{store} and the folder that holds it lie on different file systems, so results cannot be moved in as a "
            "whole. Copy the store into a folder of one file system."
        )


def available_memory() -> int:
    """Bytes of memory that a new array may take: what Linux calls available, elsewhere half of all there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def size_text(n_bytes: float) -> str:
    """Bytes for people: ``"1.25 GB"`` (10⁹ bytes), below a tenth of that ``"3.10 MB"``."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


@contextlib.contextmanager
def explain_disk_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what, such as ``"Writing the table"``, failed in a work folder."""
    try:
        yield
    except OSError as error:
        try:
            present = next(path for path in (folder, *folder.parents) if path.exists())
            free = size_text(shutil.disk_usage(present).free)
        except OSError:
            free = "unknown bytes"
        raise StoreError(
            f"{doing} in {folder} failed: {error.strerror or error}; {free} are free there. The store is unchanged. "
            "Mend that, and the same call goes on from what is done."
        ) from error


_SECRET_BYTES = 32
_SECRET = "journal.key"


def secret() -> bytes:
    """Read the secret by which a run knows what an earlier run of the same user has written; made on first use."""
    troubles = []
    for folder in _secret_folders():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(folder)
            if not (folder / _SECRET).exists():
                _make_secret(folder / _SECRET)
            return _read_secret(folder / _SECRET)
        except (OSError, StoreError) as error:
            troubles.append(f"{folder}: {error}")
    raise StoreError(
        f"No place for a small private file ({'; '.join(troubles)}). Set XDG_STATE_HOME to a folder of yours that can "
        "be written."
    )


def known_secrets() -> Iterator[bytes]:
    """Read every secret of this user that there is; none is made."""
    for folder in _secret_folders():
        with contextlib.suppress(OSError, StoreError):
            _check_private(folder)
            yield _read_secret(folder / _SECRET)


def _secret_folders() -> Iterator[Path]:
    """Name the user's folder for state, then, where a home cannot be written, the one for temporary files."""
    chosen = os.environ.get("XDG_STATE_HOME", "")
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".local" / "state") / "pixnet_sd"
    yield Path(tempfile.gettempdir()) / f"pixnet_sd-{os.geteuid()}"


def _check_private(folder: Path) -> None:
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise StoreError("not a folder that only this user can write")


def _read_secret(path: Path) -> bytes:
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        about = os.fstat(file.fileno())
        value = file.read(_SECRET_BYTES + 1)
    if about.st_uid != os.geteuid() or about.st_mode & 0o077 or len(value) != _SECRET_BYTES:
        raise StoreError(f"{path} is not a secret of this user; delete it")
    return value


def _make_secret(path: Path) -> None:
    """Write it whole or not at all; of two runs at once the first one's stays."""
    handle, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
            file.flush()
            os.fsync(handle)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # no hard links there
            os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
