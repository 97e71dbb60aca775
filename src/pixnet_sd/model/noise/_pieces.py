"""Working through many values in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PIECE = 2**20  # values: few enough for a cache, as many as keep calls rare, of which each waits for other threads


def cached_rows(values: Tensor) -> Iterator[slice]:
    """Cut rows, (n, M), into pieces that stay in a processor's cache; a GPU takes all at once."""
    n, width = values.shape
    step = n if values.is_cuda else _PIECE // max(width, 1)
    step = max(step, 1)
    yield from (slice(start, start + step) for start in range(0, n, step))
