"""What the values of a matrix are: counts, counts that were corrected, normalised values, logarithms.

Told by their structure, not by their range. The counts of a region are whole multiples of one number, 1. They still are
after every region was given a factor of its own, as normalising does and as destriping does; the factors of the one
undo the totals, those of the other lie about 1 and leave the totals to vary. Logarithms and square roots of counts have
the structure once they are undone.

A look at some values of a table: whether they are counts.

Which features of a table are genes: antibodies, guides and controls are measured too, and are not expression.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError
from pixnet_sd.slide.elements import StoredTable, var_column, var_columns_of

if TYPE_CHECKING:
    from pixnet_sd.slide.elements import Table

__all__ = ["Genes", "Kind", "Look", "genes_of", "look_like_counts"]

Kind = Literal["counts", "multiples", "corrected", "normalised", "logged", "rooted", "other"]
"""Whole numbers; whole numbers with a common divisor; counts about the size they had, not whole any more; scaled counts
whose totals are gone; logarithms or square roots of any of these; anything else."""

Row = NDArray[np.float64]

_ROWS_A_BLOCK, _ROWS, _VALUES = 256, 1024, 2**20  # that are looked into, where values are not whole
_MANY = 200  # values whose common divisor says something
_MOSTLY = 0.9
_CONSTANT = 1e-3  # relative spread of sums that were made equal
_PER_UNIT = 1e-3  # how far from whole multiples rounding leaves what was whole
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


@dataclass
class Look:
    """What the values seen so far look like.

    Attributes
    ----------
    largest
        The largest of them.
    whole
        Whether all are whole numbers.
    n_values
        How many are not zero.
    divisor
        The greatest that whole ones have in common; 0 before any.
    rows
        Values that are not zero of some rows in which not all are whole.
    """

    largest: float = 0.0
    whole: bool = True
    n_values: int = 0
    divisor: int = 0
    rows: list[Row] = field(default_factory=list)

    def at(self, block: sparse.csr_matrix) -> None:
        """Take some rows in."""
        values = block.data
        self.largest = max(self.largest, float(values.max(initial=0)))
        self.n_values += int(np.count_nonzero(values))
        broken = values != np.rint(values)
        if broken.any():
            self.whole = False
            self._keep(block, broken)
        elif self.whole and self.divisor != 1:
            self.divisor = int(np.gcd(self.divisor, np.gcd.reduce(values.astype(np.int64), initial=0)))

    def _keep(self, block: sparse.csr_matrix, broken: NDArray[np.bool_]) -> None:
        if len(self.rows) >= _ROWS or sum(map(len, self.rows)) >= _VALUES:
            return
        of_row = np.searchsorted(block.indptr, np.flatnonzero(broken), side="right") - 1
        rows = np.unique(of_row)
        for row in rows[np.linspace(0, len(rows) - 1, min(_ROWS_A_BLOCK, len(rows))).astype(np.intp)]:
            values = np.asarray(block.data[block.indptr[row] : block.indptr[row + 1]], np.float64)
            self.rows.append(values[values > 0])

    @property
    def kind(self) -> Kind:
        """What they are."""
        if self.whole:
            return "multiples" if self.divisor > 1 and self.n_values > _MANY else "counts"
        if _in_units(self.rows):
            return "normalised" if _sums_are_equal(self.rows) else _of_factors(self.rows)
        undone: tuple[tuple[Kind, Callable[[Row], Row]], ...] = (
            ("logged", np.expm1),
            ("logged", lambda x: np.expm1(x * np.log(2))),
            ("logged", lambda x: np.expm1(x * np.log(10))),
            ("rooted", np.square),
        )
        for kind, undo in undone:
            if self.largest < _LARGEST_LOG or kind == "rooted":
                before = [undo(row) for row in self.rows]
                if _sums_are_equal(before) or _in_units(before) or _are_whole(before):
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


def _in_units(rows: list[Row]) -> bool:
    """Whether each row's values are whole multiples of one number; of rows that have more than one value."""
    units = [_unit(row) for row in rows if row.max() > row.min() * (1 + _PER_UNIT)]
    return len(units) >= _FEW and float(np.mean(~np.isnan(units))) >= _MOSTLY


def _unit(row: Row) -> float:
    """The greatest number of which all values are whole multiples, found as Euclid did; NaN if there is none."""
    least = float(row.min())
    finest, unit, seen = least / _FINEST, least, np.unique(row[row < _WIDEST * least])
    for n, value in enumerate(seen, start=1):
        unit = _common(float(value), unit, finest / 5)
        if unit < finest:
            return np.nan
        times = np.rint(seen[:n] / unit)  # rounding would add up from value to value
        unit = float(seen[:n] @ times / (times @ times))
    multiples = row[row < _HIGHEST * unit] / unit
    near = np.abs(multiples - np.rint(multiples)) < 10 * _PER_UNIT
    return unit if near.mean() >= _MOSTLY else np.nan


def _common(a: float, b: float, off: float) -> float:
    while b > off:
        a, b = b, abs(a - b * round(a / b))
    return a


def _of_factors(rows: list[Row]) -> Kind:
    """Whether factors of rows are those of a correction."""
    several = [row for row in rows if row.max() > row.min() * (1 + _PER_UNIT)]
    known = [(unit, row.sum() / unit) for row in several if not np.isnan(unit := _unit(row))]
    return "corrected" if _keep_totals(*np.array(known).T) else "normalised"


