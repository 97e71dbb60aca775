"""Names of bins, cells and spots, made for millions at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["bin_barcodes", "cell_barcodes", "spot_barcodes"]


def bin_barcodes(bin_um: int, row: NDArray[np.int64], col: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """``s_002um_00012_00345-1``, (n,)."""
    return _joined(f"s_{bin_um:03d}um_", _digits(row, 5), "_", _digits(col, 5), "-1")


def cell_barcodes(number: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """``cellid_000000012-1``, (n,)."""
    return _joined("cellid_", _digits(number, 9), "-1")


def spot_barcodes(number: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """Sixteen bases and ``-1``, (n,)."""
    bases = np.frombuffer(b"ACGT", dtype=np.uint8)
    # an odd factor keeps numbers apart and makes neighbours look unlike each other
    mixed = number.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return _joined(bases[(mixed[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)], "-1")


def _digits(number: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Decimal digits as characters, (n, width)."""
    return (number[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + ord("0")).astype(np.uint8)


def _joined(*parts: str | NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Texts that all have, and columns of characters, side by side."""
    n = max(len(part) for part in parts if not isinstance(part, str))
    columns = [
        np.broadcast_to(np.frombuffer(part.encode(), dtype=np.uint8), (n, len(part))) if isinstance(part, str) else part
        for part in parts
    ]
    characters = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return characters.view(f"S{characters.shape[1]}").ravel()
