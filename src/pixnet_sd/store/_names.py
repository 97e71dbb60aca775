"""Element names: which are taken, which are allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pixnet_sd._errors import StoreError

from ._disk import local_store

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["ELEMENT_TYPES", "check_names", "existing_names", "is_name"]

ELEMENT_TYPES = ("images", "labels", "points", "shapes", "tables")


def existing_names(sdata: SpatialData) -> dict[str, str]:
    """Name → element type of every element in memory and, for a backed object, in its store.

    The store's folders are listed directly: consolidated metadata may not know an element yet.
    """
    store = local_store(sdata)
    names: dict[str, str] = {}
    for kind in ELEMENT_TYPES:
        if store is not None and (store / kind).is_dir():
            names.update({entry.name: kind for entry in (store / kind).iterdir() if entry.is_dir()})
    for kind in ELEMENT_TYPES:
        names.update(dict.fromkeys(getattr(sdata, kind).keys(), kind))
    return names


def check_names(sdata: SpatialData, names: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Raise unless elements can be added under ``names``.

    Parameters
    ----------
    sdata
        The object, in memory or backed.
    names
        Element name → element type (``"images"``, ``"labels"``, ``"points"``, ``"shapes"``, ``"tables"``).
    overwrite
        Whether an element of the same name *and* type may be replaced.

    Raises
    ------
    StoreError
        For a name with characters that SpatialData does not allow, for a name that is taken, and for one that differs
        from a taken one only in case (they are the same file on some systems).
    """
    taken = existing_names(sdata)
    spelled = {name.lower(): name for name in taken}
    for name, kind in names.items():
        _check_characters(name)
        if name in taken:
            _check_replaceable(name, kind, taken[name], overwrite)
        elif name.lower() in spelled:
            raise StoreError(
                f"{name!r} differs from the existing element {spelled[name.lower()]!r} only in upper and lower case. "
                "Choose another `key_added`."
            )
        spelled[name.lower()] = name


def is_name(name: str) -> bool:
    """Whether SpatialData allows an element to be called so."""
    allowed = bool(name) and all(c.isalnum() or c in "_-." for c in name)
    return allowed and name not in (".", "..") and not name.startswith("__")


def _check_characters(name: str) -> None:
    """SpatialData's own rule, with a message that names the remedy."""
    if not is_name(name):
        raise StoreError(
            f"{name!r} cannot be the name of an element: use letters, digits, '_', '-' and '.' only, and do not start "
            "with '__'."
        )


def _check_replaceable(name: str, kind: str, existing: str, overwrite: bool) -> None:
    """Only an element of the same type, and only when asked to."""
    if kind != existing:
        raise StoreError(
            f"There is already an element {name!r} under {existing}, so it cannot be used for {kind} (names are unique "
            "across element types). Choose another `key_added`."
        )
    if not overwrite:
        raise StoreError(
            f"{existing}[{name!r}] exists already. Pass `overwrite=True` to replace it, or choose another `key_added`."
        )
