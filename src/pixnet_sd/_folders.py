"""Folders that a run makes on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["no_empty_folders_left"]


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
