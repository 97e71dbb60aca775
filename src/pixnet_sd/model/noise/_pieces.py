"""Working through many values in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PIECE = 2**20
"""Values of a piece: more do not fit into a processor's cache, and with fewer the calls wait for other threads."""


def pieces(values: Tensor, n_values: int = _PIECE) -> Iterator[slice]:
    """Cut rows, (n, M), into slices of at least one row and about so many values; a GPU takes all at once."""
    n, width = values.shape
    step = max(n if values.is_cuda else n_values // max(width, 1), 1)
    yield from (slice(start, start + step) for start in range(0, n, step))
