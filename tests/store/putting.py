"""Short ways into a store for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatialdata import SpatialData

from pixnet_sd.store import Transaction


def enter(sdata: SpatialData, names: Mapping[str, str], *, n_bytes: int = 0, **options: Any) -> None:
    """Check whether results could be written, and put nothing in."""
    with Transaction(sdata, names, **options) as out:
        out.check_room(n_bytes, 0)


def commit(sdata: SpatialData, elements: Mapping[str, Any], *, overwrite: bool = False, **options: Any) -> None:
    """Put elements in."""
    with Transaction(sdata, {}, overwrite=overwrite) as out:
        out.commit(elements, **options)
