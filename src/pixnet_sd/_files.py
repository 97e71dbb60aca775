"""Files that may have been damaged or planted: regular ones are read, and new ones appear whole or not at all.

Folders that a run makes on its way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pixnet_sd.errors import CheckpointError

__all__ = [
    "clear_left_over",
    "file_hash",
    "folder_for",
    "hash_regular",
    "home_expanded",
    "no_empty_folders_left",
    "open_regular",
    "read_regular",
    "replace_file",
    "replace_files",
]

_PREFIX, _SUFFIX = ".pixnet_sd-", ".partial"
_PIECE = 1 << 20

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextlib.contextmanager
def replace_file(path: Path, *, aside: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Write a file aside, and put it in its place in one step.

    Parameters
    ----------
    path
        The file; a link of that name is replaced, not followed.
    aside
        Folder on the same file system to write in; default: the file's.
    durable
        Have it on disk before it is in its place, so that a power cut leaves no empty file there.

    Yields
    ------
    Path to write to. When the block raises, nothing is replaced.
    """
    with replace_files(path.parent, [path.name], aside=aside, durable=durable) as folder:
        yield folder / path.name


@contextlib.contextmanager
def replace_files(
    directory: Path, names: Sequence[str], *, aside: Path | None = None, durable: bool = True
) -> Iterator[Path]:
    """Write several files aside, and put them in their places one after the other.

    They are written in a new folder that nobody else can write to, so no link is followed whatever lies in the
    directory, and they get the permissions that any new file gets, whoever writes them.

    Parameters
    ----------
    directory
        Where they go; made if it is not there.
    names
        Theirs, in the order in which they are put in place.
    aside, durable
        As of `replace_file`.

    Yields
    ------
    The folder to write in. When the block raises, nothing is replaced.
    """
    with folder_for(directory):
        home = directory if aside is None else aside
        clear_left_over(home)
        folder, handle = _private_folder(home)
        try:
            mode = _usual_mode(folder)
            yield folder
            for name in names:
                _finish(folder / name, mode, durable=durable)
            for name in names:
                (folder / name).replace(directory / name)
            if durable:
                _sync(directory)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


@contextlib.contextmanager
def folder_for(directory: Path) -> Iterator[None]:
    """Make a folder with those around it, and take back those that stay empty.

    Parameters
    ----------
    directory
        The folder; it may be there.
    """
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only what is empty


def open_regular(path: Path, *, most_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading that is one, and no larger than it can be.

    A pipe would be waited for without end, and a device never ends.

    Parameters
    ----------
    path
        The file, or a link to one.
    most_bytes
        Largest size that is believed; None: any.

    Raises
    ------
    CheckpointError
        It is something else than a regular file, too large, or may not be read.
    FileNotFoundError, NotADirectoryError
        There is none.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        raise CheckpointError(_cannot_open(path, error)) from error
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise CheckpointError(_no_regular_file(path, _KINDS.get(stat.S_IFMT(about.st_mode), "something else")))
        if most_bytes is not None and about.st_size > most_bytes:
            raise CheckpointError(
                f"{str(path)!r} has {about.st_size:,} bytes where at most {most_bytes:,} can be right, and was not "
                "read. Put the file there that belongs there."
            )
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def home_expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced.

    Raises
    ------
    CheckpointError
        There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{str(path)!r} cannot be found: {error}") from error


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """Read a whole file, see `open_regular`."""
    with open_regular(path, most_bytes=most_bytes) as file, _said(path):
        return file.read(most_bytes + 1)


def hash_regular(path: Path, *, most_bytes: int | None = None) -> tuple[int, str]:
    """Size and SHA-256 of a whole file, see `open_regular`."""
    with open_regular(path, most_bytes=most_bytes) as file, _said(path):
        digest = file_hash(file)
        return file.tell(), digest


def file_hash(file: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, as hex."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Disks and networks fail in the middle, too."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_cannot_open(path, error)) from error


def _cannot_open(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"{str(path)!r} is no name of a file ({error}). Check the path."
    if error.errno == errno.ENXIO:  # nobody is at the other end
        return _no_regular_file(path, "a socket or a device")
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{str(path)!r} cannot be read: you lack the permission{_permissions(path)}. Ask for it, or chmod u+r."
    return f"{str(path)!r} cannot be read: {error.strerror or error}. Put the file there that belongs there."


def _no_regular_file(path: Path, kind: str) -> str:
    return f"{str(path)!r} is {kind}, and a regular file is needed. Put the file there that belongs there."


def _permissions(path: Path) -> str:
    """Those of the file, or of the first folder around it that can be looked at."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            about = place.stat()
            return f" ({str(place)!r} is {stat.filemode(about.st_mode)} of user {about.st_uid})"
    return ""


def _private_folder(home: Path) -> tuple[Path, int]:
    """A new folder, and the handle by whose lock others know that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=home))
        handle = _open_folder(folder)
        if handle is None:  # taken for a left-over in between, as below
            continue
        if _try_lock(handle) is not False and folder.exists():
            return folder, handle
        os.close(handle)


def clear_left_over(home: Path) -> None:
    """Delete what processes that were killed have left aside: nobody holds its lock any more.

    Parameters
    ----------
    home
        Folder that they wrote in.
    """
    for folder in home.glob(f"{_PREFIX}*{_SUFFIX}"):
        handle = _open_folder(folder)
        if handle is None:
            continue
        if _try_lock(handle):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _open_folder(folder: Path) -> int | None:
    """Handle of a folder; None where it is none, or a link."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def _try_lock(handle: int) -> bool | None:
    """Whether the lock was to be had; None on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _usual_mode(folder: Path) -> int:
    """Permissions of a new file; the umask itself cannot be read without changing it for all threads."""
    probe = folder / ".mode"
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def _finish(path: Path, mode: int, *, durable: bool) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(handle, mode)
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync(directory: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system syncs folders
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def no_empty_folders_left(folder: Path) -> Iterator[None]:
    """On an error, remove ``folder`` and those above it, as far as they were made inside and nothing is in them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
