"""Copies between the host and a GPU, beside its computations: each direction has a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.nn.staged_matrix import Move

__all__ = ["Copies"]

_UNDER_WAY = 2  # batches whose steps may be queued on the device; each holds its targets there


class Movable(Protocol):
    """What consists of tensors."""

    def moved(self, move: Move) -> Self:
        """The same with every tensor moved."""


M = TypeVar("M", bound=Movable)


class Copies:
    """Copies to and from one device; on a CPU nothing is copied.

    Parameters
    ----------
    device
        The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self.gpu else []

    def up(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; the device waits for the copy, the caller only if it is not page-locked."""
        if not self.gpu:
            return tensor.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._streams[0]):
            there = tensor.to(self.device, non_blocking=True)
        computing.wait_stream(self._streams[0])
        there.record_stream(computing)  # its memory is not for the next copy before the computations are through
        return there

    def down(self, tensor: Tensor) -> Callable[[], NDArray[Any]]:
        """Start to copy to the host; the array is had by calling what is returned, from whichever thread."""
        if not tensor.is_cuda:
            return tensor.cpu().numpy
        stream, tensor = self._streams[1], tensor.contiguous()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        done = torch.cuda.Event(blocking=True)  # whoever waits sleeps
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            copy.copy_(tensor, non_blocking=True)
            done.record(stream)
        tensor.record_stream(stream)

        def wait() -> NDArray[Any]:
            done.synchronize()
            return np.asarray(copy.numpy())

        return wait

    def arriving(self, batches: Iterable[M]) -> Iterator[M]:
        """Batches on the device, copied while those before are worked on.

        Nothing else waits for the device in most steps, so that steps would be queued, and batches held, without end:
        a batch is copied when all but the last few are worked off.
        """
        if not self.gpu:
            yield from batches
            return
        queued: deque[torch.cuda.Event] = deque()
        for batch in batches:
            while len(queued) >= _UNDER_WAY:
                queued.popleft().synchronize()
            yield batch.moved(self.up)
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self.device))
            queued.append(done)
