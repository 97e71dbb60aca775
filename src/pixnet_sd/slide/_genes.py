"""Which features of a table are genes: antibodies, guides and controls are measured too, and are not expression."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger

from ._stored_table import var_column, var_columns_of

if TYPE_CHECKING:
    from ._stored_table import Table

__all__ = ["Genes", "genes_of"]

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
