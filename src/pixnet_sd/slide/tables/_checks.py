"""Whether the values of a table are raw counts, told in the one pass that also sums them.

Told by their structure, not by their range. The counts of a region are whole multiples of one number, 1. They still are
after every region was given a factor of its own, as normalising does and as destriping does; the factors of the one
undo the totals, those of the other lie about 1 and leave the totals to vary. Logarithms and square roots of counts have
the structure once they are undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._util import warn
from pixnet_sd.errors import DataError
from pixnet_sd.slide.elements import sample_positions

from ._counts import Counts, Place

# whole numbers; whole numbers with a common divisor; counts about the size they had, not whole any more; scaled counts
# whose totals are gone; logarithms or square roots of any of these; anything else
Kind = Literal["counts", "multiples", "corrected", "normalised", "logged", "rooted", "other"]
Row = NDArray[np.float64]  # values of one row that are not zero

_ROWS_A_BLOCK, _ROWS, _VALUES = 256, 1024, 2**20  # that are looked into, where values are not whole
_MANY = 200  # values whose common divisor says something
_MOSTLY = 0.9
_CONSTANT, _PER_UNIT = 1e-3, 1e-3  # relative spread of sums made equal; how far from whole rounding leaves multiples
_FINEST = 200  # of the smallest value of a row, what its unit may be
_WIDEST = 100  # times it, what values take part in finding the unit
_HIGHEST = 1e4  # multiples of the unit in which whole numbers can be told
_ROUNDING = 1e-5  # of a value that was a logarithm in 32 bits
_LEAST, _MOST = 0.5, 2.0  # factors of a correction
_SLOPE = -0.6  # of log factor on log total, and their correlation: 0 of corrections, -1 of normalising
_NEARLY_ONE = 0.8  # share of rows of which the same factor is found; rows may have a divisor of their own
_LARGEST_LOG = 25.0
_NEAR = 0.18  # median distance from whole numbers of sums of a few corrected counts; 0.25 of any number
_FEW = 3

_UNDONE: tuple[tuple[Kind, Callable[[Row], Row]], ...] = (
    ("logged", np.expm1),
    ("logged", lambda x: np.expm1(x * np.log(2))),
    ("logged", lambda x: np.expm1(x * np.log(10))),
    ("rooted", np.square),
)


@dataclass
class Look:
    """What the values of a table look like, block by block."""

    largest: float = 0.0
    whole: bool = True  # all values are whole numbers
    n_values: int = 0  # that are not zero
    divisor: int = 0  # the greatest that whole values have in common; 0 before any
    rows: list[Row] = field(default_factory=list)  # a sample of those in which not all are whole

    def add(self, block: sparse.csr_matrix) -> None:
        """Look at a block of rows."""
        values = block.data
        self.largest = max(self.largest, float(values.max(initial=0)))
        self.n_values += int(np.count_nonzero(values))
        broken = np.flatnonzero(values != np.rint(values))
        if not len(broken):
            if self.whole and self.divisor != 1:
                self.divisor = int(np.gcd(self.divisor, np.gcd.reduce(values.astype(np.int64), initial=0)))
            return
        self.whole = False
        if len(self.rows) < _ROWS and sum(map(len, self.rows)) < _VALUES:
            rows = np.unique(np.searchsorted(block.indptr, broken, side="right") - 1)
            for row in rows[sample_positions(len(rows), _ROWS_A_BLOCK)]:
                of_row = np.asarray(values[block.indptr[row] : block.indptr[row + 1]], np.float64)
                self.rows.append(of_row[of_row > 0])

    @property
    def kind(self) -> Kind:
        """Kind of the values."""
        if self.whole:
            return "multiples" if self.divisor > 1 and self.n_values > _MANY else "counts"
        units = _units(self.rows)
        if _are_known(units):
            unit, total = units[~np.isnan(units[:, 0])].T
            return "corrected" if _keep_totals(unit, total) and not _sums_are_equal(self.rows) else "normalised"
        for kind, undo in _UNDONE:
            if self.largest < _LARGEST_LOG or kind == "rooted":
                before = [undo(row) for row in self.rows]
                if _sums_are_equal(before) or _are_known(_units(before)) or _are_whole(before):
                    return kind
        if _sums_are_equal(self.rows):
            return "normalised"
        return "corrected" if _are_corrected(self.rows) else "other"


def _sums_are_equal(rows: list[Row]) -> bool:
    sums = np.array([row.sum() for row in rows])
    return len(sums) >= _FEW and float(sums.std()) < _CONSTANT * float(sums.mean())


def _are_whole(rows: list[Row]) -> bool:
    values = np.concatenate(rows)
    off = np.abs(values - np.rint(values)) - _ROUNDING * values
    return len(rows) >= _FEW and bool(((off < _PER_UNIT) & (values > _LEAST) & (values < _HIGHEST)).all())


def _units(rows: list[Row]) -> NDArray[np.float64]:
    """List the unit, or NaN, and the total in units of each row that has more than one value, shape (n, 2)."""
    varied = [row for row in rows if row.max() > row.min() * (1 + _PER_UNIT)]
    return np.array([(unit := _unit(row), row.sum() / unit) for row in varied]).reshape(-1, 2)


def _are_known(units: NDArray[np.float64]) -> bool:
    """Tell whether most rows' values are whole multiples of one number."""
    return len(units) >= _FEW and float(np.mean(~np.isnan(units[:, 0]))) >= _MOSTLY


