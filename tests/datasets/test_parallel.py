from __future__ import annotations

import threading

import pytest

from pixnet_sd.datasets.drawn._noise import in_order


@pytest.mark.parametrize("n_workers", [None, 1, 3])
def test_results_come_in_order(n_workers):
    assert list(in_order(lambda k: k * k, range(50), n_workers)) == [k * k for k in range(50)]


def test_no_more_is_started_than_is_asked_for():
    started = []
    results = in_order(lambda k: started.append(k), iter(range(1000)), 2)
    next(results)
    assert len(started) <= 4


def test_threads_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(in_order(lambda _: meeting.wait(), range(2), 2))) == 2


def test_an_error_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda k: 1 // k, [1, 0, 1], 2))
