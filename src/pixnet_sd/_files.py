"""Files that may have been damaged or planted: regular ones are read, and new ones appear whole or not at all."""

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

_PREFIX, _SUFFIX = ".pixnet_sd-", ".partial"

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
}


def file_kind(mode: int) -> str:
    """Name the kind of what has a mode: ``"a link"``, ``"a pipe"`` and so on."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


@contextlib.contextmanager
def replace_file(path: Path, *, aside: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Write a file aside, at the path that is yielded, and put it in its place in one step; see `replace_files`."""
    with replace_files(path.parent, [path.name], aside=aside, durable=durable) as folder:
        yield folder / path.name


@contextlib.contextmanager
def replace_files(
    directory: Path, names: Sequence[str], *, aside: Path | None = None, durable: bool = True
) -> Iterator[Path]:
    """Write several files aside, and put them in their places one after the other.

    They are written in a new folder that nobody else can write to, so no link is followed whatever lies in the
    directory, and they get the permissions of the files that they replace, or else those of any new file.

    Parameters
    ----------
    directory
        Where they go; made if it is not there. A link of a file's name is replaced, not followed.
    names
        Theirs, in the order in which they are put in place.
    aside
        Folder on the same file system to write in; default: the directory.
    durable
        Have them on disk before they are in their places, so that a power cut leaves no empty file there.

    Yields
    ------
    The folder to write in. When the block raises, nothing is replaced.
    """
    with folder_for(directory):
        home = directory if aside is None else aside
        clear_left_over(home)
        folder, handle = _private_folder(home)
        try:
            usual = _usual_mode(folder)
            yield folder
            for name in names:
                _finish(folder / name, _mode_of(directory / name, usual), durable=durable)
            for name in names:
                (folder / name).replace(directory / name)
            if durable:
                with contextlib.suppress(OSError):  # not every file system syncs folders
                    _sync(directory)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


@contextlib.contextmanager
def folder_for(directory: Path) -> Iterator[None]:
    """Make a folder with those around it, and take back those that stay empty."""
    missing = _missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        _remove_empty(missing)


@contextlib.contextmanager
def no_empty_folders_left(folder: Path) -> Iterator[None]:
    """On an error, remove ``folder`` and those above it, as far as they were made inside and nothing is in them."""
    missing = _missing(folder)
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _missing(folder: Path) -> list[Path]:
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def open_regular(path: Path, *, most_bytes: int | None = None) -> BinaryIO:
    """Open a file, or a link to one, for reading; a pipe would be waited for without end, and a device never ends.

    Raises
    ------
    CheckpointError
        It is something else than a regular file, larger than ``most_bytes``, or may not be read.
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
            raise CheckpointError(_not_regular(path, file_kind(about.st_mode)))
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
    """Replace ``~`` in a path; a CheckpointError says that there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{str(path)!r} cannot be found: {error}") from error


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """Read a whole file, see `open_regular`."""
    with open_regular(path, most_bytes=most_bytes) as file, _explained(path):
        return file.read(most_bytes + 1)


def hash_regular(path: Path, *, most_bytes: int | None = None) -> tuple[int, str]:
    """Size and SHA-256 of a whole file, see `open_regular`."""
    with open_regular(path, most_bytes=most_bytes) as file, _explained(path):
        digest = file_hash(file)
        return file.tell(), digest


def file_hash(file: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, as hex."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Disks and networks fail in the middle, too."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_cannot_open(path, error)) from error


def _cannot_open(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"{str(path)!r} is no name of a file ({error}). Check the path."
    if error.errno == errno.ENXIO:  # nobody is at the other end
        return _not_regular(path, "a socket or a device")
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{str(path)!r} cannot be read: you lack the permission{_permissions(path)}. Ask for it, or chmod u+r."
    return f"{str(path)!r} cannot be read: {error.strerror or error}. Put the file there that belongs there."


def _not_regular(path: Path, kind: str) -> str:
    return f"{str(path)!r} is {kind}, and a regular file is needed. Put the file there that belongs there."


def _permissions(path: Path) -> str:
    """Those of the file, or of the first folder around it that can be looked at."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            about = place.stat()
            return f" ({str(place)!r} is {stat.filemode(about.st_mode)} of user {about.st_uid})"
    return ""


def _private_folder(home: Path) -> tuple[Path, int]:
    """Make a new folder; its handle holds the lock by which others know that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=home))
        handle = _open_folder(folder)
        if handle is None:  # taken for a left-over in between, as below
            continue
        if try_lock(handle) is not False and folder.exists():
            return folder, handle
        os.close(handle)


def clear_left_over(home: Path) -> None:
    """Delete what killed processes have left aside in a folder: nobody holds its lock any more."""
    for folder in home.glob(f"{_PREFIX}*{_SUFFIX}"):
        handle = _open_folder(folder)
        if handle is None:
            continue
        if try_lock(handle):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _open_folder(folder: Path) -> int | None:
    """Handle of a folder; None where it is none, or a link."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder unless another process has; None on a file system without locks."""
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


def _mode_of(path: Path, default: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        return stat.S_IMODE(mode) if stat.S_ISREG(mode) else default
    return default


def _finish(path: Path, mode: int, *, durable: bool) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(handle, mode)
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
