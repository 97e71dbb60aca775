"""The device and what keeps it busy: precision, copies, memory, and threads that read ahead and write behind."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from pixnet_sd.errors import PixNetError

T = TypeVar("T")

_N_DEVICES: dict[str, Callable[[], int]] = {
    "cpu": lambda: 1,
    "cuda": lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "mps": lambda: int(torch.backends.mps.is_available()),
}


def make_fabric(device: str | torch.device | None = None) -> Fabric:
    """Make the Fabric of a run, on a CUDA GPU if there is one: bf16 autocast where a GPU has it, float32 elsewhere."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in _N_DEVICES:
        raise PixNetError(f"device={str(device)!r} is none that can be used. Use 'cpu', 'cuda', 'cuda:1' or 'mps'.")
    n_devices = _N_DEVICES[chosen.type]()
    if (chosen.index or 0) >= n_devices:
        raise PixNetError(
            f"device={str(device)!r} was asked for, and torch sees {n_devices or 'no'} {chosen.type.upper()} GPU. Use "
            f"{'another number, or ' if n_devices else ''}device='cpu'."
        )
    # Before Ampere GPUs emulate bf16, which is slower than float32.
    has_bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Fabric(
        accelerator=chosen.type,
        devices=1 if chosen.type == "cpu" or chosen.index is None else [chosen.index],
        precision="bf16-mixed" if has_bf16 else "32-true",
    )


@contextmanager
def fixed_shapes(device: torch.device) -> Iterator[None]:
    """Let cuDNN try its kernels on the first tile and keep the fastest, for a run whose tiles have one size."""
    # TF32 is left as it is set: convolutions are in bf16, and the float32 of aggregation and head stays exact.
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_KEPT_BYTES, _LARGEST_BYTES = 2**31 - 1, 2**30
_USUAL_BYTES, _USUAL_TRIM_BYTES = 2**25, 2**17  # the most that glibc's own threshold grows to, and what it starts with


@contextmanager
def freed_memory(device: torch.device, *, kept: bool) -> Iterator[None]:
    """Use freed memory of a run on the CPU again, and give it back at the end; or give it back at once, if not kept."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    # Left alone, glibc returns blocks over 32 MB, as activations are, and the system clears every page of the next; of
    # smaller ones each thread keeps up to 64 MB.
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES if kept else _USUAL_BYTES)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES if kept else _USUAL_TRIM_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
        libc.malloc_trim(0)


_UNDER_WAY = 2  # batches whose steps may be queued on the device; each holds its targets there


class Copies:
    """Copies to and from one device, each direction in a stream of its own; on a CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self.gpu else []

    def up(self, tensor: Tensor) -> Tensor:
        """Copy to the device; the device waits for the copy, the caller only if the tensor is not page-locked."""
        if not self.gpu:
            return tensor.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._streams[0]):
            copy = tensor.to(self.device, non_blocking=True)
        computing.wait_stream(self._streams[0])
        copy.record_stream(computing)  # its memory is not for the next copy before the computations are through
        return copy

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

    def arriving(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Move batches (by their ``moved(move)``) to the device when all but the last few before are worked off."""
        if not self.gpu:
            yield from batches
            return
        # Most steps wait for nothing on the device: steps would queue there, and batches be held, without end.
        queued: deque[torch.cuda.Event] = deque()
        for batch in batches:
            while len(queued) >= _UNDER_WAY:
                queued.popleft().synchronize()
            yield batch.moved(self.up)
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self.device))
            queued.append(done)


@contextmanager
def two_threads(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """Make a pool for tiles, of two threads with half of torch's threads each; None on a GPU or with one thread.

    Threads that share a tile spin after every layer while they wait, for long where writers compress in between.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield None
        return
    try:
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads // 2,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


_WAITING = 2  # results that may wait to be written; each may be hundreds of MB

BLOCK_WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Threads for writes that need no order: one is what a CPU's network leaves room for, and too few for a GPU's."""


class Writer:
    """Runs writes in threads (one keeps their order) and holds few; an error comes out at the next call or the end."""

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

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error_type is not None)
        if error_type is None:
            while self._waiting:
                self._waiting.popleft().result()


class Buffers:
    """Arrays of tens of MB that are used again: the system would take each back, and clear every page of the next."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, *shape: int) -> Tensor:
        """Lend a float32 tensor on the host, whatever is in it."""
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


WORKERS = min(max(os.cpu_count() or 1, 2), 8)
"""Threads that read tiles and build operators."""

AHEAD = WORKERS + 1
"""Results that may wait for the network."""


def prefetch(tasks: Iterable[Callable[[], T]], ahead: int = AHEAD) -> Iterator[T]:
    """Run tasks in threads, a few ahead of the consumer; yield results, and raise exceptions, in order."""
    with ThreadPoolExecutor(max_workers=min(ahead, WORKERS)) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
