"""Elements of a written store that are not in memory: which there are, and how to read some of them alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import zarr

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["elements_on_disk", "read_part", "skeleton", "without_region_warnings"]


def elements_on_disk(sdata: SpatialData, kind: str, file: str) -> dict[str, Path]:
    """Elements that the store behind an object has and the object has not.

    Parameters
    ----------
    sdata
        The object; without a store, or with one that is not a local folder, there are none.
    kind
        ``"shapes"`` or ``"tables"``.
    file
        What the folder of such an element holds: folders without it are none.

    Returns
    -------
    Their folders by name.
    """
    if not isinstance(sdata.path, Path):
        return {}
    folder, in_memory = sdata.path / kind, getattr(sdata, kind)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in found if path.name not in in_memory and (path / file).exists()}


def read_part(store: Path, parts: Mapping[str, Iterable[str]]) -> SpatialData:
    """Some elements of a store, read into memory by spatialdata's own reader, and nothing else of it.

    Parameters
    ----------
    store
        The store.
    parts
        Names of shapes and tables by kind.
    """
    from spatialdata import read_zarr

    with TemporaryDirectory() as folder:
        scratch = Path(folder) / "part.zarr"
        skeleton(store, scratch, parts)
        for kind, keys in parts.items():
            for key in keys:
                (scratch / kind / key).symlink_to((store / kind / key).resolve(), target_is_directory=True)
        with without_region_warnings():
            return read_zarr(scratch)


@contextmanager
def without_region_warnings() -> Iterator[None]:
    """Keep spatialdata from warning of tables whose regions are not in the object: they are in the store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The table is annotating")
        yield


def skeleton(store: Path, scratch: Path, kinds: Iterable[str]) -> zarr.Group:
    """Start a store of the same format and attributes without elements."""
    like = zarr.open_group(store, mode="r")
    root = zarr.open_group(scratch, mode="w", zarr_format=like.metadata.zarr_format)
    root.attrs.update(like.attrs.asdict())
    for kind in kinds:
        root.create_group(kind)
    return root
