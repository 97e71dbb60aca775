"""What a run leaves behind when it is killed, when the machine goes down, when the disk is full."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pytest

from pixnet_sd.errors import StoreError
from pixnet_sd.geometry import RegionShare, Window
from pixnet_sd.store import _sums as _file_io
from pixnet_sd.store import _sums as _row_file
from pixnet_sd.store._sums import RowFile, ShareRange, WindowLog

N, N_GENES = 40, 3
WINDOWS = [Window(row, row + 1, col, col + 1) for row in range(2) for col in range(3)]


def share(window):
    """Every window holds some regions wholly, and has a share in others."""
    number = WINDOWS.index(window)
    rng = np.random.default_rng(number)
    index = np.flatnonzero((np.arange(N) % 6 == number) | (np.arange(N) >= 30))
    complete = index < 30
    sums = rng.random((len(index), N_GENES), dtype=np.float32)
    return RegionShare(window, index, sums, rng.random(len(index)), complete)


def start(folder, **changes):
    return RowFile(folder, N, N_GENES, {"fingerprint": "f", "genes": ["a", "b", "c"], **changes})


def put_all(rows):
    for window in WINDOWS:
        if not rows.is_done(window):
            rows.put(share(window))


def contents(rows):
    sums, weight = rows.rows(0, N)
    return np.c_[sums, weight]


@pytest.fixture
def complete(tmp_path):
    rows = start(tmp_path / "table-whole")
    put_all(rows)
    yield contents(rows)
    rows.close()


def n_lines(folder):
    return (folder / "done.log").read_bytes().count(b"\n")


@pytest.mark.parametrize("cut", range(1, 21))
def test_a_log_torn_at_any_byte(tmp_path, complete, cut):
    folder = tmp_path / "table-x"
    rows = start(folder)
    put_all(rows)
    log = (folder / "done.log").read_bytes()  # of a killed run: nothing was closed
    (folder / "done.log").write_bytes(log[:-cut])
    resumed = start(folder)
    assert resumed.resumed
    assert [resumed.is_done(window) for window in WINDOWS[:4]] == [True] * 4
    assert not resumed.is_done(WINDOWS[-1])
    put_all(resumed)
    np.testing.assert_array_equal(contents(resumed), complete)


def test_a_put_that_was_cut_off_anywhere_is_put_again(tmp_path, complete, monkeypatch):
    """The process dies after k bytes of a put: k runs over all of its writes, and through each."""
    real, allowed = os.pwrite, 0

    def dying(handle, data, offset):
        nonlocal allowed
        allowed -= len(data)
        if allowed >= 0:
            return real(handle, data, offset)
        real(handle, data[: len(data) + allowed], offset)
        raise KeyboardInterrupt

    for budget in (0, 1, 5, 12, 30, 100, 150, 200, 300, 350, 10_000):
        folder = tmp_path / f"table-{budget}"
        rows = start(folder)
        for window in WINDOWS[:3]:
            rows.put(share(window))
        allowed = budget
        monkeypatch.setattr(_file_io.os, "pwrite", dying)
        try:
            rows.put(share(WINDOWS[3]))
        except KeyboardInterrupt:
            assert not rows.is_done(WINDOWS[3])
        else:
            assert budget == 10_000
        monkeypatch.setattr(_file_io.os, "pwrite", real)
        resumed = start(folder)
        assert [resumed.is_done(window) for window in WINDOWS[:3]] == [True] * 3
        put_all(resumed)
        np.testing.assert_array_equal(contents(resumed), complete)


def test_the_disk_may_write_less_than_it_was_given(tmp_path, complete, monkeypatch):
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(_file_io.os, "pwrite", lambda handle, data, offset: real_write(handle, data[:5], offset))
    monkeypatch.setattr(_file_io.os, "preadv", lambda handle, data, offset: real_read(handle, [data[0][:7]], offset))
    rows = start(tmp_path / "table-x")
    put_all(rows)
    np.testing.assert_array_equal(contents(rows), complete)


def test_other_settings_start_anew(tmp_path):
    folder = tmp_path / "table-x"
    rows = start(folder)
    put_all(rows)
    rows.close()
    assert start(folder).n_done == len(WINDOWS)
    other = start(folder, fingerprint="another model")
    assert not other.resumed
    assert other.n_done == 0
    assert not other.keep().any()


def test_files_that_are_gone_start_anew(tmp_path):
    folder = tmp_path / "table-x"
    rows = start(folder)
    put_all(rows)
    rows.close()
    (folder / "sums.f32").unlink()
    assert not start(folder).resumed


def test_after_a_crash_of_the_machine_only_what_was_forced_to_disk_counts(tmp_path, complete, monkeypatch):
    folder = tmp_path / "table-x"
    rows = start(folder)
    for window in WINDOWS[:2]:
        rows.put(share(window))
    rows.sync()
    for window in WINDOWS[2:4]:
        rows.put(share(window))
    monkeypatch.setattr(_row_file, "_boot_id", lambda: "another boot")
    lost = 12 * N_GENES  # bytes of the later shares that never reached the disk
    os.truncate(folder / "shares.f32", (folder / "shares.f32").stat().st_size - lost)
    resumed = start(folder)
    assert resumed.resumed
    assert [resumed.is_done(window) for window in WINDOWS] == [True] * 2 + [False] * 4
    put_all(resumed)
    np.testing.assert_array_equal(contents(resumed), complete)
    assert [start(folder).is_done(window) for window in WINDOWS] == [True] * 6  # a kill within this boot


def test_without_a_boot_id_only_what_was_forced_to_disk_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(_row_file, "_boot_id", lambda: "")
    folder = tmp_path / "table-x"
    rows = start(folder)
    rows.put(share(WINDOWS[0]))
    assert start(folder).n_done == 0
    again = start(folder)
    again.put(share(WINDOWS[0]))
    again.close()
    assert start(folder).n_done == 1


def test_it_is_forced_to_disk_from_time_to_time(tmp_path, monkeypatch):
    monkeypatch.setattr(_row_file, "SYNC_S", -1.0)
    folder = tmp_path / "table-x"
    put_all(start(folder))
    assert (folder / "done.log").read_text().count("synced .") == len(WINDOWS)


def test_a_put_that_is_there_changes_nothing(tmp_path, complete):
    rows = start(tmp_path / "table-x")
    put_all(rows)
    size = rows.stored_bytes
    for window in WINDOWS:
        _, index, sums, weight, whole = share(window)
        rows.put(RegionShare(window, index, sums + 1, weight + 1, ~whole))
    np.testing.assert_array_equal(contents(rows), complete)
    assert rows.stored_bytes == size


@pytest.mark.parametrize("what", ["pwrite", "write"])
def test_a_full_disk_is_explained_and_the_run_goes_on_later(tmp_path, complete, monkeypatch, what):
    folder = tmp_path / "table-x"
    rows = start(folder)
    rows.put(share(WINDOWS[0]))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, what, full)
    words = (
        r"Writing the predicted regions in .*table-x failed: No space left.*GB are free.*unchanged.*same call goes on"
    )
    with pytest.raises(StoreError, match=words):
        rows.put(share(WINDOWS[1]))
    rows.close()
    monkeypatch.undo()
    resumed = start(folder)
    assert [resumed.is_done(window) for window in WINDOWS[:2]] == [True, False]
    put_all(resumed)
    np.testing.assert_array_equal(contents(resumed), complete)


def test_many_shares_are_read_in_pieces(tmp_path, complete, monkeypatch):
    rows = start(tmp_path / "table-x")
    put_all(rows)
    for piece in (1, 3, 7):
        monkeypatch.setattr(_row_file, "PIECE_BYTES", piece * 16)
        rows._order = None
        np.testing.assert_array_equal(contents(rows), complete)
        np.testing.assert_array_equal(rows.keep(), complete[:, -1] > 0)


def test_discarded_rows_leave_nothing(tmp_path):
    rows = start(tmp_path / "table-x")
    put_all(rows)
    rows.discard()
    rows.close()
    assert not (tmp_path / "table-x").exists()


def test_rows_that_were_put_away_meanwhile_are_just_closed(tmp_path):
    rows = start(tmp_path / "table-x")
    put_all(rows)
    shutil.rmtree(tmp_path / "table-x")
    rows.close()
    assert not (tmp_path / "table-x").exists()


def test_lines_of_the_log_that_are_no_windows_are_skipped(tmp_path):
    path = tmp_path / "done.log"
    log = WindowLog(path, believe_all=True)
    log.add((0, 4, 0, 4), ShareRange(0, 2))
    log.close()
    for junk in (b"\n1 2 3", b"\x00\x00\xff", b"\n9 9 9 9 9 9 9 .", b"\n1 2 3 4 x 6 .", b"\n4 8 0 4 2 5"):
        with path.open("ab") as file:
            file.write(junk)
    log = WindowLog(path, believe_all=True)
    assert log.windows == {(0, 4, 0, 4): (0, 2)}
    log.add((4, 8, 0, 4), ShareRange(2, 5))
    log.close()
    assert WindowLog(path, believe_all=True).n_shares == 7