def _keep_totals(factor: NDArray[Any], total: NDArray[Any]) -> bool:
    """Whether factors are about 1, differ, and do not undo the totals."""
    if not _LEAST <= np.median(factor) <= _MOST:
        return False
    x, y = (np.log(each) - np.log(each).mean() for each in (total, factor))
    if np.mean(np.abs(y - np.median(y)) < _CONSTANT) > _NEARLY_ONE:  # one factor for all
        return bool(np.abs(np.median(factor) - 1) < _CONSTANT)
    return not (x @ y < _SLOPE * (x @ x) and x @ y < _SLOPE * np.sqrt((x @ x) * (y @ y)))


def _are_corrected(rows: list[Row]) -> bool:
    """Whether they are about whole, as sums of corrected counts are, few of them below half, and totals vary."""
    values = np.concatenate(rows)
    low = values[(values > _LEAST) & (values < 3 + _LEAST)]
    if len(low) < 10 * _FEW or (values <= _LEAST).mean() > 1 - _MOSTLY:
        return False
    least = np.array([row.min() for row in rows])
    total = np.array([row.sum() for row in rows]) / least
    return bool(np.median(np.abs(low - np.rint(low))) < _NEAR) and _keep_totals(least, total)


_VALUES_COUNT_LOOK = 20_000
_ROWS_COUNT_LOOK = 100


def look_like_counts(table: Table) -> bool:
    """Whether a sample of X is whole, not negative, and not 0 all over."""
    if not isinstance(table, StoredTable) and table.X is None:
        return False
    values = _sample(table)
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values) or not np.isfinite(values).all():
        return False
    return bool(len(values) and (values >= 0).all() and values.any() and (values == np.rint(values)).all())


def _sample(table: Table) -> NDArray[Any]:
    """Stored values of a table, some from its start, middle and end."""
    if isinstance(table, StoredTable):
        x: Any = table._group["X"]
        x = x if isinstance(x, zarr.Array) else x["data"]
    else:
        x = table.X.data if sparse.issparse(table.X) else table.X
    step = _VALUES_COUNT_LOOK // 3 if x.ndim == 1 else _ROWS_COUNT_LOOK // 3
    starts = sorted({0, max(0, (x.shape[0] - step) // 2), max(0, x.shape[0] - step)})
    parts = [x[start : start + step] for start in starts]
    return np.concatenate([np.asarray(part.compute() if hasattr(part, "compute") else part).ravel() for part in parts])


_COLUMNS = ("feature_types", "feature_type")
_EXPRESSION = {"gene expression", "gene", "genes", "rna", "mrna", "gex", "transcript", "expression"}
_CONTROL = re.compile(
    r"(neg(ative)?[ _-]?(control|prb|ctrl)?([ _-]?(probe|codeword))?|blank|system[ _-]?control|false[ _-]?code"
    r"|(unassigned|deprecated)[ _-]?codeword)[ _-]?\d+",
    re.IGNORECASE,
)
"""Names of controls of Xenium, CosMx and MERSCOPE: `NegControlProbe_00042`, `BLANK_0100`, `NegPrb3`, `Negative12`."""


@dataclass(frozen=True, eq=False)
class Genes:
    """Features of a table that are genes.

    Attributes
    ----------
    names
        Their names, shape (G,).
    columns
        Their columns in X, ascending, shape (G,); None when all features are genes.
    others
        Names of the other features, and what each is.
    """

    names: pd.Index
    columns: NDArray[np.intp] | None
    others: Mapping[str, str]


def genes_of(table: Table, what: str) -> Genes:
    """Genes of a table: rows of ``var`` whose ``feature_types`` says so, or, without that column, all but controls.

    How many others there are, and of which type, is said in one line.

    Parameters
    ----------
    table
        In memory or on disk.
    what
        Name of the table, for messages.

    Raises
    ------
    DataError
        If no feature is a gene, or a gene's name occurs twice.
    """
    types = _types(table)
    is_gene = np.asarray(types.str.lower().str.replace("_", " ").isin(_EXPRESSION))
    counted = Counter(types[~is_gene])
    listed = ", ".join(f"{n} {kind!r}" for kind, n in counted.most_common())
    if not is_gene.any():
        raise DataError(
            f"{what}: none of its {len(types)} features is a gene, by var['feature_types']: {listed}. Genes are of the "
            "type 'Gene Expression' there: correct the column, or delete it when all features are genes."
        )
    names = pd.Index(types.index[is_gene])
    _check_names(names, what)
    if not counted:
        return Genes(names, None, {})
    logger.info("%s: %d of %d features are not genes and are left out: %s.", what, *_numbers(is_gene), listed)
    others = {str(name): kind for name, kind in types[~is_gene].items()}
    return Genes(names, np.flatnonzero(is_gene), others)


def _numbers(is_gene: NDArray[np.bool_]) -> tuple[int, int]:
    return int((~is_gene).sum()), len(is_gene)


def _types(table: Table) -> pd.Series:
    """Type of each feature, by name."""
    column = next((name for name in var_columns_of(table) if _plain(name) in _COLUMNS), None)
    names = pd.Index(table.var_names)
    if column is None:
        controls = pd.Series(names.astype(str)).str.fullmatch(_CONTROL).to_numpy()
        return pd.Series(np.where(controls, "control by its name", "Gene Expression"), index=names)
    given: Any = pd.Series(np.asarray(var_column(table, column), dtype=object), index=names)
    return given.where(given.notna(), "of no type").astype(str).str.strip()


def _plain(column: str) -> str:
    return re.sub(r"[^a-z]+", "_", str(column).lower())


def _check_names(names: pd.Index, what: str) -> None:
    twice = names[names.duplicated()].unique()
    if len(twice):
        first = ", ".join(map(repr, twice[:5]))
        raise DataError(
            f"{what}: {len(twice)} gene names occur more than once (first: {first}), and genes are matched by name. "
            "Call table.var_names_make_unique() first."
        )
