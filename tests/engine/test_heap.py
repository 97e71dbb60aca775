from __future__ import annotations

import platform

import pytest
import torch

from pixnet_sd.engine import _device as heap


class Libc:
    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, name: int, value: int) -> None:
        self.calls.append((name, value))

    def malloc_trim(self, keep: int) -> None:
        self.calls.append((keep,))


def test_memory_is_kept_and_given_back(monkeypatch) -> None:
    libc = Libc()
    monkeypatch.setattr(heap, "_glibc", lambda: libc)
    run = heap.kept_memory(torch.device("cpu"))
    run.__enter__()
    assert dict(libc.calls) == {-3: 2**30, -1: 2**31 - 1}
    error = KeyError()
    assert not run.__exit__(KeyError, error, None)  # it comes out, and memory is given back all the same
    assert dict(libc.calls[2:4]) == {-3: 2**25, -1: 2**26}
    assert libc.calls[4:] == [(0,)]


@pytest.mark.parametrize(("device", "library"), [("cuda", "glibc"), ("cpu", "")])
def test_elsewhere_nothing_is_touched(monkeypatch, device: str, library: str) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("asked for the C library"))
    with heap.kept_memory(torch.device(device)):
        pass
