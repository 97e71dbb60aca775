"""Results on their way out: written in threads, so that the network does not wait for them."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BLOCK_WRITERS", "Buffers", "Writer"]

_WAITING = 2  # results that may wait to be written; each may be hundreds of MB

BLOCK_WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Threads for writes that need no order: one is what a CPU's network leaves room for, and too few for a GPU's."""


class Writer:
    """Runs writes in threads and holds at most a few; an error comes out at the next call or at the end.

    Parameters
    ----------
    threads
        One keeps the order of the calls.
    """

    def __init__(self, threads: int = 1) -> None:
        self._most = _WAITING + threads - 1
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[Future[None]] = deque()

    def submit(self, write: Callable[..., None], *arguments: Any) -> None:
        """Queue a write; waits while too many do."""
        self._waiting.append(self._pool.submit(write, *arguments))
        while len(self._waiting) > self._most:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            while self._waiting:
                self._waiting.popleft().result()


class Buffers:
    """Arrays of tens of MB that are used again: the system would take each back, and clear every page of the next."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, *shape: int) -> Tensor:
        """A float32 tensor on the host with whatever is in it."""
        size = math.prod(shape)
        with self._lock:
            place = next((k for k, kept in enumerate(self._free) if kept.numel() >= size), None)
            flat = torch.empty(size) if place is None else self._free.pop(place)
            self._lent[flat.data_ptr()] = flat
        return flat[:size].view(shape)

    def give(self, values: NDArray[np.float32]) -> None:
        """Take back what `take` lent, by now an array that nobody looks at any more; others are not ours."""
        with self._lock:
            flat = self._lent.pop(values.ctypes.data, None)
            if flat is not None:
                self._free.append(flat)
