"""Arrays of zarr, dask or numpy, read without taking missing files for values.

Zarr gives the fill value, mostly 0, for a chunk that has no file. That is right for black padding, which is left out
when an image is written, and wrong when the store was moved, or its disk unmounted, for a moment. What was there when
the array was opened tells the two apart: which chunks had a file, and which folder it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from dask.array import Array as DaskArray
from numpy.typing import NDArray
from zarr.storage import LocalStore

from pixnet_sd.errors import StoreError

_METADATA = ("zarr.json", ".zarray")
_PROBE = 16  # pixels between those that are looked at first
_FEW_CHUNKS = 4096  # that can be looked for at every read of an array that is computed from them

Box = tuple[slice, ...]  # slices of step 1 within an array, one for each axis


@dataclass(frozen=True, eq=False)
class ChunkGuard:
    """Folder and files of a stored array as they were when it was opened; pickles, whatever the array does."""

    folder: Path
    identity: tuple[int, int]  # device and inode of the folder
    has_file: NDArray[np.bool_]  # of every chunk, or shard; one axis for each of the array
    chunk: tuple[int, ...]  # shape of a chunk, or shard
    metadata: Any  # of the array, which knows the names of its files and its fill value

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> ChunkGuard | None:
        """List the files of an array; None where it is not in a local folder."""
        folder = stored_folder(array)
        if folder is None or not array.ndim:
            return None
        start = len(os.fspath(folder)) + 1
        identity = _identity(folder)  # before its files are listed
        names = {f"{path}/{name}"[start:] for path, _, files in os.walk(folder) for name in files}
        chunk = array.shards or array.chunks
        grid = tuple(-(-size // side) for size, side in zip(array.shape, chunk, strict=True))
        held = [array.metadata.encode_chunk_key(index) in names for index in np.ndindex(grid)]
        return cls(folder, identity, np.array(held, bool).reshape(grid), chunk, array.metadata)

    def read(self, array: Any, box: Box) -> NDArray[Any]:
        """Read ``array[box]``; `StoreError` where the folder, or a file that was there, is away."""
        for _ in range(2):
            try:
                values = np.asarray(array[box])
            except OSError as error:
                raise StoreError(f"{self.folder} cannot be read: {error.strerror or error}.") from error
            self.check(self._held(box))
            if not self._has_suspects(values, box):
                break  # else files may have been away while they were read, and are back now
        return values

    def check(self, held: Iterable[tuple[int, ...]]) -> None:
        """Raise unless the folder, and the files of chunks that it held, are there."""
        if _identity(self.folder) != self.identity:
            raise StoreError(_away(self.folder))
        for index in held:
            file = self.folder / self.metadata.encode_chunk_key(index)
            if not os.path.exists(file):
                raise StoreError(_away(file))

    def _held(self, box: Box) -> list[tuple[int, ...]]:
        """Chunks with a file that a box touches."""
        spans = [range(s.start // side, -(-s.stop // side)) for s, side in zip(box, self.chunk, strict=True)]
        return [index for index in product(*spans) if self.has_file[index]]

    def _has_suspects(self, values: NDArray[Any], box: Box) -> bool:
        """Whether a chunk that has a file, and so should differ from the fill value, does not."""
        fill = self.metadata.fill_value
        for index in self._held(box):
            corners = zip(index, self.chunk, box, strict=True)
            chunk = values[tuple(slice(max(k * side - s.start, 0), (k + 1) * side - s.start) for k, side, s in corners)]
            probe = chunk[(slice(None, None, _PROBE),) * chunk.ndim]  # nearly always enough
            if (probe == fill).all() and (chunk == fill).all():
                return True
        return False


def _stored_in(data: Any) -> tuple[list[zarr.Array[Any]], dict[str, Any]]:
    """Zarr arrays that data are or are computed from, and the layers of their graph, if they have one."""
    if isinstance(data, zarr.Array):
        return [data], {}
    graph = data.__dask_graph__() if hasattr(data, "__dask_graph__") else None
    layers: dict[str, Any] = dict(getattr(graph, "layers", {}))
    single = [value for layer in layers.values() if len(layer) == 1 for value in layer.values()]
    return [value for value in single if isinstance(value, zarr.Array)], layers


def stored_array(data: Any) -> zarr.Array[Any] | None:
    """The zarr array that data are or, by their own graph, are an unchanged view of; None for all but a plain read."""
    if isinstance(data, zarr.Array):
        return data
    stored, layers = _stored_in(data)
    # dask.array.from_zarr makes two layers: the array itself, and a getter per block
    if len(layers) != 2 or len(stored) != 1 or not data.name.startswith("from-zarr"):
        return None
    return stored[0] if stored[0].shape == data.shape and stored[0].dtype == data.dtype else None


def stored_folder(data: Any) -> Path | None:
    """The local folder of the `stored_array` of data; `dask.array.from_zarr` reaches one through fsspec."""
    array = stored_array(data)
    if array is None:
        return None
    store: Any = array.store
    if isinstance(store, LocalStore):
        return Path(store.root, array.path)
    fs = getattr(store, "fs", None)
    protocol = getattr(getattr(fs, "sync_fs", fs), "protocol", ())
    is_local = "file" in (protocol if isinstance(protocol, tuple) else (protocol,))
    return Path(store.path, array.path) if is_local else None


def loaded_px(data: Any) -> float:
    """How many pixels (height x width) have to be loaded to get one of (c, y, x) data, about; 0 for those in memory."""
    if isinstance(data, np.ndarray):
        return 0.0
    stored = stored_array(data)
    if stored is not None:
        return float(np.prod(stored.chunks[1:]))
    # Small chunks may be cut from one big block further down, as by the reader of Visium HD, so every layer counts,
    # but those of arrays, in memory or on disk, which can be sliced without loading them whole.
    n_blocks = [
        len(layer)
        for layer in _stored_in(data)[1].values()
        if not all(isinstance(value, np.ndarray | zarr.Array) for value in layer.values())
    ]
    return data.shape[1] * data.shape[2] / min(n_blocks) if n_blocks else 0.0


def computed(data: Any, scheduler: str = "threads") -> NDArray[Any]:
    """Values in memory, never by a distributed client that is open by chance."""
    return np.asarray(data.compute(scheduler=scheduler) if isinstance(data, DaskArray) else data)


class GuardedArray:
    """An array read by slices of step 1, also from threads; `StoreError` where files went away since it was opened.

    Reads go straight to zarr where a lazy array is an unchanged view of a stored one; so it pickles without values.
    """

    scheduler = "threads"

    def __init__(self, data: Any) -> None:
        stored = stored_array(data)
        self.data: Any = data if stored is None else stored
        self.shape: tuple[int, ...] = tuple(map(int, data.shape))
        self.dtype: np.dtype[Any] = np.dtype(data.dtype)
        self.is_stored = isinstance(self.data, zarr.Array)  # so that reads go straight to zarr
        self.guards = tuple(filter(None, map(ChunkGuard.of, _stored_in(data)[0])))
        self.guard = self.guards[0] if self.is_stored and self.guards else None

    def __getitem__(self, key: slice | tuple[slice, ...]) -> NDArray[Any]:
        slices = key if isinstance(key, tuple) else (key,)
        slices += (slice(None),) * (len(self.shape) - len(slices))
        spans = [axis.indices(size)[:2] for axis, size in zip(slices, self.shape, strict=True)]
        box = tuple(slice(start, max(start, stop)) for start, stop in spans)
        if self.guard is not None:
            return self.guard.read(self.data, box)
        values = computed(self.data[box], self.scheduler)
        for guard in self.guards:  # of what the values were just computed from
            guard.check(map(tuple, np.argwhere(guard.has_file).tolist()) if guard.has_file.sum() <= _FEW_CHUNKS else ())
        return values


def _identity(folder: Path) -> tuple[int, int]:
    try:
        if any((folder / name).exists() for name in _METADATA):
            about = folder.stat()
            return about.st_dev, about.st_ino
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
