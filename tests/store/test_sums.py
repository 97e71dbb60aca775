"""Sums over regions: whatever the windows, their order, the runs that put them, and what cut those off."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import RegionShare, Window
from pixnet_sd.store import FileSums, MemorySums, expression

N_GENES = 3


@st.composite
def gathered(draw):
    """Regions as boxes on a map of 12 × 12 pixels with values; windows that tile it; an order to put them in."""
    side, n = 12, draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    low = rng.integers(0, side, (n, 2))
    high = np.minimum(low + rng.integers(0, 7, (n, 2)), side)  # some are empty
    values = rng.standard_normal((side, side, N_GENES)).astype(np.float32)
    step = draw(st.sampled_from([3, 4, 5, 12]))
    windows = [
        Window(row, min(row + step, side), col, min(col + step, side))
        for row in range(0, side, step)
        for col in range(0, side, step)
    ]
    return values, low, high, windows, draw(st.permutations(windows))


def share_of(values, low, high, window):
    """What the engine puts for a window."""
    corner, end = np.array([window.row0, window.col0]), np.array([window.row1, window.col1])
    first, last = np.maximum(low, corner), np.minimum(high, end)
    index = np.flatnonzero((first < last).all(axis=1))
    boxes = [values[slice(*rows), slice(*cols)] for rows, cols in np.stack([first, last], axis=2)[index].tolist()]
    sums = np.array([box.sum((0, 1), dtype=np.float64) for box in boxes], np.float32).reshape(-1, N_GENES)
    weight = np.prod((last - first)[index], axis=1).astype(float)
    return RegionShare(window, index, sums, weight, ((low >= corner) & (high <= end))[index].all(axis=1))


@settings(deadline=None, max_examples=15)
@given(gathered(), st.integers(0, 16), st.integers(0, 12))
def test_rows_are_the_sums_over_regions(case, n_before, cut):
    values, low, high, windows, order = case
    n = len(low)
    in_memory = MemorySums(n, N_GENES, N_GENES)
    for window in windows:
        in_memory.put(share_of(values, low, high, window))
    with tempfile.TemporaryDirectory() as name:
        rows = FileSums(Path(name) / "table-x", n, N_GENES, {"run": 1})
        for window in order[:n_before]:
            rows.put(share_of(values, low, high, window))
        rows.rows(0, n)  # looking before all is there does no harm
        rows.close()
        rows = FileSums(Path(name) / "table-x", n, N_GENES, {"run": 1})
        assert rows.resumed
        assert [rows.is_done(window) for window in order] == [k < n_before for k in range(len(order))]
        for window in order:
            share = share_of(values, low, high, window)
            rows.put(share._replace(sums=np.full_like(share.sums, 7.0)) if rows.is_done(window) else share)
        halves = [rows.rows(0, min(cut, n)), rows.rows(min(cut, n), n)]
        sums, weight = (np.concatenate(half) for half in zip(*halves, strict=True))
        rows.close()
    boxes = [values[a:c, b:d].reshape(-1, N_GENES) for (a, b), (c, d) in zip(low, high, strict=True)]
    expected = [box.sum(0, dtype=np.float64) if len(box) else [np.nan] * N_GENES for box in boxes]
    np.testing.assert_allclose(sums, expected, atol=1e-5)
    np.testing.assert_array_equal(weight, [len(box) for box in boxes])
    for ours, theirs in zip((sums, weight), in_memory.rows(0, n), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # to the last bit, whatever the order


def test_many_shares_are_added_one_after_the_other(tmp_path):
    """More than are looked at together, of few regions: in double precision, in the order of the windows."""
    n_windows, n_columns = 300, 10_000
    rows, rng = FileSums(tmp_path / "table-x", 2, n_columns, {}), np.random.default_rng(0)
    shares = rng.standard_normal((n_windows, 2, n_columns), dtype=np.float32)
    weight = rng.random((n_windows, 2))
    for k in rng.permutation(n_windows):
        rows.put(RegionShare(Window(k, k + 1, 0, 1), np.arange(2), shares[k], weight[k], np.zeros(2, bool)))
    sums, weights = rows.rows(0, 2)
    rows.close()
    np.testing.assert_array_equal(sums, shares.astype(float).cumsum(axis=0)[-1].astype(np.float32))
    np.testing.assert_array_equal(weights, weight.cumsum(axis=0)[-1])


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_shares_that_do_not_fit_are_refused(where, tmp_path):
    rows = MemorySums(4, 2, 2) if where == "memory" else FileSums(tmp_path / "table-x", 4, 2, {})
    good = RegionShare(Window(0, 1, 0, 1), np.array([1, 3]), np.ones((2, 2), np.float32), np.ones(2), np.ones(2, bool))
    for change in (
        {"sums": np.ones((2, 3), np.float32)},
        {"index": np.array([1, 4])},
        {"weight": np.ones(1)},
        {"sums": np.array([[1, np.nan], [0, 0]], np.float32)},
        {"sums": np.array([[1, 0], [-np.inf, 0]], np.float32)},
    ):
        with pytest.raises(DataError, match=r"window \(0, 1, 0, 1\)"):
            rows.put(good._replace(**change))
    assert not rows.is_done(good.window)
    assert np.isnan(rows.rows(0, 4)[0]).all()


def test_too_large_for_memory():
    MemorySums(10, 250, 250)
    with pytest.raises(StoreError, match=r"100000000000 regions"):
        MemorySums(10**11, 250, 250)


def test_mean_divides_and_sum_does_not():
    sums, weight = np.array([[2.0, 4.0], [9.0, 3.0]], np.float32), np.array([2.0, 3.0])
    assert expression(sums, weight, "sum").x.tolist() == sums.tolist()
    mean = expression(sums, weight, "mean").x
    assert (mean.dtype, mean.tolist()) == (np.float32, [[1.0, 2.0], [3.0, 1.0]])


N = 40
WINDOWS = [Window(row, row + 1, col, col + 1) for row in range(2) for col in range(3)]


def share(window):
    """Every window holds some regions wholly, and has a share in others."""
    number = WINDOWS.index(window)
    rng = np.random.default_rng(number)
    index = np.flatnonzero((np.arange(N) % 6 == number) | (np.arange(N) >= 30))
    sums = rng.random((len(index), N_GENES), dtype=np.float32)
    return RegionShare(window, index, sums, rng.random(len(index)), index < 30)


@pytest.fixture
def start(tmp_path):
    """Opens sums, and closes them when the test is over; several at once, as after a kill."""
    with contextlib.ExitStack() as stack:

        def opened(name="table-x", n=N, **changes):
            rows = FileSums(tmp_path / name, n, N_GENES, {"fingerprint": "f", "genes": ["a", "b", "c"], **changes})
            stack.callback(rows.close)
            return rows

        yield opened


def put_all(rows):
    for window in WINDOWS:
        if not rows.is_done(window):
            rows.put(share(window))
    return np.c_[rows.rows(0, N)]


def done(rows):
    return [rows.is_done(window) for window in WINDOWS]


@pytest.fixture
def complete(start):
    return put_all(start("table-whole"))


@pytest.mark.parametrize("damage", ["cut", "zeros", "flip"])
def test_what_did_not_reach_the_disk_is_put_again(tmp_path, start, complete, damage):
    """A killed run leaves whole windows and one in part; a machine that goes down leaves anything."""
    put_all(start())  # never closed
    file = tmp_path / "table-x" / "sums.bin"
    content = file.read_bytes()
    starts = [match.start() for match in re.finditer(b"PSUM", content)]
    assert len(starts) == len(WINDOWS)
    for at in {*range(0, len(content), 397), *starts, len(content) - 1}:
        flipped = bytes([content[at] ^ 1]) + content[at + 1 :]
        rest = {"cut": b"", "zeros": bytes(len(content) - at), "flip": flipped}[damage]
        file.write_bytes(content[:at] + rest)
        rows = start()
        assert rows.resumed
        n_whole = sum(stop <= at for stop in [*starts[1:], len(content)])
        if damage != "zeros" or any(content[at:]):
            assert done(rows) == [k < n_whole for k in range(6)]
        np.testing.assert_array_equal(put_all(rows), complete)
        rows.close()


def test_the_disk_may_write_less_than_it_was_given(start, complete, monkeypatch):
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real_write(handle, data[:5], offset))
    monkeypatch.setattr(os, "preadv", lambda handle, data, offset: real_read(handle, [data[0][:7]], offset))
    np.testing.assert_array_equal(put_all(start()), complete)


def test_a_full_disk_is_explained_and_the_run_goes_on_later(start, complete, monkeypatch):
    possible = [os.pwrite] * 2

    def full(*args):
        if not possible:
            raise OSError(errno.ENOSPC, "No space left on device")
        return possible.pop()(*args)

    rows = start()
    rows.put(share(WINDOWS[0]))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"table-x"):
        rows.put(share(WINDOWS[1]))
    monkeypatch.undo()
    assert done(rows) == [True] + [False] * 5
    rows.close()
    resumed = start()
    assert done(resumed) == [True] + [False] * 5
    np.testing.assert_array_equal(put_all(resumed), complete)


@pytest.mark.parametrize("change", ["settings", "gone", "second name", "note"])
def test_sums_that_are_not_of_this_run_are_not_taken_up(tmp_path, start, change):
    put_all(start())
    file = tmp_path / "table-x" / "sums.bin"
    if change == "gone":
        file.unlink()
    elif change == "second name":
        os.link(file, tmp_path / "mine")
    elif change == "note":
        file.with_name("partial.json").write_text("{")
    rows = start(fingerprint="another model" if change == "settings" else "f")
    assert not rows.resumed
    assert done(rows) == [False] * 6
    assert not rows.rows(0, N)[1].any()
    if change == "second name":
        assert (tmp_path / "mine").stat().st_size > 0


def test_regions_that_cannot_be_are_not_taken_up(tmp_path, start):
    """A checksum is no signature: who plants a file can make one."""
    large, weight = start(n=10 * N), np.ones(2)
    large.put(RegionShare(WINDOWS[0], np.array([0, N]), np.ones((2, 3), np.float32), weight, weight > 0))
    large.folder.rename(tmp_path / "large")
    shutil.copy(tmp_path / "large" / "sums.bin", start().folder)
    rows = start()
    assert rows.resumed
    assert rows.n_done == 0


def test_discarded_or_put_away_sums_leave_nothing(tmp_path, start):
    for name in ("discarded", "put away"):
        rows = start(name)
        put_all(rows)
        if name == "discarded":
            rows.discard()
        else:
            shutil.rmtree(tmp_path / name)
            with pytest.raises(StoreError, match="put away"):
                rows.rows(0, N)
        rows.close()
        assert not (tmp_path / name).exists()
