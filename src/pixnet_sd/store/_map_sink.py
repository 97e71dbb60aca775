"""Where the levels of a gene map are kept while it is being written: on disk beside the store, or in memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dask.array as da
import numpy as np
import zarr
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation
from zarr.codecs import BloscCodec

from pixnet_sd._errors import StoreError
from pixnet_sd._logging import logger

from ._commit import Staged, consolidate, write_scratch_store
from ._disk import check_same_folder, delete_folder, explain_disk_errors, folder_id, read_json, size_text, write_json
from ._done_log import DoneLog
from ._memory import available_memory
from ._planted import check_plain, plain_files
from ._raster import image_pyramid
from ._stretch import stretch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from xarray import DataTree

    from ._map_layout import Block, MapLayout

__all__ = ["DiskSink", "MapSink", "MemorySink"]

FAST = BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="shuffle")
"""For channels that are always read together: as small as the library's default, read three times as fast."""


_DRAFT = re.compile(r"\.[0-9a-f]{32}\.partial")  # as zarr calls a file that it has not finished


class MapSink(Protocol):
    """Levels that take blocks."""

    levels: Sequence[Any]

    def writing(self) -> AbstractContextManager[None]:
        """Around the writes of a block and `mark_done`: what goes wrong is said in words."""

    def is_done(self, block: Block) -> bool:
        """Whether the block is already there."""

    def mark_done(self, block: Block) -> None:
        """Note, durably where that means something, that the block is there."""

    def discard(self) -> None:
        """Forget everything."""


class MemorySink:
    """NumPy levels, for objects that are not backed."""

    def __init__(self, layout: MapLayout) -> None:
        available = available_memory()
        if layout.nbytes > available / 2:
            raise StoreError(
                f"The gene map takes {size_text(layout.nbytes)}, more than half of the {size_text(available)} of "
                "memory that are free. Write the object to disk first: `sdata.write('/some/folder.zarr')`; the map is "
                "then streamed into that store."
            )
        self.layout = layout
        self.levels = [np.zeros(layout.level_shape(k), dtype=np.float32) for k in range(layout.n_levels)]
        self._done: set[Block] = set()

    def writing(self) -> AbstractContextManager[None]:
        """Nothing can go wrong."""
        return contextlib.nullcontext()

    def is_done(self, block: Block) -> bool:
        """Whether the block was written."""
        return block in self._done

    def mark_done(self, block: Block) -> None:
        """Note that the block was written."""
        self._done.add(block)

    def discard(self) -> None:
        """Free the memory."""
        self.levels = []

    def element(self, genes: Sequence[str], transforms: Mapping[str, BaseTransformation]) -> DataTree:
        """Multiscale image as `spatialdata.read_zarr` would return it, over the arrays in memory."""
        levels = (da.from_array(array, chunks=self.layout.level_chunks(k)) for k, array in enumerate(self.levels))
        return image_pyramid(levels, genes, transforms)


