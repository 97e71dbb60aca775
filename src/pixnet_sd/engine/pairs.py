"""Two tiles at a time on a CPU, each with half of the threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["Pairs"]


class Pairs:
    """Computes tiles in two threads, each of which has half of torch's threads for itself.

    Threads that share one tile wait for each other after every layer, and spin while they do. Writers that compress in
    between make them wait long; a thread with a tile of its own waits for nobody.

    Parameters
    ----------
    device
        Where the network is; false in a condition where pairs do not help: on a GPU, or with one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._pool = None
        if device.type == "cpu" and self._threads > 1:
            self._pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(self._threads // 2,))

    def __bool__(self) -> bool:
        return self._pool is not None

    def map(self, compute: Callable[[list[Tensor]], Tensor], images: list[Tensor]) -> Tensor:
        """Apply a function of tiles (one at a time) to some, and put the results, each (1, ...), one after another."""
        assert self._pool is not None  # asked for before
        return torch.cat(list(self._pool.map(compute, [[image] for image in images])))

    def close(self) -> None:
        """Give the threads back."""
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)