def _unit(row: Row) -> float:
    """Find the greatest number of which all values are whole multiples, as Euclid did; NaN if there is none."""
    least = float(row.min())
    finest, unit, seen = least / _FINEST, least, np.unique(row[row < _WIDEST * least])
    for n, value in enumerate(seen, start=1):
        a, b = float(value), unit
        while b > finest / 5:
            a, b = b, abs(a - b * round(a / b))
        unit = a
        if unit < finest:
            return np.nan
        times = np.rint(seen[:n] / unit)  # rounding would add up from value to value
        unit = float(seen[:n] @ times / (times @ times))
    multiples = row[row < _HIGHEST * unit] / unit
    near = np.abs(multiples - np.rint(multiples)) < 10 * _PER_UNIT
    return unit if near.mean() >= _MOSTLY else np.nan


def _keep_totals(factor: NDArray[Any], total: NDArray[Any]) -> bool:
    """Tell whether factors are about 1, differ, and do not undo the totals."""
    if not _LEAST <= np.median(factor) <= _MOST:
        return False
    x, y = (np.log(each) - np.log(each).mean() for each in (total, factor))
    if np.mean(np.abs(y - np.median(y)) < _CONSTANT) > _NEARLY_ONE:  # one factor for all
        return bool(np.abs(np.median(factor) - 1) < _CONSTANT)
    return not (x @ y < _SLOPE * (x @ x) and x @ y < _SLOPE * np.sqrt((x @ x) * (y @ y)))


def _are_corrected(rows: list[Row]) -> bool:
    """Tell whether values are about whole, as sums of corrected counts are, few below half, and totals vary."""
    values = np.concatenate(rows)
    low = values[(values > _LEAST) & (values < 3 + _LEAST)]
    if len(low) < 10 * _FEW or (values <= _LEAST).mean() > 1 - _MOSTLY:
        return False
    least = np.array([row.min() for row in rows])
    total = np.array([row.sum() for row in rows]) / least
    return bool(np.median(np.abs(low - np.rint(low))) < _NEAR) and _keep_totals(least, total)


_EXACT, _EXACT_HALF = 2**24, 2**11  # whole numbers up to which 32 bits, and 16, hold each
_LOG_MAX = 20.0  # log1p of anything countable stays below
_HALF = "16 bits do not hold counts above 2,048 exactly: read the table again with X in 32 bits"
_FAULTS: tuple[tuple[Callable[[NDArray[Any]], NDArray[np.bool_]], str, str], ...] = (
    (lambda x: ~np.isfinite(x), "NaN or infinite", "Remove or recompute them"),
    (lambda x: x < 0, "negative", "Scaled values will not do: give raw counts"),
    (lambda x: x > 2**31, "absurdly large", "No region has more than 2³¹ counts of a gene: remove or recompute them"),
    (lambda x: x > _EXACT_HALF, "inexact", _HALF),  # of 16 bits alone
)
_RAW = "Put raw counts there, for instance table.X = table.layers['counts'] or table.raw.X."
_NAMES: dict[Kind, str] = {
    "normalised": "counts that were scaled or normalised",
    "logged": "logarithms",
    "rooted": "square roots",
    "other": "values that are neither whole nor about whole",
}


def checked_blocks(
    counts: Counts, var_names: pd.Index, what: str, look: Look | None = None
) -> Iterator[tuple[Place, sparse.csr_matrix, NDArray[np.float64]]]:
    """Read blocks of rows and check every value; yield place, counts, and each row's sum over all genes."""
    for place, block in counts.blocks():
        for is_bad, fault, remedy in _FAULTS if counts.is_half else _FAULTS[:-1]:
            bad = np.flatnonzero(is_bad(block.data))
            if len(bad):
                row = counts.rows[place][np.searchsorted(block.indptr, bad[0], side="right") - 1]
                raise DataError(
                    f"{what}: X holds {fault} values ({len(bad)} in {block.shape[0]} rows, first "
                    f"{block.data[bad[0]]:g} for gene {var_names[block.indices[bad[0]]]!r} in row {row}). {remedy}."
                )
        if look is not None:
            look.add(block)
        # SciPy's own sums stay in the 32 bits of the values, whatever dtype is asked for
        row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        yield place, block, np.bincount(row, block.data, block.shape[0]).astype(np.float64)


def checked_totals(counts: Counts, var_names: pd.Index, what: str) -> NDArray[np.float64]:
    """Sum each region over all genes, shape (n,), and check the counts."""
    look, total = Look(), np.zeros(len(counts))
    for place, _, sums in checked_blocks(counts, var_names, what, look):
        total[place] = sums
    check_kind(look.kind, look.largest, what)
    return total


def check_kind(kind: Kind, largest: float, what: str, objective: str = "mse_pcc") -> None:
    """Refuse, or warn of, values that are not learnt from; a factor of each region does no harm to ``"mse_pcc"``."""
    if largest > _EXACT:
        warn(f"{what}: X has values up to {largest:.0f}; above {_EXACT} they are rounded to 32 bits.")
    if objective == "mse_pcc":
        if kind in ("logged", "rooted"):
            warn(f"{what}: X holds {_NAMES[kind]} already, and they will be normalised and logged again. {_RAW}")
        elif kind == "other" and largest < _LOG_MAX:
            warn(f"{what}: X holds {_NAMES[kind]}, none above {_LOG_MAX:.0f}. If they are logarithms: {_RAW.lower()}")
    elif kind in _NAMES:
        raise DataError(
            f"{what}: X holds {_NAMES[kind]}, and objective={objective!r} is a likelihood of raw counts. {_RAW} "
            "Corrected counts can be rounded, table.X = np.rint(table.X); objective='mse_pcc' does without."
        )
    elif kind == "corrected":
        warn(f"{what}: X holds counts that are not whole, as destriping leaves them, and they are taken as they are.")
    elif kind == "multiples":
        warn(f"{what}: X holds whole numbers with a common divisor, so they may be counts times a factor. {_RAW}")
