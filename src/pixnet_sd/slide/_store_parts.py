"""Elements of a written store that are not in memory: which there are, and how to read some of them alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import zarr
from spatialdata import SpatialData, read_zarr

__all__ = ["elements_on_disk", "leave_on_disk", "read_part", "skeleton", "without_region_warnings"]


_left: WeakKeyDictionary[SpatialData, dict[str, set[str]]] = WeakKeyDictionary()


def leave_on_disk(sdata: SpatialData, kind: str, keys: Iterable[str]) -> None:
    """Note that these elements were left out of an object on purpose, although it holds others of the kind."""
    _left.setdefault(sdata, {})[kind] = set(keys)


def elements_on_disk(sdata: SpatialData, kind: str, file: str) -> dict[str, Path]:
    """Elements that the store behind an object has and the object was opened without.

    An object that holds elements of the kind was opened with them, and what it lacks was taken out of it, unless
    `open_store` noted otherwise. Results of this package do not matter for that, and are always found.

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
    there = {path.name: path for path in found if path.name not in in_memory and (path / file).exists()}
    if sdata in _left:
        wanted = _left[sdata].get(kind, set())
        return {key: path for key, path in there.items() if key in wanted or _is_result(sdata, sdata.path, key)}
    if any(not _is_result(sdata, sdata.path, key) for key in in_memory):
        return {key: path for key, path in there.items() if _is_result(sdata, sdata.path, key)}
    return there


def _is_result(sdata: SpatialData, store: Path, key: str) -> bool:
    """Whether a table, or the shapes made with one, was written by this package."""
    for name in (key, key.removesuffix("_shapes")):
        if name in sdata.tables and "pixnet_sd" in sdata.tables[name].uns:
            return True
        if (store / "tables" / name / "uns" / "pixnet_sd").is_dir():
            return True
    return False


def read_part(store: Path, parts: Mapping[str, Iterable[str]]) -> SpatialData:
    """Some elements of a store, read into memory by spatialdata's own reader, and nothing else of it.

    Parameters
    ----------
    store
        The store.
    parts
        Names of shapes and tables by kind.
    """
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
