"""Sums over regions, gathered window by window of the map: the part that needs no disk.

A region that lies in one window is put once, whole. One that lies in several is put in shares, and its sum is taken in
the order of the windows, in double precision: so it does not matter in which order, or in how many runs, they came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from pixnet_sd._errors import DataError, StoreError

from ._disk import size_text
from ._memory import available_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pixnet_sd.nn.grid import Window

    from ._window_log import Corners

__all__ = [
    "Describe",
    "Express",
    "Expressed",
    "MemoryRows",
    "RowInfo",
    "Rows",
    "add_in_order",
    "check_put",
    "expression",
]


@dataclass(frozen=True)
class RowInfo:
    """What a table and a shapes element say about some regions, apart from their expression.

    Attributes
    ----------
    ids
        (m,) integers or text.
    centres_px
        (m, 2) x, y in image scale-0 pixels.
    obs
        Column name → (m,) numbers.
    """

    ids: Any
    centres_px: NDArray[np.float64]
    obs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def subset(self, keep: NDArray[np.bool_]) -> RowInfo:
        """The regions where ``keep`` (m,) is true."""
        obs = {name: np.asarray(column)[keep] for name, column in self.obs.items()}
        return RowInfo(np.asarray(self.ids)[keep], self.centres_px[keep], obs)

    @staticmethod
    def joined(parts: Sequence[RowInfo]) -> RowInfo:
        """Several groups of regions as one."""
        if len(parts) == 1:
            return parts[0]
        obs = {name: np.concatenate([np.asarray(part.obs[name]) for part in parts]) for name in parts[0].obs}
        ids = np.concatenate([np.asarray(part.ids) for part in parts])
        return RowInfo(ids, np.concatenate([part.centres_px for part in parts]), obs)


Describe = Callable[[int, int, "NDArray[np.float64] | None"], RowInfo]
"""``describe(start, stop, weight)``: the regions ``start`` … ``stop − 1``, and their weights where these are known."""


class Expressed(NamedTuple):
    """What a table says of some regions.

    Attributes
    ----------
    x
        (m, genes) values.
    layers
        Name → (m, genes) other values.
    obs
        Name → (m,) other columns.
    """

    x: NDArray[np.float32]
    layers: Mapping[str, NDArray[np.float32]] = {}
    obs: Mapping[str, NDArray[Any]] = {}

    @staticmethod
    def joined(parts: Sequence[Expressed]) -> Expressed:
        """Several groups of regions as one."""
        if len(parts) == 1:
            return parts[0]
        layers, obs = (
            {name: np.concatenate([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}
            for kind in ("layers", "obs")
        )
        return Expressed(np.concatenate([part.x for part in parts]), layers, obs)


Express = Callable[["NDArray[np.float32]", "NDArray[np.float64]"], Expressed]
"""``express(sums, weight)``: values of a table from the sums (m, columns) and weights (m,) of regions that have weight;
may write over the sums."""


class Rows(Protocol):
    """Sums over regions, put in shares and read back whole."""

    n_rows: int
    n_columns: int

    def put(
        self,
        window: Window,
        index: NDArray[np.intp],
        sums: NDArray[np.float32],
        weight: NDArray[np.float64],
        complete: NDArray[np.bool_],
    ) -> None:
        """Take a window's share of the regions that it touches; nothing happens for a window that is done.

        Parameters
        ----------
        window
            Of the map.
        index
            (k,) regions, ascending.
        sums
            (k, columns) share of the sums over the regions' pixels.
        weight
            (k,) share of the pixels by which a mean divides.
        complete
            (k,) whether the region lies wholly in this window.
        """

    def is_done(self, window: Window) -> bool:
        """Whether the window was put."""

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Sums (m, columns) and weights (m,) of the regions ``start`` … ``stop − 1``; zero where nothing was put."""

    def keep(self) -> NDArray[np.bool_]:
        """(n,) which regions have any weight: the others hold no pixel of the slide."""


