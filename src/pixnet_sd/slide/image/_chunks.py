"""Reading a stored array without taking missing files for pixels.

Zarr gives the fill value, mostly 0, for a chunk that has no file. That is right for black padding, which is left out
when an image is written, and wrong when the store was moved, or its disk unmounted, for a moment: then all chunks are
0. The two are told apart by what was there at the start: which chunks had a file, and which folder it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from pixnet_sd.errors import StoreError

__all__ = ["ChunkGuard", "StoredRows", "check_sources", "guards_of"]

_METADATA = ("zarr.json", ".zarray")
_PROBE = 16  # pixels between those that are looked at first
_FEW_CHUNKS = 4096  # that can be looked for at every read of an array that is computed from them


@dataclass(frozen=True, eq=False)
class ChunkGuard:
    """What was there of a stored array when it was opened; it pickles, whatever the array does.

    Attributes
    ----------
    folder
        Of the array, as Zarr has it.
    identity
        Device and inode of the folder.
    has_file
        Which chunks, or shards, have a file; one axis for each of the array.
    chunk
        Shape of a chunk, or shard.
    separator, prefix
        How names of chunks are put together.
    fill
        Value of chunks that have no file.
    """

    folder: Path
    identity: tuple[int, int]
    has_file: NDArray[np.bool_]
    chunk: tuple[int, ...]
    separator: str
    prefix: str
    fill: Any

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> ChunkGuard | None:
        """Look at an array; None where it is not in a local folder.

        Raises
        ------
        StoreError
            When the folder is not there.
        """
        root = _local_root(array.store)
        if root is None or not array.ndim:
            return None
        folder = Path(root, *array.path.split("/"))
        chunk = array.shards or array.chunks
        origin = array.metadata.encode_chunk_key((0,) * array.ndim)
        prefix = origin[: len(origin) - 2 * array.ndim + 1]
        separator = origin[len(prefix) + 1] if array.ndim > 1 else "/"
        grid = tuple(-(-size // side) for size, side in zip(array.shape, chunk, strict=True))
        identity = _identity(folder)
        has_file = np.zeros(grid, bool)
        for index in _chunk_files(folder, prefix, separator):
            if len(index) == array.ndim and all(k < n for k, n in zip(index, grid, strict=True)):
                has_file[index] = True
        return cls(folder, identity, has_file, chunk, separator, prefix, array.fill_value)

    def read(self, array: Any, key: tuple[slice, ...]) -> NDArray[Any]:
        """``array[key]``, every chunk of which that had a file still has it.

        Parameters
        ----------
        array
            The array that was looked at.
        key
            Slices of step 1 within the array, one for each axis.

        Raises
        ------
        StoreError
            When the folder or a file is away.
        """
        values = self._values(array, key)
        if self._has_suspects(values, key):  # files that were away while they were read, and are back now
            values = self._values(array, key)
        return values

    def _values(self, array: Any, key: tuple[slice, ...]) -> NDArray[Any]:
        try:
            values = np.asarray(array[key])
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be read: {error.strerror or error}.") from error
        self.check(key)
        return values

    def check(self, key: tuple[slice, ...] | None = None) -> None:
        """Raise unless the folder, and what it held of a box or of all, is there.

        Raises
        ------
        StoreError
            Naming what is away.
        """
        if _identity(self.folder) != self.identity:
            raise StoreError(_away(self.folder))
        for index in self._held(key):
            if not os.path.exists(self._file(index)):
                raise StoreError(_away(self._file(index)))

    @property
    def n_files(self) -> int:
        """Chunks that have a file."""
        return int(np.count_nonzero(self.has_file))

    def _file(self, index: tuple[int, ...]) -> Path:
        return self.folder / f"{self.prefix}{self.separator.join(map(str, index))}"

    def _held(self, key: tuple[slice, ...] | None) -> Iterator[tuple[int, ...]]:
        """Chunks with a file that a box touches."""
        if key is None:
            yield from map(tuple, np.argwhere(self.has_file).tolist())
            return
        spans = [range(s.start // side, -(-s.stop // side)) for s, side in zip(key, self.chunk, strict=True)]
        yield from (index for index in product(*spans) if self.has_file[index])

    def _has_suspects(self, values: NDArray[Any], key: tuple[slice, ...]) -> bool:
        """Whether a chunk that has a file, and so should differ from the fill value, does not."""
        for index in self._held(key):
            part = tuple(
                slice(max(k * side - s.start, 0), (k + 1) * side - s.start)
                for k, side, s in zip(index, self.chunk, key, strict=True)
            )
            chunk = values[part]
            some = chunk[(slice(None, None, _PROBE),) * chunk.ndim]  # nearly always enough
            if (some == self.fill).all() and (chunk == self.fill).all():
                return True
        return False


def check_sources(guards: tuple[ChunkGuard, ...]) -> None:
    """Raise unless what a lazy array was just computed from is still there.

    Raises
    ------
    StoreError
        When a folder is away, or, where there are not too many of them, a file.
    """
    for guard in guards:
        guard.check(None if guard.n_files <= _FEW_CHUNKS else (slice(0, 0),) * guard.has_file.ndim)


class StoredRows:
    """A stored array whose rows are read with `ChunkGuard`, as far as it is in a local folder."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array, self._guard = array, ChunkGuard.of(array)
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        if self._guard is None:
            return np.asarray(self._array[rows])
        start, stop, _ = rows.indices(self.shape[0])
        rest = tuple(slice(0, size) for size in self.shape[1:])
        return self._guard.read(self._array, (slice(start, max(start, stop)), *rest))


