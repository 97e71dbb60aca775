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

# by the first letter of ``ls -l``
_KINDS = {"l": "link", "p": "pipe", "s": "socket", "c": "device", "b": "device", "d": "folder", "-": "file"}


def file_kind(mode: int) -> str:
    """Name the kind of what has a mode: ``"a link"``, ``"a pipe"`` and so on."""
    return f"a {_KINDS.get(stat.filemode(mode)[0], 'special file')}"


@contextlib.contextmanager
def replace_file(path: Path, *, aside: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Write a file aside, at the path that is yielded, and put it in its place in one step; see `replace_files`."""
    with replace_files(path.parent, [path.name], aside=aside, durable=durable) as folder:
        yield folder / path.name


@contextlib.contextmanager
def replace_files(
    directory: Path, names: Sequence[str], *, aside: Path | None = None, durable: bool = True
) -> Iterator[Path]:
    """Write files aside, in the folder that is yielded, and put them in their places in the order of their names.

    The new folder is one that nobody else can write to, so no link is followed whatever lies in the directory, which is
    made if it is not there, and a link of a file's name is replaced. Files get the permissions of those that they
    replace, or else those of any new file. `aside` is a folder on the same file system to write in instead of the
    directory. `durable` files are on disk before they are in their places, so that a power cut leaves no empty file
    there. When the block raises, nothing is replaced.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(no_empty_folders_left(directory))
        directory.mkdir(parents=True, exist_ok=True)
        folder = held.enter_context(_private_folder(directory if aside is None else aside))
        with _opened(folder / ".mode", os.O_CREAT | os.O_EXCL) as handle:
            # the umask itself cannot be read without changing it for all threads
            usual = stat.S_IMODE(os.fstat(handle).st_mode)
        (folder / ".mode").unlink()
        yield folder
        for name in names:
            with _opened(folder / name, os.O_NOFOLLOW) as handle:
                os.fchmod(handle, _mode_of(directory / name, usual))
                if durable:
                    os.fsync(handle)
        for name in names:
            (folder / name).replace(directory / name)
        if durable:
            # not every file system syncs folders
            with contextlib.suppress(OSError), _opened(directory) as handle:
                os.fsync(handle)


@contextlib.contextmanager
def no_empty_folders_left(folder: Path) -> Iterator[None]:
    """In the end remove ``folder`` and those above it, as far as they were made inside and nothing is in them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()


def open_regular(path: Path, *, most_bytes: int | None = None) -> BinaryIO:
    """Open a file, or a link to one, for reading; a pipe would be waited for without end, and a device never ends.

    CheckpointError: it is something else, larger than ``most_bytes``, or may not be read. FileNotFoundError,
    NotADirectoryError: there is none.
    """
    with _explained(path):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
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
    """Say why a file cannot be opened or read: disks and networks fail in the middle, too."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        raise CheckpointError(_cannot_read(path, error)) from error


def _cannot_read(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"{str(path)!r} is no name of a file ({error}). Check the path."
    if error.errno == errno.ENXIO:  # nobody is at the other end
        return _not_regular(path, "a socket or a device")
    if error.errno not in (errno.EACCES, errno.EPERM):
        return f"{str(path)!r} cannot be read: {error.strerror or error}. Put the file there that belongs there."
    permissions = ""
    for place in (path, *path.parents):  # of the file, or of the first folder around it that can be looked at
        with contextlib.suppress(OSError):
            about = place.stat()
            permissions = f" ({str(place)!r} is {stat.filemode(about.st_mode)} of user {about.st_uid})"
            break
    return f"{str(path)!r} cannot be read: you lack the permission{permissions}. Ask for it, or chmod u+r."


def _not_regular(path: Path, kind: str) -> str:
    return f"{str(path)!r} is {kind}, and a regular file is needed. Put the file there that belongs there."


@contextlib.contextmanager
def _private_folder(home: Path) -> Iterator[Path]:
    """Make a new folder for a while; a lock on it tells others that it is in use."""
    clear_left_over(home)
    handle: int | None = None
    while handle is None:  # in between, another process may take it for left over
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=home))
        handle = _locked_folder(folder, without_locks=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def clear_left_over(home: Path) -> None:
    """Delete what killed processes have left aside in a folder: nobody holds its lock any more."""
    for folder in home.glob(f"{_PREFIX}*{_SUFFIX}"):
        handle = _locked_folder(folder, without_locks=False)
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _locked_folder(folder: Path, *, without_locks: bool) -> int | None:
    """Open and lock a folder; None where it is a link, gone, or another process's."""
    try:
        handle = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    is_locked = try_lock(handle)
    if (without_locks if is_locked is None else is_locked) and folder.exists():
        return handle
    os.close(handle)
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


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _mode_of(path: Path, default: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        return stat.S_IMODE(mode) if stat.S_ISREG(mode) else default
    return default
