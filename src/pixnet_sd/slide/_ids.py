"""Names of regions: what a table can hold, each once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from pixnet_sd._errors import DataError

__all__ = ["are_ascending", "check_instances", "check_unique", "plain_ids"]

_CHUNK = 2**20
_NAMES = {
    "floating": "numbers with a fraction, or missing",
    "mixed-integer": "numbers and text mixed, or missing",
    "mixed-integer-float": "numbers with and without a fraction",
    "mixed": "of several kinds, or missing",
    "boolean": "True and False",
}
"""What `pandas.api.types.infer_dtype` calls them; others are said as they are called."""


def are_ascending(ids: pd.Index) -> bool:
    """Whether these are ascending integers: so bins are numbered, and looking for doublets costs more than they do."""
    values = ids.to_numpy()
    return bool(np.issubdtype(values.dtype, np.integer) and (values[1:] > values[:-1]).all())


def plain_ids(ids: pd.Index, what: str, element_key: str) -> pd.Index:
    """Ids of an element as a table can hold them: whole numbers or text, each once, the index itself without a name.

    Parameters
    ----------
    ids
        As the element has them.
    what
        Kind of the element, for messages.
    element_key
        Its name.

    Raises
    ------
    DataError
        They are anything else, or not unique. Told here, before a network has run for them.
    """
    if isinstance(ids, pd.CategoricalIndex):
        ids = ids.astype(ids.categories.dtype)
    kind = _kind(ids)
    name = f"{what} {element_key!r}"
    if kind not in ("integer", "string", "empty") or (kind == "string" and not _can_be_written(ids)):
        raise DataError(
            f"{name}: a table names regions by whole numbers or by text, and the ids of these are "
            f"{_NAMES.get(kind, kind)} (first: {ids[:1].tolist()[0]!r}). {_remedy(ids, kind, element_key)}"
        )
    if kind == "integer":
        ids = ids.astype(np.uint64 if ids.max() > np.iinfo(np.int64).max else np.int64)
    check_unique(ids, name)
    return pd.Index(ids.array, name=None)


def _kind(ids: pd.Index) -> str:
    """What all of them are, in pandas' words."""
    if isinstance(ids, pd.MultiIndex):
        return "a MultiIndex"
    kind = pd.api.types.infer_dtype(ids, skipna=False)
    return "numbers, some of them missing" if kind == "integer" and ids.hasnans else kind


def _can_be_written(ids: pd.Index) -> bool:
    """Whether text is text: Python's can hold halves of characters, which no file can."""
    try:
        for start in range(0, len(ids), _CHUNK):
            pa.array(ids[start : start + _CHUNK].to_numpy(), type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        return False
    return True


def _remedy(ids: pd.Index, kind: str, element_key: str) -> str:
    element = f"sdata[{element_key!r}]"
    if kind == "floating" and np.isfinite(values := ids.to_numpy(np.float64)).all() and (values % 1 == 0).all():
        change = f"{element}.index = {element}.index.astype(int)"
    elif kind == "string":
        change = f"{element}.index = [name.encode(errors='replace').decode() for name in {element}.index]"
    else:
        change = f"{element}.index = {element}.index.map(str)"
    return f"Give each its own: {change}, and the ids in its tables alike."


def check_unique(ids: pd.Index, what: str) -> None:
    """Refuse ids of which one occurs twice; pandas keeps the answer, so asking again costs nothing.

    Raises
    ------
    DataError
        Saying how many and which.
    """
    try:
        if are_ascending(ids) or ids.is_unique:
            return
    except TypeError as error:
        raise DataError(f"{what}: ids such as {ids[0]!r} are neither numbers nor text.") from error
    twice = ids.duplicated()
    raise DataError(
        f"{what}: {int(twice.sum())} of {len(ids)} ids occurred before (first {ids[twice].tolist()[0]!r}), so rows of "
        "a table cannot be matched. Make the index unique."
    )


def check_instances(instances: pd.Index, table_key: str) -> None:
    """Refuse instance ids of a table that are missing, no ids, or not unique.

    Raises
    ------
    DataError
        Saying how many and which.
    """
    if are_ascending(instances):
        return
    missing = int(np.count_nonzero(instances.isna()))
    if missing:
        raise DataError(f"Table {table_key!r} has {missing} rows without an instance id.")
    if not _are_hashable(instances):
        raise DataError(f"Table {table_key!r} has instance ids that are neither numbers nor text.")
    twice = instances.duplicated()
    if twice.any():
        raise DataError(
            f"Table {table_key!r} has {int(twice.sum())} rows whose instance id occurred before "
            f"(first {instances[twice].tolist()[0]!r}): one row a region is needed."
        )


def _are_hashable(ids: pd.Index) -> bool:
    return pd.api.types.infer_dtype(ids, skipna=False) not in ("mixed", "bytes", "complex")
