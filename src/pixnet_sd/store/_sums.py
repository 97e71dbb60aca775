"""Whole records read from and written to open files at their places, few calls for many records.

No memory maps: their pages count as memory of the process for as long as they are mapped.

An append-only log of the windows of the map whose regions are on disk.

Sums over regions, gathered window by window of the map: the part that needs no disk.

A region that lies in one window is put once, whole. One that lies in several is put in shares, and its sum is taken in
the order of the windows, in double precision: so it does not matter in which order, or in how many runs, they came.

Sums over any number of regions, on disk beside the store while they are being gathered.

Four flat files and a log. Whole regions go to their places in ``sums.f32`` and ``weights.f64``, shares of regions that
lie in several windows are appended to ``shares.f32`` and ``shares.idx``, and last the window goes into ``done.log``: a
kill between any two of these leaves a window that counts as not done, and is put again over what was there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError, StoreError

from ._disk import (
    available_memory,
    check_same_folder,
    delete_folder,
    explain_disk_errors,
    folder_id,
    open_regular,
    read_json,
    size_text,
    write_json,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pixnet_sd.geometry import RegionShare, Window

__all__ = [
    "Corners",
    "Describe",
    "Express",
    "Expressed",
    "MemoryRows",
    "RowFile",
    "RowInfo",
    "Rows",
    "ShareRange",
    "WindowLog",
    "add_in_order",
    "check_put",
    "expression",
    "read_at",
    "read_records",
    "write_at",
    "write_records",
]


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


@dataclass(frozen=True)
class RowInfo:
    """What a table and a shapes element say about some regions, apart from their expression.

    Attributes
    ----------
    ids
        (m,) integers or text.
    centres_px
        (m, 2) x, y in image scale-0 pixels.
    obs
        Column name → (m,) numbers.
    """

    ids: Any
    centres_px: NDArray[np.float64]
    obs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def subset(self, keep: NDArray[np.bool_]) -> RowInfo:
        """The regions where ``keep`` (m,) is true."""
        obs = {name: np.asarray(column)[keep] for name, column in self.obs.items()}
        return RowInfo(np.asarray(self.ids)[keep], self.centres_px[keep], obs)

    @staticmethod
    def joined(parts: Sequence[RowInfo]) -> RowInfo:
        """Several groups of regions as one."""
        if len(parts) == 1:
            return parts[0]
        obs = {name: np.concatenate([np.asarray(part.obs[name]) for part in parts]) for name in parts[0].obs}
        ids = np.concatenate([np.asarray(part.ids) for part in parts])
        return RowInfo(ids, np.concatenate([part.centres_px for part in parts]), obs)


Describe = Callable[[int, int, "NDArray[np.float64] | None"], RowInfo]
"""``describe(start, stop, weight)``: the regions ``start`` … ``stop − 1``, and their weights where these are known."""


class Expressed(NamedTuple):
    """What a table says of some regions.

    Attributes
    ----------
    x
        (m, genes) values.
    layers
        Name → (m, genes) other values.
    obs
        Name → (m,) other columns.
    """

    x: NDArray[np.float32]
    layers: Mapping[str, NDArray[np.float32]] = {}
    obs: Mapping[str, NDArray[Any]] = {}

    @staticmethod
    def joined(parts: Sequence[Expressed]) -> Expressed:
        """Several groups of regions as one."""
        if len(parts) == 1:
            return parts[0]
        layers, obs = (
            {name: np.concatenate([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}
            for kind in ("layers", "obs")
        )
        return Expressed(np.concatenate([part.x for part in parts]), layers, obs)


Express = Callable[["NDArray[np.float32]", "NDArray[np.float64]"], Expressed]
"""``express(sums, weight)``: values of a table from the sums (m, columns) and weights (m,) of regions that have weight;
may write over the sums."""


class Rows(Protocol):
    """Sums over regions, put in shares and read back whole."""

    n_rows: int
    n_columns: int

    def put(self, share: RegionShare) -> None:
        """Take a window's share of the regions that it touches; nothing happens for a window that is done."""

    def is_done(self, window: Window) -> bool:
        """Whether the window was put."""

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Sums (m, columns) and weights (m,) of the regions ``start`` … ``stop − 1``; zero where nothing was put."""

    def keep(self) -> NDArray[np.bool_]:
        """(n,) which regions have any weight: the others hold no pixel of the slide."""


class MemoryRows:
    """Rows in memory, for objects that are not backed.

    Parameters
    ----------
    n_rows, n_columns
        Regions, and what is summed up of each.
    n_values
        Values of the table to be made of them, per region.

    Raises
    ------
    StoreError
        When they would take more than half of the free memory.
    """

    def __init__(self, n_rows: int, n_columns: int, n_values: int) -> None:
        needed, available = n_rows * (4 * (n_columns + n_values) + 16), available_memory()
        if needed > available / 2:
            raise StoreError(
                f"The table of {n_rows} regions and {n_values} values takes {size_text(needed)} while it is made, "
                f"more than half of the {size_text(available)} of memory that are free. Write the object to disk "
                "first: `sdata.write('/some/folder.zarr')`; the table is then streamed into that store."
            )
        self.n_rows, self.n_columns = n_rows, n_columns
        self._sums = np.zeros((n_rows, n_columns), np.float32)
        self._weight = np.zeros(n_rows)
        self._done: set[Corners] = set()
        self._shares: dict[Corners, tuple[NDArray[Any], ...]] = {}
        self._settled = True

    def put(self, share: RegionShare) -> None:
        """As `Rows.put`."""
        window, index, sums, weight, complete = share
        if self.is_done(window):
            return
        check_put(self, share)
        self._sums[index[complete]], self._weight[index[complete]] = sums[complete], weight[complete]
        self._shares[_corners(window)] = tuple(part[~complete] for part in (index, sums, weight))
        self._done.add(_corners(window))
        self._settled = False

    def is_done(self, window: Window) -> bool:
        """As `Rows.is_done`."""
        return _corners(window) in self._done

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """As `Rows.rows`; views."""
        self._settle()
        return self._sums[start:stop], self._weight[start:stop]

    def keep(self) -> NDArray[np.bool_]:
        """As `Rows.keep`."""
        self._settle()
        return self._weight > 0

    def _settle(self) -> None:
        """Add up the shares, in the order of the windows."""
        if self._settled:
            return
        parts = [self._shares[window] for window in sorted(self._shares)]
        found = np.unique(np.concatenate([index for index, _, _ in parts]))
        sums, weights = np.zeros((len(found), self.n_columns)), np.zeros(len(found))
        for index, share, weight in parts:
            at = np.searchsorted(found, index)
            sums[at] += share
            weights[at] += weight
        self._sums[found], self._weight[found] = sums, weights
        self._settled = True


def _corners(window: Window) -> Corners:
    row0, row1, col0, col1 = window
    return row0, row1, col0, col1


def check_put(rows: Rows, share: RegionShare) -> None:
    """Refuse shares that do not fit the rows, or that are not finite.

    Raises
    ------
    DataError
        Saying which window.
    """
    window, index, sums, weight, complete = share
    where = f"window {tuple(window)}"
    fits = sums.shape == (len(index), rows.n_columns) and len(weight) == len(complete) == len(index)
    if not fits or (len(index) and not 0 <= index[0] <= index[-1] < rows.n_rows):
        raise DataError(
            f"The shares of {where}, sums of shape {sums.shape} for {len(index)} regions, do not fit "
            f"{rows.n_rows} regions of {rows.n_columns} columns."
        )
    if sums.size and not (np.isfinite(sums.min()) and np.isfinite(sums.max())):
        raise DataError(f"The prediction of regions in {where} is not finite (NaN or infinity): the model is broken.")


def add_in_order(total: NDArray[np.float64], row: NDArray[np.intp], shares: NDArray[Any]) -> None:
    """``total[row] += shares``, one after the other where a row comes again; ``row`` ascends."""
    first = np.flatnonzero(np.diff(row, prepend=-1))
    count = np.diff(first, append=len(row))
    for k in range(int(count.max(initial=0))):
        again = first[count > k] + k
        total[row[again]] += shares[again]


def expression(
    sums: NDArray[np.float32], weight: NDArray[np.float64], aggregation: Literal["mean", "sum"]
) -> Expressed:
    """Values of a table from the sums of genes over regions that have weight, (m, genes)."""
    if aggregation == "sum":
        return Expressed(sums)
    weight = weight.astype(np.float32)  # single precision, as the sums: four times as fast
    return Expressed(np.divide(sums, weight[:, None], out=sums if sums.flags.owndata else None))


SYNC_S = 600.0
"""How often what was written is forced to disk, seconds: what a crash of the machine costs at most."""

PIECE_BYTES = 8 * 2**20
"""Bytes of shares, or of weights, that are looked at together."""

_FILES = ("sums.f32", "weights.f64", "shares.f32", "shares.idx")
_SHARE = np.dtype([("row", "<i8"), ("weight", "<f8")])


class RowFile:
    """Rows on disk, taken up where a killed run left them; see `Rows`.

    Memory holds one number per share of a region, nothing per region.

    Parameters
    ----------
    folder
        Own folder of this table inside the work folder; rows in it are taken up when they were made for the same
        ``identity``, and deleted when not.
    n_rows, n_columns
        Regions, and what is summed up of each.
    identity
        Everything that makes two runs the same, as JSON.

    Attributes
    ----------
    resumed
        Whether rows were taken up.

    Raises
    ------
    StoreError
        When the folder cannot be written; so do the methods.
    """

    def __init__(self, folder: Path, n_rows: int, n_columns: int, identity: dict[str, Any]) -> None:
        if n_rows >= 2**32:
            raise StoreError(f"{n_rows} regions are more than a table can take; predict a part of them at a time.")
        self.folder, self.n_rows, self.n_columns = folder, n_rows, n_columns
        self._order: NDArray[np.uint64] | None = None
        self._handles: list[int] = []
        with self._explained():
            made_for, boot = {**identity, "n_rows": n_rows, "n_columns": n_columns}, _boot_id()
            found = _partial(folder)
            self.resumed = found.get("identity") == made_for and self._whole()
            if not self.resumed:
                self._start()
            self._home = folder_id(folder)
            self._handles = [open_regular(folder / name, os.O_RDWR) for name in _FILES]
            same_boot = bool(boot) and found.get("boot") == boot
            self._log = WindowLog(folder / "done.log", believe_all=self.resumed and same_boot)
            # last, because from here on the rows may be taken up, and lines of the log be believed
            self._note({"identity": made_for, "boot": boot})
        self._next_share = self._log.n_shares
        self._synced_at = time.monotonic()

    def _note(self, partial: dict[str, Any]) -> None:
        try:
            write_json(self.folder / "partial.json", partial, scratch=self.folder)
        except BaseException:
            if not self.resumed:
                self.discard()
            raise

    @property
    def n_done(self) -> int:
        """Windows that were put."""
        return len(self._log.windows)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the rows take on disk by now."""
        return sum(os.fstat(handle).st_blocks * 512 for handle in self._handles)

    def put(self, share: RegionShare) -> None:
        """As `Rows.put`."""
        window, index, sums, weight, complete = share
        if self.is_done(window):
            return
        check_put(self, share)
        weight = weight.astype("<f8", copy=False)
        with self._explained():
            check_same_folder(self.folder, self._home)
            chosen = np.flatnonzero(complete)
            for handle, values in zip(self._handles, (sums.astype("<f4", copy=False), weight), strict=False):
                write_records(handle, index, values, chosen)
            shares = self._append_shares(index[~complete], sums[~complete], weight[~complete])
            self._log.add(window, shares)
            self._next_share, self._order = shares.first + shares.n, None
            if time.monotonic() - self._synced_at > SYNC_S:
                self.sync()

    def is_done(self, window: Window) -> bool:
        """As `Rows.is_done`."""
        return window in self._log

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """As `Rows.rows`."""
        sums, weight = np.empty((stop - start, self.n_columns), "<f4"), np.empty(stop - start, "<f8")
        with self._explained("Reading"):
            read_at(self._handles[0], sums, start * self.n_columns * 4)
            read_at(self._handles[1], weight, start * 8)
            self._add_shares(start, stop, sums, weight)
        return sums, weight

    def keep(self) -> NDArray[np.bool_]:
        """As `Rows.keep`."""
        found = np.zeros(self.n_rows, bool)
        step = PIECE_BYTES // 8
        with self._explained("Reading"):
            check_same_folder(self.folder, self._home)
            for start in range(0, self.n_rows, step):
                weight = np.empty(min(step, self.n_rows - start), "<f8")
                read_at(self._handles[1], weight, start * 8)
                found[start : start + step] = weight > 0
            for at in self._log.windows.values():
                for share in self._share_index(at):
                    found[share["row"][share["weight"] > 0]] = True
        return found

    def sync(self) -> None:
        """Force what was written to disk, so that it outlives a crash of the machine."""
        with self._explained():
            for handle in self._handles:
                os.fsync(handle)
            self._log.note_synced()
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Close the files; unless they were put away meanwhile, the rows stay for the next run."""
        if self._handles and (self.folder / "partial.json").is_file():
            with contextlib.suppress(StoreError):  # a full disk: what was written may still be read by the next run
                self.sync()
        self._release()

    def discard(self) -> None:
        """Delete the rows."""
        self._release()
        with contextlib.suppress(OSError):
            delete_folder(self.folder)

    def _release(self) -> None:
        for handle in self._handles:
            os.close(handle)
        if self._handles:
            self._log.close()
        self._handles = []

    def _explained(self, doing: str = "Writing") -> AbstractContextManager[None]:
        return explain_disk_errors(f"{doing} the predicted regions", self.folder)

    def _sizes(self) -> list[int]:
        return [self.n_rows * self.n_columns * 4, self.n_rows * 8]

    def _whole(self) -> bool:
        """Whether the files of a partial table are there."""
        try:
            found = [(self.folder / name).lstat() for name in _FILES]
        except FileNotFoundError:
            return False
        # a second name of a file may be a file of the user's
        return [each.st_size for each in found[:2]] == self._sizes() and all(each.st_nlink == 1 for each in found)

    def _start(self) -> None:
        """Empty rows in place of what is there; on failure nothing remains."""
        if self.folder.exists():
            logger.info("The partial table in %s was made with other settings and is deleted.", self.folder)
        delete_folder(self.folder)
        try:
            self._create()
        except BaseException:
            self.discard()
            raise

    def _create(self) -> None:
        """Files of the full size that take no room yet."""
        self.folder.mkdir()
        for name, size in zip(_FILES, (*self._sizes(), 0, 0), strict=True):
            with (self.folder / name).open("wb") as file:
                file.truncate(size)

    def _append_shares(
        self, index: NDArray[np.intp], sums: NDArray[np.float32], weight: NDArray[np.float64]
    ) -> ShareRange:
        first = self._next_share
        about = np.empty(len(index), _SHARE)
        about["row"], about["weight"] = index, weight
        write_at(self._handles[2], sums.astype("<f4", copy=False), first * self.n_columns * 4)
        write_at(self._handles[3], about, first * _SHARE.itemsize)
        return ShareRange(first, len(index))

    def _share_index(self, at: ShareRange) -> list[NDArray[Any]]:
        """Rows and weights of a window's shares, in pieces."""
        step = PIECE_BYTES // _SHARE.itemsize
        pieces = []
        for first in range(at.first, at.first + at.n, step):
            piece = np.empty(min(step, at.first + at.n - first), _SHARE)
            read_at(self._handles[3], piece, first * _SHARE.itemsize)
            pieces.append(piece)
        return pieces

    def _windows(self) -> list[ShareRange]:
        """Where the windows' shares are, in the order in which they are added up: row by row of the map."""
        return [self._log.windows[window] for window in sorted(self._log.windows)]

    def _sorted_shares(self) -> NDArray[np.uint64]:
        """All shares as ``row << 32 | place``, sorted; the place counts shares in the order of `_windows`."""
        if self._order is None:
            windows = self._windows()
            order = np.empty(sum(at.n for at in windows), np.uint64)
            place = 0
            for at in windows:
                for share in self._share_index(at):
                    stop = place + len(share)
                    order[place:stop] = share["row"].astype(np.uint64) << np.uint64(32)
                    order[place:stop] |= np.arange(place, stop, dtype=np.uint64)
                    place = stop
            order.sort()
            self._order = order
        return self._order

    def _add_shares(self, start: int, stop: int, sums: NDArray[np.float32], weight: NDArray[np.float64]) -> None:
        """Add the shares of the regions ``start`` … ``stop − 1``."""
        order = self._sorted_shares()
        first, last = np.searchsorted(order, np.array([start, stop], np.uint64) << np.uint64(32))
        if first == last:
            return
        row = (order[first:last] >> np.uint64(32)).astype(np.intp) - start
        found, total_row = np.unique(row, return_inverse=True)
        total, total_weight = sums[found].astype(np.float64), weight[found]
        place = (order[first:last] & np.uint64(2**32 - 1)).astype(np.intp)
        position = _positions(place, self._windows())
        step = max(1, PIECE_BYTES // (4 * self.n_columns))
        for piece in (slice(k, k + step) for k in range(0, len(row), step)):
            share = np.empty((len(row[piece]), self.n_columns), "<f4")
            about = np.empty(len(share), _SHARE)
            read_records(self._handles[2], position[piece], share)
            read_records(self._handles[3], position[piece], about)
            add_in_order(total, total_row[piece], share)
            add_in_order(total_weight, total_row[piece], about["weight"])
        sums[found], weight[found] = total, total_weight


def _positions(place: NDArray[np.intp], windows: list[ShareRange]) -> NDArray[np.intp]:
    """Records of the file of shares, from places in the order of the windows."""
    first, count = np.array(windows, np.intp).reshape(-1, 2).T
    begin = np.cumsum(count) - count
    # windows without shares begin where the next one does: the last that begins there is meant
    window = np.searchsorted(begin, place, side="right") - 1
    return np.asarray(first[window] + place - begin[window])


def _partial(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(folder / "partial.json")
    return {}


def _boot_id() -> str:
    """The kernel's name for the time since the machine started; empty where there is none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""
