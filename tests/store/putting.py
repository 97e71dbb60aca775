"""Short ways into a store for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import anndata as ad
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


def own_chunks() -> contextlib.AbstractContextManager[Any]:
    """Keep anndata from a warning that it will leave the shards to zarr, for what a test itself writes."""
    known = hasattr(ad.settings, "auto_shard_zarr_v3")
    return ad.settings.override(auto_shard_zarr_v3=False) if known else contextlib.nullcontext()
