"""Whole records read from and written to open files at their places, few calls for many records.

No memory maps: their pages count as memory of the process for as long as they are mapped.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_at", "read_records", "write_at", "write_records"]


def write_at(handle: int, array: NDArray[Any], offset: int) -> None:
    """Write the bytes of ``array`` at ``offset``, all of them."""
    left = _bytes_of(np.ascontiguousarray(array))
    while len(left):
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written


def read_at(handle: int, array: NDArray[Any], offset: int) -> None:
    """Fill the contiguous ``array`` with the bytes at ``offset``.

    Raises
    ------
    OSError
        When the file ends before.
    """
    left = _bytes_of(array)
    while len(left):
        n_read = os.preadv(handle, [left], offset)
        if n_read == 0:
            raise OSError("a file of ours is shorter than it was")
        left, offset = left[n_read:], offset + n_read


def write_records(handle: int, index: NDArray[np.intp], records: NDArray[Any], chosen: NDArray[np.intp]) -> None:
    """Write ``records[k]`` as record ``index[k]`` of the file for every chosen k; neighbours go in one call.

    ``index`` and ``chosen`` ascend. Nothing is copied that lies together.
    """
    size = _record_bytes(records)
    for first, last in _runs(index[chosen], chosen):
        k = int(chosen[first])
        write_at(handle, records[k : k + last - first], int(index[k]) * size)


def read_records(handle: int, index: NDArray[np.intp], out: NDArray[Any]) -> None:
    """Read record ``index[i]`` of the file into ``out[i]``; neighbours come in one call, whatever their order."""
    order = np.argsort(index, kind="stable")
    placed, size = index[order], _record_bytes(out)
    found = np.empty_like(out)
    for first, last in _runs(placed):
        read_at(handle, found[first:last], int(placed[first]) * size)
    out[order] = found


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _record_bytes(records: NDArray[Any]) -> int:
    return records.itemsize * int(np.prod(records.shape[1:], dtype=np.int64))


def _runs(*numbers: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Stretches in which all numbers are consecutive, as ranges of positions."""
    if not len(numbers[0]):
        return []
    breaks = np.flatnonzero(np.any([np.diff(each) != 1 for each in numbers], axis=0)) + 1
    return list(pairwise([0, *breaks.tolist(), len(numbers[0])]))
