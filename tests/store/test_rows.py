"""Whatever the windows, their order and the runs that put them: the rows are the sums over the regions."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import RegionShare, Window
from pixnet_sd.store import MemoryRows, RowInfo, expression
from pixnet_sd.store import _sums as _rows
from pixnet_sd.store._sums import RowFile, add_in_order

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


def share(values, low, high, window):
    """What the engine puts for a window."""
    corner, end = np.array([window.row0, window.col0]), np.array([window.row1, window.col1])
    first, last = np.maximum(low, corner), np.minimum(high, end)
    index = np.flatnonzero((first < last).all(axis=1))
    parts = [values[slice(*rows), slice(*cols)] for rows, cols in np.stack([first, last], axis=2)[index].tolist()]
    sums = np.array([part.sum((0, 1), dtype=np.float64) for part in parts], np.float32).reshape(-1, N_GENES)
    weight = np.prod((last - first)[index], axis=1).astype(float)
    complete = ((low >= corner) & (high <= end))[index].all(axis=1)
    return RegionShare(window, index, sums, weight, complete)


def dense(values, low, high):
    boxes = [values[a:c, b:d].reshape(-1, N_GENES) for (a, b), (c, d) in zip(low, high, strict=True)]
    return np.array([box.sum(0, dtype=np.float64) for box in boxes]), np.array([float(len(box)) for box in boxes])


@settings(deadline=None, max_examples=30)
@given(gathered(), st.integers(0, 16), st.integers(0, 12))
def test_rows_are_the_sums_over_regions(case, n_before, cut):
    values, low, high, windows, order = case
    n = len(low)
    whole = MemoryRows(n, N_GENES, N_GENES)
    for window in windows:
        whole.put(share(values, low, high, window))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "table-x"
        rows = RowFile(folder, n, N_GENES, {"run": 1})
        for window in order[:n_before]:
            rows.put(share(values, low, high, window))
        rows.rows(0, n)  # looking before all is there does no harm
        rows.close()
        rows = RowFile(folder, n, N_GENES, {"run": 1})
        assert rows.resumed
        assert [rows.is_done(window) for window in order] == [k < n_before for k in range(len(order))]
        for window in order:
            part = share(values, low, high, window)
            rows.put(part._replace(sums=np.full_like(part.sums, 7.0)) if rows.is_done(window) else part)
        cut = min(cut, n)
        parts = [rows.rows(0, cut), rows.rows(cut, n)]
        found = [np.concatenate(part) for part in zip(*parts, strict=True)]
        keep = rows.keep()
        rows.close()
    sums, weight = dense(values, low, high)
    np.testing.assert_allclose(found[0], sums, atol=1e-5)
    np.testing.assert_array_equal(found[1], weight)
    np.testing.assert_array_equal(keep, weight > 0)
    for ours, theirs in zip(found, whole.rows(0, n), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # to the last bit, whatever the order
    np.testing.assert_array_equal(whole.keep(), keep)


@given(st.lists(st.integers(0, 4), max_size=20), st.integers(0, 2**16))
def test_shares_are_added_one_after_the_other(rows, seed):
    row = np.sort(np.array(rows, np.intp))
    shares = np.random.default_rng(seed).standard_normal((len(row), 2)).astype(np.float32)
    total, expected = np.ones((5, 2)), np.ones((5, 2))
    add_in_order(total, row, shares)
    for k, part in zip(row, shares, strict=True):
        expected[k] += part
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_shares_that_do_not_fit_are_refused(kind, tmp_path):
    rows = MemoryRows(4, 2, 2) if kind == "memory" else RowFile(tmp_path / "table-x", 4, 2, {})
    window, index, one, yes = Window(0, 1, 0, 1), np.array([1, 3]), np.ones(2), np.ones(2, bool)
    for bad_index, sums in ((index, np.ones((2, 3))), (np.array([1, 4]), np.ones((2, 2)))):
        with pytest.raises(DataError, match=r"window \(0, 1, 0, 1\).*4 regions of 2 columns"):
            rows.put(RegionShare(window, bad_index, sums.astype(np.float32), one, yes))
    with pytest.raises(DataError, match=r"window \(0, 1, 0, 1\) is not finite"):
        rows.put(RegionShare(window, index, np.array([[1, np.nan], [0, 0]], np.float32), one, yes))
    assert not rows.is_done(window)
    assert not rows.keep().any()


def test_too_large_for_memory_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_rows, "available_memory", lambda: 10**9)
    MemoryRows(10, 250, 250)
    with pytest.raises(StoreError, match=r"1000000 regions and 250 values takes 2\.02 GB.*sdata\.write"):
        MemoryRows(10**6, 250, 250)


def test_mean_divides_and_sum_does_not():
    sums, weight = np.array([[2.0, 4.0], [9.0, 3.0]], np.float32), np.array([2.0, 3.0])
    assert expression(sums, weight, "sum").x.tolist() == sums.tolist()
    mean = expression(sums, weight, "mean").x
    assert mean.dtype == np.float32
    assert mean.tolist() == [[1.0, 2.0], [3.0, 1.0]]


def test_described_regions_join_and_part():
    infos = [
        RowInfo(np.array(["a", "b"]), np.arange(4.0).reshape(2, 2), {"area": np.array([1, 2])}),
        RowInfo(np.array(["ccc"]), np.full((1, 2), 9.0), {"area": np.array([3])}),
    ]
    joined = RowInfo.joined(infos).subset(np.array([False, True, True]))
    assert joined.ids.tolist() == ["b", "ccc"]
    assert joined.centres_px.tolist() == [[2.0, 3.0], [9.0, 9.0]]
    assert joined.obs["area"].tolist() == [2, 3]
