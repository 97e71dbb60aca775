"""What the loops know of a slide: how to read pixels, and which regions were measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.nn.regions import Regions

__all__ = ["MeasuredRegions", "ReadTile", "TrainingSlide"]

ReadTile = Callable[[int, int, int, int], NDArray[np.uint8]]
"""``read(row0, row1, col0, col1)`` in working pixels -> RGB (rows, columns, 3); white outside the slide."""


@dataclass(frozen=True)
class MeasuredRegions:
    """Regions of one size with their targets.

    Attributes
    ----------
    size_name
        What they are called in messages, e.g. the table's name.
    regions
        In working pixels, n of them.
    values
        Targets, shape (n, M), float32.
    """

    size_name: str
    regions: Regions
    values: NDArray[np.float32]

    def subset(self, index: NDArray[np.intp]) -> MeasuredRegions:
        """The regions picked by an index."""
        return MeasuredRegions(self.size_name, self.regions.subset(index), self.values[index])


@dataclass(frozen=True)
class TrainingSlide:
    """A slide to train or validate on.

    Attributes
    ----------
    name
        Its name.
    read
        Tile reader.
    height, width
        Size, working pixels.
    measured
        Its measured regions, one entry a size.
    """

    name: str
    read: ReadTile
    height: int
    width: int
    measured: tuple[MeasuredRegions, ...]

    def subset(self, indices: tuple[NDArray[np.intp], ...]) -> TrainingSlide:
        """The same slide with only some regions of each size; sizes left empty are dropped."""
        kept = tuple(m.subset(i) for m, i in zip(self.measured, indices, strict=True) if len(i))
        return TrainingSlide(self.name, self.read, self.height, self.width, kept)
