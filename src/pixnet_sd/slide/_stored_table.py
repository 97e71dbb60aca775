"""Tables that are on disk and not in memory, and what is asked of tables of either kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd
import zarr

from ._store_parts import elements_on_disk

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["StoredTable", "Table", "obs_column", "obs_names", "tables_of", "var_column", "var_columns_of"]

_BYTES_A_ROW = 200  # a name and some columns


class _Elements(Mapping[str, Any]):
    """Elements of a group, each read when asked for."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group

    def __getitem__(self, key: str) -> Any:
        from anndata.io import read_elem

        return read_elem(self._group[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(list(self._group))


@dataclass(frozen=True)
class StoredTable:
    """A table of a store, of which only what is asked for is read; names of its rows never are.

    Attributes
    ----------
    path
        Its folder, ``{store}/tables/{key}``.
    """

    path: Path

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and genes."""
        x: Any = self._group["X"]
        n_obs, n_vars = x.shape if isinstance(x, zarr.Array) else x.attrs["shape"]
        return int(n_obs), int(n_vars)

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return self.shape[1]

    @cached_property
    def var_names(self) -> pd.Index:
        """Genes."""
        var: Any = self._group["var"]
        return pd.Index(_Elements(var)[var.attrs["_index"]])

    @property
    def var(self) -> Mapping[str, Any]:
        """Columns that describe genes, each read when asked for."""
        group: Any = self._group["var"]
        return _Elements(group)

    @property
    def var_columns(self) -> list[str]:
        """Names of these columns."""
        columns: Any = self._group["var"].attrs["column-order"]
        return list(columns)

    @property
    def uns(self) -> Mapping[str, Any]:
        """Unstructured annotation, each entry read when asked for."""
        uns: Any = self._group.get("uns")
        return {} if uns is None else _Elements(uns)

    @property
    def obs(self) -> Mapping[str, Any]:
        """Columns that describe rows, each read when asked for."""
        group: Any = self._group["obs"]
        return _Elements(group)

    @property
    def obs_columns(self) -> set[str]:
        """Names of these columns."""
        columns: Any = self._group["obs"].attrs["column-order"]
        return set(columns)

    @property
    def X(self) -> Any:
        """Matrix on disk: AnnData's handle of a sparse one, the Zarr array of a dense one."""
        from anndata.io import sparse_dataset

        x: Any = self._group["X"]
        return x if isinstance(x, zarr.Array) else sparse_dataset(x)

    @property
    def n_bytes(self) -> int:
        """Roughly what it takes in memory."""
        x: Any = self._group["X"]
        parts = [x] if isinstance(x, zarr.Array) else [x[name] for name in ("data", "indices", "indptr")]
        return sum(part.nbytes for part in parts) + self.n_obs * _BYTES_A_ROW


Table: TypeAlias = "AnnData | StoredTable"
"""A table in memory, or one that is not."""


def tables_of(sdata: SpatialData) -> dict[str, Table]:
    """Every table of an object: those in memory, and those that only the store behind it has."""
    stored = {key: StoredTable(path) for key, path in elements_on_disk(sdata, "tables", "X").items()}
    return {**sdata.tables, **stored}


def obs_names(table: Table) -> set[str]:
    """Names of the columns that describe rows."""
    return table.obs_columns if isinstance(table, StoredTable) else set(table.obs.columns)


def obs_column(table: Table, name: str) -> Any:
    """One of these columns: a NumPy or pandas array."""
    return table.obs[name] if isinstance(table, StoredTable) else table.obs[name].array


def var_columns_of(table: Table) -> list[str]:
    """Names of the columns that describe genes."""
    return table.var_columns if isinstance(table, StoredTable) else list(table.var.columns)


def var_column(table: Table, name: str) -> Any:
    """One of these columns: a NumPy or pandas array."""
    return table.var[name] if isinstance(table, StoredTable) else table.var[name].array
