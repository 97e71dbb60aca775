"""Content of slides and regions: hashes of it, and whether an object holds in memory what its store holds.

Hashes are equal for equal content, however it is chunked, ordered in a store, or kept in memory or on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import shapely
import zarr
from dask.system import CPU_COUNT
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._fingerprint import content_sha256, files_sha256
from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons, Regions

from ._slide import Slide
from .elements import (
    LazyLabels,
    Shapes,
    StoredShapes,
    affine_matrix,
    coordinate_systems,
    names,
    read_elements,
    sample_shapes,
    shared_systems,
)
from .image import ImageLevel, computed, levels_of, stored_folder

_BLOCK_PX = 1024  # side of the squares that are hashed apart; part of what the hash is
_READ_PX = 4 * _BLOCK_PX  # least side of what is read at once, so that few chunks are read twice
_READ_BYTES = 2**28
_SETTLED_NS = 2_000_000_000  # a change to files that are older than this gives them another date
_MANY_SHAPES = 1_000_000  # of more in a store, ids and a sample of the outlines are compared


@dataclass(frozen=True)
class PixelContent:
    """Pixels of one level of an image."""

    level: str  # its size, "height x width"
    sha256: str
    files: str | None = None  # hash of names, sizes and dates of the files; None for an image in memory
    is_settled: bool = False  # whether these dates can vouch for the content later: not those of a moment ago

    def note(self) -> dict[str, Any]:
        """Describe this content for `pixel_content` of a later run."""
        return {self.level: {"sha256": self.sha256, "files": self.files}} if self.is_settled else {}


def pixel_content(slide: Slide, known: Mapping[str, Any] | None = None) -> PixelContent:
    """Hash the pixels that a slide is read from; `known` notes tell the hash while files have the same dates."""
    level = slide.pyramid.level_for(slide.working_scale)
    name = f"{level.shape[0]} x {level.shape[1]}"
    files, is_settled = _files(level)
    noted = (known or {}).get(name)
    if is_settled and isinstance(noted, Mapping) and noted.get("files") == files:
        return PixelContent(name, str(noted.get("sha256")), files, is_settled)
    return PixelContent(name, _level_sha256(level), files, is_settled)


def check_same_pixels(slide: Slide, content: PixelContent) -> None:
    """Refuse a result when pixels are not those of when the run began: the image was rewritten while it was read."""
    level = slide.pyramid.level_for(slide.working_scale)
    if content.files is None or _files(level)[0] == content.files or _level_sha256(level) == content.sha256:
        return
    raise DataError(
        f"Image {slide.image_key!r} was changed while it was read, so the result would mix old and new pixels and was "
        "dropped. Make the same call again once nothing writes to the image any more."
    )


def _files(level: ImageLevel) -> tuple[str | None, bool]:
    """Hash of a level's files, and whether they have been left alone for a while."""
    folder = stored_folder(level.pixels.data)
    if folder is None:
        return None, False
    started_ns = time.time_ns()
    sha256, newest_ns = files_sha256(folder)
    return sha256, newest_ns < started_ns - _SETTLED_NS


