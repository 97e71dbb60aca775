"""An append-only log of the windows of the map whose regions are on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ._planted import open_regular

if TYPE_CHECKING:
    from pixnet_sd.nn.grid import Window

__all__ = ["Corners", "ShareRange", "WindowLog"]

Corners = tuple[int, int, int, int]
"""row0, row1, col0, col1 of a window."""

_SYNCED = "synced ."


class ShareRange(NamedTuple):
    """Which records of the file of shares are those of a window."""

    first: int
    n: int


class WindowLog:
    """One line a window, written after the window's data; a line that a kill cut short counts as not written.

    A line ``synced`` says that the data of all windows before it were forced to disk. After a crash of the machine only
    those can be believed.

    Parameters
    ----------
    path
        Log file.
    believe_all
        Whether lines after the last ``synced`` count.
    """

    def __init__(self, path: Path, *, believe_all: bool) -> None:
        lines = _whole_lines(path)
        if not believe_all:
            synced = [k for k, line in enumerate(lines) if line == _SYNCED]
            lines = lines[: synced[-1] + 1] if synced else []
        self.windows: dict[Corners, ShareRange] = {}
        for line in lines:
            if line != _SYNCED:
                row0, row1, col0, col1, first, n = map(int, line.split()[:-1])
                self.windows[row0, row1, col0, col1] = ShareRange(first, n)
        self._handle = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if not believe_all:
            os.ftruncate(self._handle, 0)
            self._append("\n".join(lines))
            os.fsync(self._handle)

    def __contains__(self, window: Window | Corners) -> bool:
        return tuple(window) in self.windows

    @property
    def n_shares(self) -> int:
        """Records of the file of shares that belong to a window; later ones are leftovers of a kill."""
        return max((at.first + at.n for at in self.windows.values()), default=0)

    def add(self, window: Window | Corners, shares: ShareRange) -> None:
        """Log a window whose data were written."""
        row0, row1, col0, col1 = window
        self._append(f"{row0} {row1} {col0} {col1} {shares.first} {shares.n} .")
        self.windows[row0, row1, col0, col1] = shares

    def note_synced(self) -> None:
        """Log that the data of all windows so far were forced to disk."""
        self._append(_SYNCED)
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _append(self, line: str) -> None:
        left = f"\n{line}".encode("ascii")  # the leading newline parts it from a torn line before
        while left:
            left = left[os.write(self._handle, left) :]


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return [line for line in lines if line == _SYNCED or _is_window(line.split())]


def _is_window(words: list[str]) -> bool:
    return len(words) == 7 and words[-1] == "." and all(word.isdecimal() for word in words[:-1])