class DiskSink:
    """Zarr levels in ``{folder}/map.zarr``, with a log of finished blocks, so that a killed run can be taken up again.

    Parameters
    ----------
    folder
        Own folder of this map inside the work folder; a partial map in it is taken up when it was made for the same
        ``identity``, and deleted when not.
    key, genes, transforms, layout
        The element to be.
    identity
        Everything that makes two runs the same, as JSON.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str,
        genes: Sequence[str],
        transforms: Mapping[str, BaseTransformation],
        layout: MapLayout,
        identity: dict[str, Any],
    ) -> None:
        self.folder, self.key, self.layout = folder, key, layout
        self.resumed = self._open(identity)
        if not self.resumed:
            self._start(genes, transforms, identity)
        self._paths = self._level_paths()
        self.levels = self._levels()
        self._home = folder_id(folder)
        self._log = DoneLog(folder / "done.log", self._stored_bytes)

    @property
    def staged(self) -> Staged:
        """The element, complete with metadata, ready for `commit`.

        Raises
        ------
        StoreError
            When blocks that were written are not there any more.
        """
        with explain_disk_errors("Finishing the gene map", self.folder):
            check_same_folder(self.folder, self._home)
            broken = self._log.broken()
            if broken:
                raise StoreError(
                    f"{broken} blocks of the map that were written to {self.folder} are not there any more. The store "
                    "is unchanged. Make the same call again: it goes on from those that are."
                )
            _sweep_drafts(self.folder / "map.zarr")
            consolidate(self.folder / "map.zarr")
        return Staged(self.key, "images", self.folder / "map.zarr")

    @property
    def n_logged(self) -> int:
        """Blocks that were written, by this run or by the one that it takes up."""
        return len(self._log)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """As `MapSink.writing`; the folder has to be the same all the while, or chunks would go to another."""
        with explain_disk_errors("Writing the gene map", self.folder):
            check_same_folder(self.folder, self._home)
            yield

    def is_done(self, block: Block) -> bool:
        """Whether the block was logged and its chunks are all there."""
        return self._log.holds(block)

    def mark_done(self, block: Block) -> None:
        """Log the block, with the bytes that its chunks take."""
        check_same_folder(self.folder, self._home)
        self._log.add(block)

    def discard(self) -> None:
        """Delete the partial map."""
        with contextlib.suppress(OSError):
            delete_folder(self.folder)

    def _open(self, identity: dict[str, Any]) -> bool:
        """Whether a usable partial map for ``identity`` is there."""
        check_plain(self.folder)
        with contextlib.suppress(OSError, ValueError, KeyError):
            if read_json(self.folder / "partial.json") == identity:
                shapes = [level.shape for level in self._levels()]
                return shapes == [self.layout.level_shape(k) for k in range(self.layout.n_levels)]
        return False

    def _start(
        self, genes: Sequence[str], transforms: Mapping[str, BaseTransformation], identity: dict[str, Any]
    ) -> None:
        """An empty map in place of what is there; on failure nothing remains."""
        if self.folder.exists():
            logger.info("The partial map in %s was made with other settings and is deleted.", self.folder)
        with explain_disk_errors("Starting the gene map", self.folder):
            delete_folder(self.folder)
            try:
                self.folder.mkdir()
                self._create(genes, transforms, identity)
            except BaseException:
                self.discard()
                raise

    def _create(
        self, genes: Sequence[str], transforms: Mapping[str, BaseTransformation], identity: dict[str, Any]
    ) -> None:
        """Let spatialdata write a tiny map of the same kind, then give its arrays the full shape."""
        side = 2 ** (self.layout.n_levels - 1)
        tiny = Image2DModel.parse(
            np.zeros((len(genes), side, side), dtype=np.float32),
            dims=("c", "y", "x"),
            c_coords=list(genes),
            scale_factors=[2] * (self.layout.n_levels - 1),
            transformations=dict(transforms),
        )
        write_scratch_store(self.folder / "map.zarr", {self.key: tiny})
        compressor = FAST if self.layout.whole_channels else None
        for k, path in enumerate(self._level_paths()):
            stretch(path, self.layout.level_shape(k), self.layout.level_chunks(k), compressor)
        # last, because a partial map may be taken up from here on
        write_json(self.folder / "partial.json", identity, scratch=self.folder)

    def _level_paths(self) -> list[Path]:
        element = self.folder / "map.zarr" / "images" / self.key
        multiscales = read_json(element / "zarr.json")["attributes"]["ome"]["multiscales"]
        return [element / dataset["path"] for dataset in multiscales[0]["datasets"]]

    def _levels(self) -> list[Any]:
        return [zarr.open_array(str(path), mode="r+") for path in self._level_paths()]

    def _stored_bytes(self, block: Block) -> int:
        """Bytes that the chunks of a block take on disk, over all levels; chunks of zeros have no file."""
        total = 0
        for level, path in zip(self.levels, self._paths, strict=True):
            row, col = block[0] // self.layout.block_px, block[2] // self.layout.block_px
            for gene in range(-(-level.shape[0] // level.chunks[0])):
                with contextlib.suppress(FileNotFoundError):
                    total += (path / level.metadata.encode_chunk_key((gene, row, col))).stat().st_size
        return total


def _sweep_drafts(store: Path) -> None:
    """Remove what zarr had half-written when the process of an earlier run was killed."""
    for entry in plain_files(store):
        if _DRAFT.search(entry.name):
            os.unlink(entry.path)
