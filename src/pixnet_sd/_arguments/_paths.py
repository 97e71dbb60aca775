"""Rules of what names a file or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pixnet_sd._errors import PixNetError

from ._rules import LONGEST_NAME, Rule, Unfit, check_text
from ._shown import shown

__all__ = ["folder", "hub_name", "path"]

_LONGEST_PATH = 4096


def path(what: str = "a path", *, exists: bool = False) -> Rule:
    """Text or a path object that can name a file; not looked for unless it has to be a folder that `exists`."""

    def read(value: Any) -> str | Path:
        if not isinstance(value, str | Path) and not (
            isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
        ):
            raise Unfit
        found = os.fspath(value)
        _check_path(found)
        if exists and not Path(found).expanduser().is_dir():
            raise Unfit("it is a file" if Path(found).expanduser().exists() else "there is no such folder")
        return str(value) if isinstance(value, str) else Path(value)

    return Rule(what, read)


def hub_name(what: str) -> Rule:
    """A name on the hub, or a folder: what is there, and what could not be a name, has to be one."""
    anywhere, here = path(what), path(what, exists=True)

    def read(value: Any) -> str | Path:
        found = anywhere.read(value)
        is_local = str(found).startswith(("~", "/", "./", "../")) or Path(found).exists()
        return here.read(found) if is_local else found

    return Rule(what, read)


def _check_path(found: str) -> None:
    if not found:
        raise Unfit("it is empty")
    check_text(found, _LONGEST_PATH)
    for part in Path(found).parts:
        check_text(part, LONGEST_NAME)
    try:
        Path(found).expanduser()
    except RuntimeError as error:
        raise Unfit("there is no such user") from error


def folder(what: str, error: type[PixNetError]) -> Rule:
    """A folder that is there or can be made."""
    where = path(what)

    def read(value: Any) -> str | Path:
        found = where.read(value)
        place = Path(found).expanduser()
        for above in (place, *place.parents):
            if above.is_dir():
                break
            if above.exists() or above.is_symlink():
                raise Unfit(f"{shown(above)} is no folder")
        return found

    return Rule(what, read, error)
