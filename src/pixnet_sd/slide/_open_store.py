"""The short way into a written store: everything that costs little memory, and the rest left where it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnet_sd._arguments import checked
from pixnet_sd._errors import StoreError
from pixnet_sd._logging import logger

from ._store_parts import leave_on_disk, read_part, without_region_warnings
from ._stored_shapes import StoredShapes, shapes_of
from ._stored_table import StoredTable, tables_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["open_store"]

_SMALL_BYTES = 2**25


@checked(StoreError)
def open_store(path: str | Path) -> SpatialData:
    """Open a written store without loading what is big in it.

    `spatialdata.read_zarr` loads every table and every polygon, which for Visium HD is gigabytes. Here tables and
    shapes that would take more than about 32 MiB stay on disk. :func:`pixnet_sd.tl.fit`,
    :func:`~pixnet_sd.tl.predict` and :func:`~pixnet_sd.tl.evaluate` find them in the store and read what they need
    when they need it; name them in ``table_key=`` and ``shapes_key=`` as if they were in the object.

    Parameters
    ----------
    path
        The store, as ``SpatialData.write`` makes it.

    Returns
    -------
    The object, backed by the store: images, labels and points (which are lazy), and small tables and shapes.

    Raises
    ------
    StoreError
        If there is no store.
    """
    from spatialdata import read_zarr

    store = Path(path).expanduser()
    if not ((store / "zarr.json").is_file() or (store / ".zgroup").is_file()):
        raise StoreError(
            f"There is no store at {str(path)!r}. Give the folder that sdata.write(...) made; of a Space Ranger "
            "folder, make one with pixnet_sd.io.convert_visium_hd(folder, store)."
        )
    sdata = read_zarr(store, selection=("images", "labels", "points"))
    stored: dict[str, Mapping[str, Any]] = {"shapes": shapes_of(sdata), "tables": tables_of(sdata)}
    small = {kind: [key for key, element in there.items() if _is_small(element)] for kind, there in stored.items()}
    part = read_part(store, small)
    with without_region_warnings():
        for kind, keys in small.items():
            for key in keys:
                getattr(sdata, kind)[key] = part[key]
    left = {kind: [key for key in there if key not in small[kind]] for kind, there in stored.items()}
    for kind, keys in left.items():
        leave_on_disk(sdata, kind, keys)
    if any(left.values()):
        logger.info(
            "left on disk, to be read when needed: %s", ", ".join(key for keys in left.values() for key in keys)
        )
    return sdata


def _is_small(element: StoredTable | StoredShapes) -> bool:
    return element.n_bytes <= _SMALL_BYTES
