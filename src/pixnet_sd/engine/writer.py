"""Results on their way out: copied from the device and written in a thread, so that the network waits for neither."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Writer", "on_host"]

_WAITING = 2  # results that may wait to be written; each may be hundreds of MB


class Writer:
    """Runs writes in order in one thread and holds at most a few; an error comes out at the next call or at the end."""

    def __init__(self, waiting: int = _WAITING) -> None:
        self._most = waiting
        self._pool = ThreadPoolExecutor(1)
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


def on_host(values: Tensor) -> Callable[[], NDArray[Any]]:
    """Start to copy a tensor to the host; the array is had by calling what is returned, from whichever thread."""
    if not values.is_cuda:
        return values.cpu().numpy
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> NDArray[Any]:
        done.synchronize()
        return np.asarray(copy.numpy())

    return wait
