"""Groups of neighbouring points."""

from __future__ import annotations

import numpy as np

from ._regions import Float, Int

_BITS = 16  # of each coordinate


def neighbour_groups(centre_xy: Float, amount: Float, least: float) -> Int:
    """Number n points so that neighbours of about `least` together share a number: (n, 2), (n,) -> (n,), 0, 1, ...

    Points are cut into pieces along a Z-order curve (Morton, 1966), which on a lattice are squares and halves of
    squares. Those of `least` or more that follow each other are alone.
    """
    order = np.argsort(_along_curve(centre_xy), kind="stable")
    ordered = np.asarray(amount, np.float64)[order]
    piece = np.empty(len(order), np.int64)
    piece[order] = (np.cumsum(ordered) - ordered / 2) // least
    return np.unique(piece, return_inverse=True)[1]


def _along_curve(centre_xy: Float) -> Int:
    """Interleave the bits of coordinates, (n, 2) -> (n,)."""
    low = centre_xy.min(axis=0, initial=np.inf)
    side = (centre_xy - low).max(initial=0.0) or 1.0
    places = ((centre_xy - low) / side * (2**_BITS - 1)).astype(np.int64)
    code = np.zeros(len(places), np.int64)
    for bit in range(_BITS):
        for axis in range(2):
            code |= ((places[:, axis] >> bit) & 1) << (2 * bit + axis)
    return code
