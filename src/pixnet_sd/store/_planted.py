"""What lies in a work folder may have come with an archive or from another user: no link in it is ever followed."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pixnet_sd._errors import StoreError

__all__ = ["check_ours", "check_plain", "open_regular", "plain_files"]

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
