from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from pixnet_sd.engine import Buffers, Writer


def test_one_thread_keeps_the_order() -> None:
    written: list[int] = []
    with Writer() as writer:
        for k in range(20):
            writer.submit(written.append, k)
    assert written == list(range(20))


def test_several_threads_write_at_once() -> None:
    both = threading.Barrier(2, timeout=10)
    with Writer(2) as writer:
        for _ in range(4):
            writer.submit(both.wait)


@pytest.mark.parametrize("threads", [1, 3])
def test_few_results_wait(threads: int) -> None:
    gate, lock = threading.Event(), threading.Lock()
    submitted, written = [], []

    def write(k: int) -> None:
        gate.wait(10)
        with lock:
            written.append(k)

    def submit_all() -> None:
        with Writer(threads) as writer:
            for k in range(12):
                submitted.append(k)
                writer.submit(write, k)

    submitting = threading.Thread(target=submit_all)
    submitting.start()
    while len(submitted) < threads + 2:
        time.sleep(0.001)
    assert len(submitted) == threads + 2  # the last of them is the one that waits
    gate.set()
    submitting.join(10)
    assert sorted(written) == list(range(12))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_out(threads: int) -> None:
    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Writer(threads) as writer:
        writer.submit(fail)


def test_what_waits_is_dropped_when_the_caller_fails() -> None:
    written: list[int] = []
    gate = threading.Event()

    def fail() -> None:
        with Writer() as writer:
            writer.submit(gate.wait, 10)
            writer.submit(written.append, 1)
            threading.Timer(0.05, gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not written


def test_buffers_are_used_again_when_given_back() -> None:
    buffers = Buffers()
    one, two = buffers.take(3, 4), buffers.take(2, 2)
    one.fill_(1), two.fill_(2)
    assert one.sum() == 12  # they share nothing
    place = one.data_ptr()
    buffers.give(one.numpy())
    assert buffers.take(20).data_ptr() != place  # too small for that
    again = buffers.take(2, 5)
    assert again.data_ptr() == place
    assert again.shape == (2, 5)
    assert buffers.take(3, 4).data_ptr() != place  # lent by now


def test_foreign_arrays_are_not_taken() -> None:
    buffers = Buffers()
    foreign = np.ones(100, np.float32)
    buffers.give(foreign)
    assert buffers.take(10).data_ptr() != foreign.ctypes.data
