"""The same work on many items in threads, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], n_workers: int | None) -> Iterator[Result]:
    """Results of ``work`` in the order of ``items``, never many more than workers at once.

    Threads and not processes: nearly all of the time goes to numpy and scipy loops that let other threads run, and a
    script without a main guard or a process that holds a GPU cannot be forked or spawned from safely.
    """
    n_workers = n_workers or os.cpu_count() or 1
    if n_workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(n_workers) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > n_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
