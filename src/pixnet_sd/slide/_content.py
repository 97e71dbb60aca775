"""Content of a slide: hashes of the pixels that the network reads, and of where regions are.

Equal for equal content, however it is chunked, ordered in a store, or kept in memory or on disk.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import dask.array as da
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from pixnet_sd._fingerprint import content_sha256, files_sha256
from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons, Regions

from ._slide import Slide
from .elements import LazyLabels
from .image import ImageLevel

__all__ = ["PixelContent", "check_same_pixels", "ids_sha256", "pixel_content", "regions_sha256"]

_BLOCK_PX = 1024  # side of the squares that are hashed apart; part of what the hash is
_READ_PX = 4 * _BLOCK_PX  # least side of what is read at once, so that few chunks are read twice
_READ_BYTES = 2**28
_SETTLED_NS = 2_000_000_000  # a change to files that are older than this gives them another date
_STRIP_PX = 1024

_hashed_labels: WeakKeyDictionary[LazyLabels, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class PixelContent:
    """Pixels of one level of an image.

    Attributes
    ----------
    level
        Size of the level, ``"height x width"``.
    sha256
        Hash of its pixels.
    files
        Hash of names, sizes and dates of the files that hold them; None for an image in memory.
    is_settled
        Whether these dates can vouch for the content later: not those of a moment ago.
    """

    level: str
    sha256: str
    files: str | None = None
    is_settled: bool = False

    def note(self) -> dict[str, Any]:
        """Describe this content for `pixel_content` of a later run."""
        return {self.level: {"sha256": self.sha256, "files": self.files}} if self.is_settled else {}


def pixel_content(slide: Slide, known: Mapping[str, Any] | None = None) -> PixelContent:
    """Hash the pixels that a slide is read from at its working resolution.

    Parameters
    ----------
    slide
        The slide.
    known
        `PixelContent.note` of earlier runs: what they hashed is not read again while its files have the same dates.

    Returns
    -------
    Content of the level that is read.
    """
    level = slide.pyramid.level_for(slide.working_scale)
    name = f"{level.shape[0]} x {level.shape[1]}"
    files, is_settled = _files(level)
    noted = (known or {}).get(name)
    if is_settled and isinstance(noted, Mapping) and noted.get("files") == files:
        return PixelContent(name, str(noted.get("sha256")), files, is_settled)
    return PixelContent(name, _level_sha256(level), files, is_settled)


def check_same_pixels(slide: Slide, content: PixelContent) -> None:
    """Refuse a result when the image was rewritten while it was read.

    Parameters
    ----------
    slide
        The slide.
    content
        Its pixels when the run began.

    Raises
    ------
    DataError
        When they are others now.
    """
    level = slide.pyramid.level_for(slide.working_scale)
    if content.files is None or _files(level)[0] == content.files or _level_sha256(level) == content.sha256:
        return
    raise DataError(
        f"Image {slide.image_key!r} was changed while it was read, so the result would mix old and new pixels and was "
        "dropped. Make the same call again once nothing writes to the image any more."
    )


def _files(level: ImageLevel) -> tuple[str | None, bool]:
    """Hash of a level's files, and whether they have been left alone for a while."""
    array = level.pixels
    if not isinstance(array, zarr.Array) or not isinstance(array.store, LocalStore):
        return None, False
    started_ns = time.time_ns()
    found, newest_ns = files_sha256(array.store.root / array.path)
    return found, newest_ns < started_ns - _SETTLED_NS


def _level_sha256(level: ImageLevel) -> str:
    blocks = _lazy_blocks(level) if isinstance(level.pixels, da.Array) else _read_blocks(level)
    return content_sha256("rgb", np.array(level.shape), blocks)