def _level_sha256(level: ImageLevel) -> str:
    """Hash pixels by the digests of squares, in one pass: of a dask array what is cut from one chunk loads it once."""
    pixels, side = level.pixels.data, _BLOCK_PX
    if not isinstance(pixels, da.Array):  # in memory or of zarr: whole chunks are read at a time
        chunk = max(pixels.chunks[1:]) if isinstance(pixels, zarr.Array) else 1
        side = -(-max(chunk, _READ_PX) // _BLOCK_PX) * _BLOCK_PX
        pixels = da.from_array(
            level.pixels, (-1, side, side), name=False, fancy=False, meta=np.empty((0, 0, 0), np.uint8)
        )
    pixels = pixels[list(level.channels)].rechunk((-1, side, side))
    rows, cols = ([-(-size // _BLOCK_PX) for size in sizes] for sizes in pixels.chunks[1:])
    chunks = tuple(rows), tuple(32 * n for n in cols)
    digests = pixels.map_blocks(_digests, drop_axis=0, dtype=np.uint8, chunks=chunks)
    with dask.config.set(num_workers=max(1, min(CPU_COUNT, _READ_BYTES // (3 * side * side)))):
        return content_sha256("rgb", np.array(level.shape), computed(digests))


def _digests(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """SHA-256 of each square of (3, h, w), as 32 numbers in a row: (rows of squares, 32 * columns of squares)."""
    rows = [pixels[:, top : top + _BLOCK_PX] for top in range(0, pixels.shape[1], _BLOCK_PX)]
    squares = [[row[:, :, left : left + _BLOCK_PX] for left in range(0, row.shape[2], _BLOCK_PX)] for row in rows]
    digests = [[hashlib.sha256(np.ascontiguousarray(each).data).digest() for each in row] for row in squares]
    return np.array([np.frombuffer(b"".join(row), np.uint8) for row in digests])


def ids_sha256(ids: pd.Index) -> str:
    """Hash the names of regions, in their order."""
    values = ids.to_numpy()
    return content_sha256(*([values.astype(np.int64)] if values.dtype.kind in "iu" else map(str, values)))


def regions_sha256(regions: Regions) -> str:
    """Hash where regions are in px, outlines included, in their order; label images are read in strips."""
    pieces: tuple[Any, ...]
    if isinstance(regions, Lattice):
        pieces = (f"{regions.radius}", regions.to_grid, regions.row, regions.col)
    elif isinstance(regions, Circles):
        pieces = regions.centre_xy, regions.radius
    elif isinstance(regions, Polygons):
        pieces = regions.vertices, regions.ring_offsets, regions.ring_region, f"{regions.n_regions}"
    elif isinstance(regions, LabelGrid):
        labels = regions.labels if isinstance(regions.labels, LazyLabels) else LazyLabels(regions.labels)
        pieces = np.asarray(regions.ids, np.int64), regions.to_grid, labels.sha256
    else:
        raise TypeError(f"{type(regions).__name__} are regions of which no content is known")
    return content_sha256(type(regions).__name__, *pieces)


def check_on_disk(sdata: SpatialData, *keys: str | None) -> None:
    """Refuse images, labels and shapes of an object backed by a local store that its store lacks or has otherwise."""
    if not isinstance(sdata.path, Path) or not sdata.path.is_dir():
        return
    for key in keys:
        for group in ("images", "labels", "shapes"):
            if key is not None and key in getattr(sdata, group):  # what is left on disk cannot differ
                _check_element(getattr(sdata, group)[key], sdata.path, group, key)


def _check_element(element: Any, store: Path, group: str, key: str) -> None:
    if not (store / group / key / "zarr.json").is_file():
        raise StoreError(
            f"{group} element {key!r} is in memory and not in the store {store}, into which the results go. Write it "
            f"first: sdata.write_element({key!r})."
        )
    if group == "shapes":
        shapes = StoredShapes(store / group / key)
        on_disk: Any = shapes if len(shapes) > _MANY_SHAPES else shapes.load()
    else:
        on_disk = read_elements(store, {group: [key]})[key]
    differ = {*coordinate_systems(element), *coordinate_systems(on_disk)}
    for system in shared_systems(element, on_disk):
        own, stored = affine_matrix(element, system), affine_matrix(on_disk, system)
        differ -= {system} if np.allclose(own, stored, rtol=1e-9, atol=1e-9) else set()
    if differ:
        raise StoreError(
            f"{group} element {key!r} has another transformation in memory than in the store {store}, to coordinate "
            f"system {names(sorted(differ))}, so that results there would lie elsewhere. Write it first: "
            f"sdata.write_transformations({key!r}); or read the object again."
        )
    changed = _changed_shapes(element, on_disk) if group == "shapes" else _changed_pixels(element, on_disk, store)
    if changed:
        raise StoreError(
            f"{group} element {key!r} has other {changed} in memory than in the store {store}, so that results there "
            "would not fit. Write it under a name of its own, sdata['new'] = ... and sdata.write_element('new'), or "
            "read the object again."
        )


def _changed_pixels(element: Any, on_disk: Any, store: Path) -> str:
    levels, stored_levels = levels_of(element), levels_of(on_disk)
    if len(levels) != len(stored_levels):
        return "levels"
    for level, stored_level in zip(levels, stored_levels, strict=True):
        own, scratch = stored_folder(level.data), stored_folder(stored_level.data)
        if scratch is None:
            raise StoreError(f"Pixels in the store {store} cannot be found. Read the object again.")
        folder = store.joinpath(*scratch.parts[-3:])  # they were read by way of a folder that is gone by now
        if own is not None and own.resolve() == folder.resolve():
            continue
        pixels = da.from_zarr(zarr.open_array(folder, mode="r"))
        is_alike = level.shape == pixels.shape and level.dtype == pixels.dtype
        if not (is_alike and computed((da.asarray(level.data) == pixels).all())):
            return "pixels"
    return ""


def _changed_shapes(shapes: GeoDataFrame, on_disk: Shapes) -> str:
    if len(shapes) != len(on_disk) or not np.array_equal(shapes.index.to_numpy(), on_disk.index.to_numpy()):
        return "ids"
    if isinstance(on_disk, StoredShapes):
        sample = sample_shapes(on_disk)
        shapes, on_disk = shapes.loc[sample.index], sample
    same = shapely.equals_identical(shapes.geometry.to_numpy(), on_disk.geometry.to_numpy()).all()
    return "" if same and np.array_equal(shapes.get("radius"), on_disk.get("radius")) else "outlines"
