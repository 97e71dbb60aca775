"""Memory that the network frees is kept for its next pass, on Linux with a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

__all__ = ["kept_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_KEPT_BYTES, _LARGEST_BYTES = 2**31 - 1, 2**30
_USUAL_BYTES = 2**25  # what glibc's own threshold grows to


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Let freed memory of a run on the CPU be used again, and give it back at the end.

    glibc returns every block of more than 32 MB to the system as soon as it is freed, and the system clears every page
    of the next one. A network's activations are such blocks.

    Parameters
    ----------
    device
        Where the run computes; only a CPU's memory is glibc's.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
