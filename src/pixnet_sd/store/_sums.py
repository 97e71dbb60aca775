"""Sums over any number of regions, put window by window of the map and read back by range of regions.

A region that lies in several windows is put in shares, which are added in the order of the windows, in double
precision: so the result is the same to the last bit, in whatever order, or in how many runs, the windows came.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import RegionShare, Window

from ._disk import Partial, available_memory, explain_disk_errors, open_regular, size_text


class RegionSums(ABC):
    """Sums of ``n_columns`` values over each of ``n_rows`` regions."""

    stored_bytes = 0  # on disk by now

    def __init__(self, n_rows: int, n_columns: int) -> None:
        self.n_rows, self.n_columns = n_rows, n_columns

    def put(self, share: RegionShare) -> None:
        """Take a window's share; nothing happens for a window that is done. A DataError tells of NaN and misfits."""
        window, index, sums, weight, complete = share
        if self.is_done(window):
            return
        fits = sums.shape == (len(index), self.n_columns) and len(weight) == len(complete) == len(index)
        if not fits or (len(index) and not 0 <= index[0] <= index[-1] < self.n_rows):
            raise DataError(
                f"The shares of window {tuple(window)}, sums of shape {sums.shape} for {len(index)} regions, do not "
                f"fit {self.n_rows} regions of {self.n_columns} columns."
            )
        if sums.size and not (np.isfinite(sums.min()) and np.isfinite(sums.max())):
            raise DataError(
                f"The prediction of regions in window {tuple(window)} is not finite (NaN or infinity): the model is "
                "broken."
            )
        self._add(share)

    @abstractmethod
    def _add(self, share: RegionShare) -> None: ...

    @abstractmethod
    def is_done(self, window: Window) -> bool:
        """Whether the window was put, by this run or by the one that it takes up."""

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Read sums (m, columns) and weights (m,) of the regions ``start`` … ``stop − 1``; without a weight, NaN."""
        sums, weight = self._rows(start, stop)
        sums[weight == 0] = np.nan
        return sums, weight

    @abstractmethod
    def _rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]: ...


class MemorySums(RegionSums):
    """Sums in memory, for objects that are not backed, and a table of ``n_values`` for each region.

    A StoreError tells that the two would take more than half of the free memory.
    """

    def __init__(self, n_rows: int, n_columns: int, n_values: int) -> None:
        super().__init__(n_rows, n_columns)
        needed, available = n_rows * (4 * (n_columns + n_values) + 16), available_memory()
        if needed > available / 2:
            raise StoreError(
                f"The table of {n_rows} regions and {n_values} values takes {size_text(needed)} while it is made, "
                f"more than half of the {size_text(available)} of memory that are free. Write the object to disk "
                "first: `sdata.write('/some/folder.zarr')`; the table is then streamed into that store."
            )
        self._sums, self._weight = np.zeros((n_rows, n_columns), np.float32), np.zeros(n_rows)
        self._shared: dict[Window, tuple[NDArray[Any], ...]] = {}  # of regions in several windows

    def _add(self, share: RegionShare) -> None:
        whole = share.complete
        self._sums[share.index[whole]], self._weight[share.index[whole]] = share.sums[whole], share.weight[whole]
        self._shared[share.window] = share.index[~whole], share.sums[~whole], share.weight[~whole]

    def is_done(self, window: Window) -> bool:
        return window in self._shared

    def _rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        self._add_shared()
        return self._sums[start:stop], self._weight[start:stop]

    def _add_shared(self) -> None:
        shares = [self._shared[window] for window in sorted(self._shared)]
        rows = np.unique(np.concatenate([np.empty(0, np.intp), *(index for index, _, _ in shares)]))
        sums, weights = np.zeros((len(rows), self.n_columns)), np.zeros(len(rows))
        for index, share, weight in shares:
            at = np.searchsorted(rows, index)
            sums[at] += share
            weights[at] += weight
        self._sums[rows], self._weight[rows] = sums, weights


PIECE_BYTES = 8 * 2**20  # of shares that are looked at together
_FILE = "sums.bin"
_READING, _WRITING = "Reading the predicted regions", "Writing the predicted regions"
_MARK = b"PSUM"
_HEAD = struct.Struct("<4s5q")  # mark, window, number of regions; then CRC-32 of this and of what follows
_CRC_BYTES = 4
_LOW_32 = np.uint64(2**32 - 1)


class FileSums(RegionSums):
    """Sums in a folder beside the store, taken up where a killed run with the same identity (JSON) left them.

    One file, to which each window's share is appended with a checksum. What a resumed run finds is believed up to the
    first window whose checksum is wrong: so nothing is ever forced to disk, and neither a kill nor a crash of the
    machine costs more than the windows that had not arrived there. Memory holds 8 bytes per share and per region.
    """

    def __init__(self, folder: Path, n_rows: int, n_columns: int, identity: dict[str, Any]) -> None:
        super().__init__(n_rows, n_columns)
        if n_rows >= 2**32:
            raise StoreError(f"{n_rows} regions are more than a table can take; predict a part of them at a time.")
        self.folder = folder
        # number of a window's regions, and where the file has their indices (8 bytes each), weights (8) and sums
        self._windows: dict[Window, tuple[int, int]] = {}
        self._order: NDArray[np.uint64] | None = None
        self._handle = -1
        self._partial = Partial(folder, {**identity, "n_rows": n_rows, "n_columns": n_columns})
        with explain_disk_errors(_WRITING, folder):
            self.resumed = self._is_there()
            if not self.resumed:
                with self._partial.made(_WRITING):
                    (folder / _FILE).touch()
            self._handle = open_regular(folder / _FILE, os.O_RDWR)
            self._find_windows()

    @property
    def n_done(self) -> int:
        """Windows that were put."""
        return len(self._windows)

    def _add(self, share: RegionShare) -> None:
        head = _HEAD.pack(_MARK, *share.window, len(share.index))
        arrays = ((share.index, "<i8"), (share.weight, "<f8"), (share.sums, "<f4"))
        contents = [memoryview(head), *(_bytes_of(np.asarray(array, dtype)) for array, dtype in arrays)]
        crc = 0
        for content in contents:
            crc = zlib.crc32(content, crc)
        contents.insert(1, memoryview(crc.to_bytes(_CRC_BYTES, "little")))
        with self._partial.used(_WRITING):
            end = self.stored_bytes
            for content in contents:
                end = _write_at(self._handle, content, end)
        self._windows[share.window] = self.stored_bytes + _HEAD.size + _CRC_BYTES, len(share.index)
        self.stored_bytes, self._order = end, None

    def is_done(self, window: Window) -> bool:
        return window in self._windows

    def _rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        with self._partial.used(_READING):
            order = self._sort_shares()
            first, last = np.searchsorted(order, np.array([start, stop], np.uint64) << np.uint64(32))
            row = (order[first:last] >> np.uint64(32)).astype(np.intp) - start
            offset = self._offsets((order[first:last] & _LOW_32).astype(np.intp))
            sums = np.zeros((stop - start, self.n_columns), "<f4")
            alone = np.bincount(row, minlength=stop - start)[row] == 1
            self._read_sums(offset[alone], sums, row[alone])
            self._add_shared(offset[~alone], sums, row[~alone])
        return sums, self._weight[start:stop]

    def close(self) -> None:
        """Close the file; the sums stay for the next run."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def discard(self) -> None:
        """Delete the sums."""
        self.close()
        with contextlib.suppress(OSError):
            self._partial.delete()

    def _is_there(self) -> bool:
        """Whether sums of a run with this identity are there; a second name of the file may be one of the user's."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / _FILE).lstat().st_nlink == 1 and self._partial.is_there()
        return False

    def _find_windows(self) -> None:
        """Look up the windows of an earlier run, and cut off what follows the last whole one."""
        size = os.fstat(self._handle).st_size
        while self.stored_bytes + _HEAD.size + _CRC_BYTES <= size:
            head = np.empty(_HEAD.size + _CRC_BYTES, np.uint8)
            _read_at(self._handle, head, self.stored_bytes)
            mark, *window, n = _HEAD.unpack(head[: _HEAD.size].tobytes())
            offset = self.stored_bytes + len(head)
            end = offset + n * (16 + 4 * self.n_columns)
            if mark != _MARK or not 0 <= n <= self.n_rows or end > size or not self._is_whole(head, offset, n, end):
                break
            self._windows[Window(*window)] = offset, n
            self.stored_bytes = end
        os.ftruncate(self._handle, self.stored_bytes)

    def _is_whole(self, head: NDArray[np.uint8], offset: int, n: int, end: int) -> bool:
        """Whether a window's checksum is right, and its regions are possible ones."""
        crc = zlib.crc32(_bytes_of(head[: _HEAD.size]))
        for start in range(offset, end, PIECE_BYTES):
            crc = zlib.crc32(_bytes_of(self._read(start, min(PIECE_BYTES, end - start), "u1")), crc)
        index = self._read(offset, n, "<i8")
        in_range = not n or bool(index[0] >= 0 and index[-1] < self.n_rows and (np.diff(index) > 0).all())
        return crc == int.from_bytes(head[_HEAD.size :].tobytes(), "little") and in_range

    def _read(self, offset: int, n: int, dtype: str) -> NDArray[Any]:
        array = np.empty(n, dtype)
        _read_at(self._handle, array, offset)
        return array

    def _sort_shares(self) -> NDArray[np.uint64]:
        """Sort all shares as ``row << 32 | place`` and add up weights; places count shares in the windows' order."""
        if self._order is None:
            windows = [self._windows[window] for window in sorted(self._windows)]
            self._blocks = np.array(windows, np.int64).reshape(-1, 2)
            self._begin = np.cumsum(self._blocks[:, 1]) - self._blocks[:, 1]
            order = np.empty(self._blocks[:, 1].sum(), np.uint64)
            self._weight = np.zeros(self.n_rows)
            for begin, (offset, n) in zip(self._begin.tolist(), self._blocks.tolist(), strict=True):
                index = self._read(offset, n, "<i8")
                self._weight[index] += self._read(offset + 8 * n, n, "<f8")
                order[begin : begin + n] = index.astype(np.uint64) << np.uint64(32)
                order[begin : begin + n] |= np.arange(begin, begin + n, dtype=np.uint64)
            order.sort()
            self._order = order
        return self._order

    def _offsets(self, place: NDArray[np.intp]) -> NDArray[np.int64]:
        """Find where in the file the sums of shares are."""
        # windows without shares begin where the next one does: the last that begins there is meant
        window = np.searchsorted(self._begin, place, side="right") - 1
        offset, n = self._blocks[window].T
        return np.asarray(offset + 16 * n + 4 * self.n_columns * (place - self._begin[window]))

    def _read_sums(self, offset: NDArray[np.int64], out: NDArray[np.float32], row: NDArray[np.intp]) -> None:
        """Read the sums at offsets into rows of ``out``; what lies together in both comes in one call."""
        ascending = np.argsort(offset, kind="stable")
        offset, row = offset[ascending], row[ascending]
        breaks = np.flatnonzero((np.diff(offset) != 4 * self.n_columns) | (np.diff(row) != 1)) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(offset)]):
            if last > first:
                _read_at(self._handle, out[row[first] : row[first] + last - first], int(offset[first]))

    def _add_shared(self, offset: NDArray[np.int64], sums: NDArray[np.float32], row: NDArray[np.intp]) -> None:
        """Add up the shares of regions in several windows; ``row`` ascends."""
        rows, place = np.unique(row, return_inverse=True)
        total = np.zeros((len(rows), self.n_columns))
        step = max(1, PIECE_BYTES // (4 * self.n_columns))
        for piece in (slice(k, k + step) for k in range(0, len(row), step)):
            ascending = np.argsort(offset[piece], kind="stable")
            share = np.empty((len(ascending), self.n_columns), "<f4")
            self._read_sums(offset[piece][ascending], share, np.arange(len(share)))
            share = share[np.argsort(ascending)]
            first = np.flatnonzero(np.diff(place[piece], prepend=-1))
            count = np.diff(first, append=len(share))
            for k in range(int(count.max(initial=0))):  # the k-th share of each
                again = first[count > k] + k
                total[place[piece][again]] += share[again]
        sums[rows] = total


def _write_at(handle: int, content: memoryview, offset: int) -> int:
    """Write all bytes at an offset; where they end."""
    while len(content):
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written
    return offset


def _read_at(handle: int, array: NDArray[Any], offset: int) -> None:
    """Fill a contiguous array with the bytes at an offset."""
    left = _bytes_of(array)
    while len(left):
        n_read = os.preadv(handle, [left], offset)
        if n_read == 0:
            raise OSError("a file of ours is shorter than it was")
        left, offset = left[n_read:], offset + n_read


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