def _lazy_blocks(level: ImageLevel) -> NDArray[np.uint8]:
    """Digests of the squares of a dask array, in one pass over its graph: what is cut from one chunk loads it once."""
    pixels: Any = level.pixels
    pixels = pixels[list(level.channels)].rechunk((-1, _BLOCK_PX, _BLOCK_PX))
    digests = pixels.map_blocks(
        lambda block: _digest(block)[None], drop_axis=0, dtype=np.uint8, chunks=_digest_chunks(pixels)
    )
    return np.asarray(digests.compute(scheduler="threads"))


def _digest_chunks(pixels: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (1,) * pixels.numblocks[1], (32,) * pixels.numblocks[2]


def _digest(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """SHA-256 of a square, (3, h, w), as 32 numbers."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(block).data).digest(), np.uint8)


def _read_blocks(level: ImageLevel) -> NDArray[np.uint8]:
    """Digests of the squares of an array in memory or of zarr, read by several threads, whole chunks at a time."""
    height, width = level.shape
    chunk = max(level.pixels.chunks[1:]) if isinstance(level.pixels, zarr.Array) else 1
    side = -(-max(chunk, _READ_PX) // _BLOCK_PX) * _BLOCK_PX
    boxes = [
        (row, min(row + side, height), col, min(col + side, width))
        for row in range(0, height, side)
        for col in range(0, width, side)
    ]
    found = np.empty((-(-height // _BLOCK_PX), 32 * -(-width // _BLOCK_PX)), np.uint8)

    def hash_box(box: tuple[int, int, int, int]) -> None:
        planes = np.moveaxis(level.read(*box), -1, 0)
        for row in range(0, planes.shape[1], _BLOCK_PX):
            for col in range(0, planes.shape[2], _BLOCK_PX):
                at = (box[0] + row) // _BLOCK_PX, (box[2] + col) // _BLOCK_PX * 32
                found[at[0], at[1] : at[1] + 32] = _digest(planes[:, row : row + _BLOCK_PX, col : col + _BLOCK_PX])

    n_threads = max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 16))
    with ThreadPoolExecutor(max(1, min(n_threads, _READ_BYTES // (3 * side * side)))) as pool:
        list(pool.map(hash_box, boxes))
    return found


def ids_sha256(ids: pd.Index) -> str:
    """Hash the names of regions, in their order."""
    values = ids.to_numpy()
    if values.dtype.kind in "iu":
        return content_sha256(values.astype(np.int64))
    return content_sha256(*map(str, values))


def regions_sha256(regions: Regions) -> str:
    """Hash where regions are, outlines included, in their order.

    Parameters
    ----------
    regions
        Circles, polygons, labels or points of a lattice, px. Label images are read in strips.

    Returns
    -------
    SHA-256 as hex.
    """
    return content_sha256(type(regions).__name__, *_pieces(regions))


def _labels_sha256(labels: Any) -> str:
    """Hash a label image, once for all parts that it is split into."""
    if not isinstance(labels, LazyLabels):
        return _strips_sha256(labels)
    if labels not in _hashed_labels:
        _hashed_labels[labels] = _strips_sha256(labels)
    return _hashed_labels[labels]


def _strips_sha256(labels: Any) -> str:
    digest = hashlib.sha256(f"{tuple(labels.shape)}".encode())
    for top in range(0, labels.shape[0], _STRIP_PX):
        digest.update(np.ascontiguousarray(labels[top : top + _STRIP_PX], dtype="<i8").data)
    return digest.hexdigest()


def _pieces(regions: Regions) -> Iterator[str | NDArray[Any]]:
    if isinstance(regions, Lattice):
        yield f"{regions.radius}"
        yield from (regions.to_grid, regions.row, regions.col)
    elif isinstance(regions, Circles):
        yield from (regions.centre_xy, regions.radius)
    elif isinstance(regions, Polygons):
        yield from (regions.vertices, regions.ring_offsets, regions.ring_region)
        yield f"{regions.n_regions}"
    elif isinstance(regions, LabelGrid):
        yield from (np.asarray(regions.ids, np.int64), regions.to_grid, _labels_sha256(regions.labels))
    else:
        raise TypeError(f"{type(regions).__name__} are regions of which no content is known")
