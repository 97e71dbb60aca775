"""The device, copies to and from it, and the threads around it."""

from __future__ import annotations

import ctypes
import itertools
import platform
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from torch import Tensor

from pixnet_sd.engine import Buffers, Copies, Writer, fixed_shapes, freed_memory, make_fabric, prefetch, two_threads
from pixnet_sd.errors import PixNetError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", [torch.device("cpu"), None])
def test_cpu_in_full_precision(monkeypatch, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fabric = make_fabric(device)
    assert fabric.device == torch.device("cpu")
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "n_gpus"),
    [("cuda", 0), ("cuda:1", 0), (torch.device("cuda"), 0), ("cuda:5", 2), ("mps", 0)]
    + [(name, 0) for name in ("gpu", "cpu:x", "meta", "")],
)
def test_a_device_that_is_not_there(monkeypatch, device, n_gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PixNetError, match=f"{str(device)!r}.*'cpu'"):
        make_fabric(device)


@pytest.mark.gpu
@pytest.mark.parametrize("emulated", [False, True])
def test_bf16_on_a_gpu_that_computes_in_it(monkeypatch, emulated: bool) -> None:
    if emulated:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    fabric = make_fabric()
    with fabric.autocast():
        ones = torch.ones(2, 2, device=fabric.device)
        assert (ones @ ones).dtype == (torch.float32 if emulated else torch.bfloat16)


def test_kernels_are_tried_on_a_gpu_and_the_setting_is_put_back() -> None:
    seen: list[bool] = []
    for device in ("cuda", "cpu"):
        with suppress(KeyError), fixed_shapes(torch.device(device)):
            seen.append(torch.backends.cudnn.benchmark)
            raise KeyError
        seen.append(torch.backends.cudnn.benchmark)
    assert seen == [True, False, False, False]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("device", "library"), [("cpu", "glibc"), ("cuda", "glibc"), ("cpu", "")])
def test_memory_is_kept_and_given_back(monkeypatch, device: str, library: str, kept: bool) -> None:
    libc = Mock()
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    with suppress(KeyError), freed_memory(torch.device(device), kept=kept):
        libc.inside()
        raise KeyError
    mapped, trimmed = (2**30, 2**31 - 1) if kept else (2**25, 2**17)
    expected = [call.mallopt(-3, mapped), call.mallopt(-1, trimmed), call.inside()]
    expected += [call.mallopt(-3, 2**25), call.mallopt(-1, 2**26), call.malloc_trim(0)]
    assert libc.mock_calls == (expected if (device, library) == ("cpu", "glibc") else [call.inside()])


@dataclass
class Item:
    values: Tensor

    def moved(self, move) -> Item:
        return Item(move(self.values))


@pytest.mark.parametrize("device", DEVICES)
def test_there_and_back(device: str) -> None:
    copies, values = Copies(torch.device(device)), torch.arange(12.0).view(3, 4)
    there = copies.up(values)
    assert there.device.type == device
    np.testing.assert_array_equal(copies.down(there.T * 2)(), values.T * 2)
    item = Item(values)
    assert (next(copies.arriving([item])) is item) == (device == "cpu")  # a CPU copies nothing


@pytest.mark.gpu
def test_batches_are_whole_while_the_device_is_busy() -> None:
    """Memory of a batch that its user has dropped is not written to before the device has read it."""
    copies = Copies(torch.device("cuda"))
    busy = torch.rand(4096, 4096, device="cuda")
    sums = []
    for k, item in enumerate(copies.arriving(Item(torch.full((1 << 22,), float(k)).pin_memory()) for k in range(12))):
        for _ in range(5):
            busy = busy @ busy / busy.norm()
        sums.append((k, item.values.double().mean() + 0 * busy[0, 0].nan_to_num()))
    assert [float(total) for _, total in sums] == [float(k) for k, _ in sums]


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cuda", 2), ("cpu", 2)])
def test_two_threads_share_those_of_torch_and_give_them_back(device: str, threads: int) -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    with suppress(KeyError), two_threads(torch.device(device)) as pool:
        seen += [torch.get_num_threads()] if pool is None else pool.map(lambda _: torch.get_num_threads(), range(5))
        raise KeyError
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (seen, after) == ([threads] if (device, threads) != ("cpu", 2) else [1] * 5, threads)


def test_several_threads_write_at_once() -> None:
    both = threading.Barrier(2, timeout=10)
    with Writer(2) as writer:
        for _ in range(4):
            writer.submit(both.wait)


@pytest.mark.parametrize("threads", [1, 3])
def test_few_results_wait_and_one_thread_keeps_their_order(threads: int) -> None:
    written: list[int] = []
    with Writer(threads) as writer:
        for k in range(12):
            writer.submit(lambda k=k: time.sleep(0.01) or written.append(k))
            assert len(written) >= k - threads
    assert (written if threads == 1 else sorted(written)) == list(range(12))


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("threads", [1, 3])
def test_a_writers_error_comes_out(threads: int) -> None:
    with pytest.raises(ZeroDivisionError), Writer(threads) as writer:
        writer.submit(fail)


def test_what_waits_is_dropped_when_the_caller_fails() -> None:
    gate, written = threading.Event(), []
    with suppress(KeyError), Writer() as writer:
        writer.submit(gate.wait, 10)
        writer.submit(written.append, 1)
        threading.Timer(0.05, gate.set).start()
        raise KeyError
    assert not written


def test_buffers_are_used_again_when_given_back() -> None:
    buffers, foreign = Buffers(), np.ones(100, np.float32)
    one, two = buffers.take(3, 4), buffers.take(2, 2)
    one.fill_(1), two.fill_(2)
    assert one.sum() == 12  # they share nothing
    place = one.data_ptr()
    buffers.give(one.numpy())
    buffers.give(foreign)  # not ours
    assert buffers.take(20).data_ptr() not in (place, foreign.ctypes.data)  # too small for that
    again = buffers.take(2, 5)
    assert (again.data_ptr(), again.shape) == (place, (2, 5))
    assert buffers.take(3, 4).data_ptr() != place  # lent by now


def test_prefetch_keeps_the_order_and_raises_at_its_place() -> None:
    second_done = threading.Event()
    first = lambda: second_done.wait(10) and 0  # noqa: E731 - it ends last
    results = prefetch([first, lambda: second_done.set() or 1, lambda: 2, fail, lambda: 4])
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(prefetch([])) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_prefetch_does_not_run_away_and_closes_with_the_consumer(ahead: int) -> None:
    started, before = [], threading.active_count()
    results = prefetch((lambda k=k: started.append(k) for k in itertools.count()), ahead)
    for taken in range(1, 6):
        next(results)
        assert len(started) <= taken + ahead
    results.close()
    assert threading.active_count() == before
