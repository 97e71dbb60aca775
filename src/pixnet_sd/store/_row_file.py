"""Sums over any number of regions, on disk beside the store while they are being gathered.

Four flat files and a log. Whole regions go to their places in ``sums.f32`` and ``weights.f64``, shares of regions that
lie in several windows are appended to ``shares.f32`` and ``shares.idx``, and last the window goes into ``done.log``: a
kill between any two of these leaves a window that counts as not done, and is put again over what was there.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet_sd._errors import StoreError
from pixnet_sd._logging import logger

from ._disk import check_same_folder, delete_folder, explain_disk_errors, folder_id, read_json, write_json
from ._file_io import read_at, read_records, write_at, write_records
from ._planted import open_regular
from ._rows import add_in_order, check_put
from ._window_log import ShareRange, WindowLog

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pixnet_sd.nn.grid import Window

__all__ = ["RowFile"]

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

    def put(
        self,
        window: Window,
        index: NDArray[np.intp],
        sums: NDArray[np.float32],
        weight: NDArray[np.float64],
        complete: NDArray[np.bool_],
    ) -> None:
        """As `Rows.put`."""
        if self.is_done(window):
            return
        check_put(self, window, index, sums, weight, complete)
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