def guards_of(data: Any) -> tuple[ChunkGuard, ...]:
    """Guards of the stored arrays that a lazy array is computed from.

    Raises
    ------
    StoreError
        When one of them is away.
    """
    graph = data.__dask_graph__() if hasattr(data, "__dask_graph__") else None
    layers = getattr(graph, "layers", {})
    stored = [value for layer in layers.values() if len(layer) == 1 for value in layer.values()]
    found = [ChunkGuard.of(value) for value in stored if isinstance(value, zarr.Array)]
    return tuple(guard for guard in found if guard is not None)


def _local_root(store: Any) -> str | Path | None:
    """Local folder of a Zarr store; `dask.array.from_zarr` reaches one through fsspec."""
    if isinstance(store, LocalStore):
        return store.root
    fs = getattr(store, "fs", None)
    protocol = getattr(getattr(fs, "sync_fs", fs), "protocol", ())
    return str(store.path) if "file" in (protocol if isinstance(protocol, tuple) else (protocol,)) else None


def _identity(folder: Path) -> tuple[int, int]:
    try:
        if any((folder / name).exists() for name in _METADATA):
            found = folder.stat()
            return found.st_dev, found.st_ino
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"{_away(folder)} ({error.strerror or error})") from error
    raise StoreError(_away(folder))


def _away(path: Path) -> str:
    return (
        f"{path} is not there any more, though the store had it when it was opened: was the store moved, deleted or "
        "unmounted, or is the network drive away? Nothing was read in its place. Bring it back, or open the store "
        "where it is now, and make the same call."
    )


def _chunk_files(folder: Path, prefix: str, separator: str) -> Iterator[tuple[int, ...]]:
    """Indices of the files of chunks in the folder of an array."""
    root = folder / prefix.rstrip("/") if prefix.endswith("/") else folder
    named = "" if prefix.endswith("/") else prefix
    waiting: list[tuple[str, tuple[int, ...]]] = [(os.fspath(root), ())]
    while waiting:
        path, before = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            continue
        for entry in entries:
            words = entry.name.removeprefix(named).split(separator)
            if not all(word.isdecimal() for word in words):
                continue
            index = (*before, *map(int, words))
            if entry.is_dir():
                waiting.append((entry.path, index))
            else:
                yield index
