"""A secret of this user, by which a run knows again what an earlier run of the same user has written."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pixnet_sd._errors import StoreError

from ._planted import open_regular

__all__ = ["known_secrets", "secret"]

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
