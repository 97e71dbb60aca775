"""Results on their way out: written in threads, so that the network does not wait for them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

__all__ = ["BLOCK_WRITERS", "Writer"]

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
