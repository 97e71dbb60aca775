"""What the loops know of a slide: how to read pixels, and which regions were measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from pixnet_sd.nn.regions import Regions, chunks

__all__ = ["LazyTargets", "MeasuredRegions", "ReadTile", "TrainingSlide"]

ReadTile = Callable[[int, int, int, int], NDArray[np.uint8]]
"""``read(row0, row1, col0, col1)`` in working pixels -> RGB (rows, columns, 3); white outside the slide."""


class LazyTargets(Protocol):
    """Targets (n, M) that are read when asked for, from several threads at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, M)."""

    def __getitem__(self, index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Targets of some regions, ascending, shape (k, M)."""

    def rows(self, index: NDArray[np.intp]) -> Any:
        """The same as SciPy's compressed rows."""

    def mean(self, axis: int) -> NDArray[Any]:
        """Mean over the regions (`axis` 0), shape (M,)."""

    def subset(self, index: NDArray[np.intp]) -> Self:
        """Targets of some regions, not read yet."""


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
    values: NDArray[np.float32] | LazyTargets

    def subset(self, index: NDArray[np.intp]) -> MeasuredRegions:
        """The regions picked by an index."""
        values = self.values[index] if isinstance(self.values, np.ndarray) else self.values.subset(index)
        return MeasuredRegions(self.size_name, self.regions.subset(index), values)

    @cached_property
    def cover(self) -> NDArray[np.float64]:
        """Box around all regions, and the largest side of any: x0, y0, x1, y1, side."""
        boxes = [some.bounds for _, some in chunks(self.regions)]
        low, high = np.array([b[:, :2].min(0) for b in boxes]), np.array([b[:, 2:].max(0) for b in boxes])
        side = max(float((b[:, 2:] - b[:, :2]).max()) for b in boxes)
        return np.array([*low.min(0), *high.max(0), side])


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
    depth
        Counts per tissue relative to the mean of all training slides; 1 where targets are log-normalised.
    """

    name: str
    read: ReadTile
    height: int
    width: int
    measured: tuple[MeasuredRegions, ...]
    depth: float = 1.0

    def subset(self, indices: tuple[NDArray[np.intp], ...]) -> TrainingSlide:
        """The same slide with only some regions of each size; sizes left empty are dropped."""
        kept = tuple(m.subset(i) for m, i in zip(self.measured, indices, strict=True) if len(i))
        return replace(self, measured=kept)

    @property
    def cover(self) -> NDArray[np.float64]:
        """Box around the regions of all sizes, and the largest side of any: x0, y0, x1, y1, side."""
        each = np.array([m.cover for m in self.measured])
        return cast(NDArray[np.float64], np.concatenate([each[:, :2].min(0), each[:, 2:].max(0)]))