class MemoryRows:
    """Rows in memory, for objects that are not backed.

    Parameters
    ----------
    n_rows, n_columns
        Regions, and what is summed up of each.
    n_values
        Values of the table to be made of them, per region.

    Raises
    ------
    StoreError
        When they would take more than half of the free memory.
    """

    def __init__(self, n_rows: int, n_columns: int, n_values: int) -> None:
        needed, available = n_rows * (4 * (n_columns + n_values) + 16), available_memory()
        if needed > available / 2:
            raise StoreError(
                f"The table of {n_rows} regions and {n_values} values takes {size_text(needed)} while it is made, "
                f"more than half of the {size_text(available)} of memory that are free. Write the object to disk "
                "first: `sdata.write('/some/folder.zarr')`; the table is then streamed into that store."
            )
        self.n_rows, self.n_columns = n_rows, n_columns
        self._sums = np.zeros((n_rows, n_columns), np.float32)
        self._weight = np.zeros(n_rows)
        self._done: set[Corners] = set()
        self._shares: dict[Corners, tuple[NDArray[Any], ...]] = {}
        self._settled = True

    def put(
        self,
        window: Window,
        index: NDArray[np.intp],
        sums: NDArray[np.float32],
        weight: NDArray[np.float64],
        complete: NDArray[np.bool_],
    ) -> None:
        """As `Rows.put`."""
        if self.is_done(window):
            return
        check_put(self, window, index, sums, weight, complete)
        self._sums[index[complete]], self._weight[index[complete]] = sums[complete], weight[complete]
        self._shares[_corners(window)] = tuple(part[~complete] for part in (index, sums, weight))
        self._done.add(_corners(window))
        self._settled = False

    def is_done(self, window: Window) -> bool:
        """As `Rows.is_done`."""
        return _corners(window) in self._done

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """As `Rows.rows`; views."""
        self._settle()
        return self._sums[start:stop], self._weight[start:stop]

    def keep(self) -> NDArray[np.bool_]:
        """As `Rows.keep`."""
        self._settle()
        return self._weight > 0

    def _settle(self) -> None:
        """Add up the shares, in the order of the windows."""
        if self._settled:
            return
        parts = [self._shares[window] for window in sorted(self._shares)]
        found = np.unique(np.concatenate([index for index, _, _ in parts]))
        sums, weights = np.zeros((len(found), self.n_columns)), np.zeros(len(found))
        for index, share, weight in parts:
            at = np.searchsorted(found, index)
            sums[at] += share
            weights[at] += weight
        self._sums[found], self._weight[found] = sums, weights
        self._settled = True


def _corners(window: Window) -> Corners:
    row0, row1, col0, col1 = window
    return row0, row1, col0, col1


def check_put(
    rows: Rows,
    window: Window,
    index: NDArray[np.intp],
    sums: NDArray[np.float32],
    weight: NDArray[np.float64],
    complete: NDArray[np.bool_],
) -> None:
    """Refuse shares that do not fit the rows, or that are not finite.

    Raises
    ------
    DataError
        Saying which window.
    """
    where = f"window {tuple(window)}"
    fits = sums.shape == (len(index), rows.n_columns) and len(weight) == len(complete) == len(index)
    if not fits or (len(index) and not 0 <= index[0] <= index[-1] < rows.n_rows):
        raise DataError(
            f"The shares of {where}, sums of shape {sums.shape} for {len(index)} regions, do not fit "
            f"{rows.n_rows} regions of {rows.n_columns} columns."
        )
    if sums.size and not (np.isfinite(sums.min()) and np.isfinite(sums.max())):
        raise DataError(f"The prediction of regions in {where} is not finite (NaN or infinity): the model is broken.")


def add_in_order(total: NDArray[np.float64], row: NDArray[np.intp], shares: NDArray[Any]) -> None:
    """``total[row] += shares``, one after the other where a row comes again; ``row`` ascends."""
    first = np.flatnonzero(np.diff(row, prepend=-1))
    count = np.diff(first, append=len(row))
    for k in range(int(count.max(initial=0))):
        again = first[count > k] + k
        total[row[again]] += shares[again]


def expression(
    sums: NDArray[np.float32], weight: NDArray[np.float64], aggregation: Literal["mean", "sum"]
) -> Expressed:
    """Values of a table from the sums of genes over regions that have weight, (m, genes)."""
    if aggregation == "sum":
        return Expressed(sums)
    weight = weight.astype(np.float32)  # single precision, as the sums: four times as fast
    return Expressed(np.divide(sums, weight[:, None], out=sums if sums.flags.owndata else None))
