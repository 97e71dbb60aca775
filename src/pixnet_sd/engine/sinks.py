"""What a pass over a slide reads from and writes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.nn.grid import Window

__all__ = ["Block", "BlockSink", "RegionSink", "StoredMap"]

Block = tuple[int, int, int, int]


class BlockSink(Protocol):
    """Where blocks of the gene map, or of its factors, go."""

    def write(self, block: Block, values: NDArray[np.float32]) -> None:
        """Take (channels, rows, columns) of one block; several threads may call, in any order."""

    @property
    def pending(self) -> Sequence[Block]:
        """Blocks (row0, row1, col0, col1), map pixels, not written yet."""


class RegionSink(Protocol):
    """Where the regions' sums go, window by window."""

    def put(
        self,
        window: Window,
        index: NDArray[np.intp],
        sums: NDArray[np.float32],
        weight: NDArray[np.float64],
        complete: NDArray[np.bool_],
    ) -> None:
        """Take a window's share of k regions.

        Parameters
        ----------
        window
            Map pixels; each window is put once.
        index
            The regions, ascending, shape (k,).
        sums
            Share of the sum over each region's pixels, shape (k, genes), or (k, C) where D is asked for; the array is
            used again after the call.
        weight
            Share of the pixels by which a mean divides, shape (k,).
        complete
            Regions of which this is the whole, shape (k,).
        """

    def is_done(self, window: Window) -> bool:
        """Whether the window was put, perhaps by a run that was cut off."""


class StoredMap(Protocol):
    """A gene map, or the feature map that it is made from, that is there already."""

    @property
    def has_features(self) -> bool:
        """Whether it holds D, from which all can be had, or values of the head, from which only regions can."""

    def covers(self, window: Window) -> bool:
        """Whether the window was predicted."""

    def read(self, window: Window) -> NDArray[np.float32]:
        """Values (genes, rows, columns) of a window, or D (C, rows, columns)."""
