"""What lies in a store, into the object in memory: only the elements that are named."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spatialdata as sd
import zarr

from pixnet_sd._logging import logger

from ._disk import read_json, size_text, write_json

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["read_back"]

MAX_READ_BYTES = 2**30
"""Tables and shapes that are larger in memory stay on disk."""

_SHAPE_BYTES = 400  # of a square as an object in memory; a circle takes less

_RASTERS = ("images", "labels")


def read_back(sdata: SpatialData, store: Path, names: Mapping[str, str], *, scratch: Path) -> None:
    """Replace elements in memory by what is in the store now.

    Images and labels come lazily, tables and shapes of up to 1 GiB as a whole. Larger ones are left on disk, and no
    table, shapes or points of the user are read.

    Parameters
    ----------
    sdata
        The object.
    store
        Its store.
    names
        Element name → element type.
    scratch
        Folder for a few links; on any file system that has them.
    """
    rasters = {name: kind for name, kind in names.items() if kind in _RASTERS}
    _read_rasters(sdata, store, rasters)
    # shapes before the tables that annotate them
    for name, kind in sorted(names.items(), key=lambda item: item[1]):
        if kind not in _RASTERS and (store / kind / name).is_dir():
            _read_whole(sdata, store, kind, name, scratch)


def _read_rasters(sdata: SpatialData, store: Path, names: Mapping[str, str]) -> None:
    if not names:
        return
    fresh = sd.read_zarr(store, selection=tuple(set(names.values())))
    for name, kind in names.items():
        if name in getattr(fresh, kind):
            getattr(sdata, kind)[name] = getattr(fresh, kind)[name]


def _read_whole(sdata: SpatialData, store: Path, kind: str, name: str, scratch: Path) -> None:
    """Read a table or shapes, unless they are too large."""
    size = _memory_bytes(store / kind / name, kind)
    elements: Any = getattr(sdata, kind)
    if size <= MAX_READ_BYTES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The table is annotating")
            elements[name] = _alone(store, kind, name, scratch)
        return
    if name in elements:
        del elements[name]  # what it replaced
    how = f"anndata.experimental.read_lazy({str(store / kind / name)!r})" if kind == "tables" else ""
    logger.info(
        "%s[%r] takes %s and was left on disk; spatialdata.read_zarr(%r) reads it%s.",
        *(kind, name, size_text(size), str(store), f" whole, {how} in parts" if how else ""),
    )


def _alone(store: Path, kind: str, name: str, scratch: Path) -> Any:
    """One element, as spatialdata's own reader gives it: of a store that links to nothing else."""
    scratch.mkdir(parents=True, exist_ok=True)
    view = Path(tempfile.mkdtemp(prefix="view-", dir=scratch))
    try:
        root = {key: value for key, value in read_json(store / "zarr.json").items() if key != "consolidated_metadata"}
        write_json(view / "zarr.json", root, scratch=view)
        (view / kind).mkdir()
        shutil.copy(store / kind / "zarr.json", view / kind)
        (view / kind / name).symlink_to((store / kind / name).resolve(), target_is_directory=True)
        return getattr(sd.read_zarr(view, selection=(kind,)), kind)[name]
    finally:
        shutil.rmtree(view, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.rmdir()  # only when nothing is left in it


def _memory_bytes(element: Path, kind: str) -> int:
    """About what an element will take in memory."""
    if kind == "tables":
        x = zarr.open_group(str(element), mode="r")["X"]
        return int(x.nbytes) if isinstance(x, zarr.Array) else 0
    if kind == "shapes":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(element / "shapes.parquet").num_rows) * _SHAPE_BYTES
    return 0
