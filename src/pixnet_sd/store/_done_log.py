"""An append-only log of finished blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._map_layout import Block

__all__ = ["DoneLog"]


class DoneLog:
    """One line a block: its corner and the bytes that it takes on disk.

    Nothing is forced to disk: that would make the network wait for it. After a crash of the machine, a logged block may
    therefore be missing in part: it counts as done only while its files have their size.

    Parameters
    ----------
    path
        Log file.
    stored_bytes
        Bytes that a block takes on disk now.
    """

    def __init__(self, path: Path, stored_bytes: Callable[[Block], int]) -> None:
        self._path, self._stored_bytes = path, stored_bytes
        self._bytes = _read(path)

    def __len__(self) -> int:
        return len(self._bytes)

    def broken(self) -> int:
        """How many blocks were logged and are not whole any more."""
        return sum(size != self._stored_bytes((row, row, col, col)) for (row, col), size in self._bytes.items())

    def holds(self, block: Block) -> bool:
        """Whether the block was logged and is still whole."""
        logged = self._bytes.get((block[0], block[2]))
        return logged is not None and logged == self._stored_bytes(block)

    def add(self, block: Block) -> None:
        """Log a block that was written."""
        size = self._stored_bytes(block)
        with self._path.open("a", encoding="ascii") as file:
            file.write(f"\n{block[0]} {block[2]} {size} .")  # the leading newline parts it from a torn line before
        self._bytes[block[0], block[2]] = size


def _read(path: Path) -> dict[tuple[int, int], int]:
    """Corner → bytes; a line that a kill cut short has no full stop and is skipped."""
    if not path.is_file():
        return {}
    fields = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    whole = (f for f in fields if len(f) == 4 and f[3] == "." and all(word.isdecimal() for word in f[:3]))
    return {(int(f[0]), int(f[1])): int(f[2]) for f in whole}
