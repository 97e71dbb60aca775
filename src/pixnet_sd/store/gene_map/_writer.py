"""A gene map while it is written: its levels beside the store, or in memory, filled block by block."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation
from zarr.codecs import BloscCodec

from pixnet_sd._util import logger
from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.store import (
    Partial,
    Staged,
    Transaction,
    available_memory,
    consolidate,
    plain_files,
    size_text,
    write_scratch_store,
)

from ._element import FLOAT_BYTES, Block, MapLayout, image_pyramid, level_folders, map_transforms

# predicted maps take 7 % less than with the library's default, and less time to write and to read
COMPRESSOR = BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="shuffle")
_UNDER_WAY = 4  # blocks that are computed, written and encoded at a time
_DRAFT = re.compile(r"\.[0-9a-f]{32}\.partial")  # as zarr calls a file that it has not finished


class GeneMapWriter:
    """Streams a gene map, in blocks of any order, to where `Transaction.commit` takes it from.

    What a killed run has written is taken up by the next one with the same fingerprint, which is equal for two runs
    exactly when their values would be. A context manager: leaving it without a commit keeps the partial map for that.
    `write` may be called from several threads. ``transforms`` are those of the source image, ``pitch_image_px`` its
    scale-0 pixels per map pixel.
    """

    def __init__(
        self,
        out: Transaction,
        *,
        key: str,
        channels: Sequence[str],
        layout: MapLayout,
        transforms: Mapping[str, BaseTransformation],
        pitch_image_px: float,
        fingerprint: str,
    ) -> None:
        if len(set(channels)) != len(channels):
            twice = next(name for name in channels if list(channels).count(name) > 1)
            raise DataError(f"The gene {twice} is named twice; make the names of channels unique.")
        self.layout, self._key, self._channels = layout, key, list(channels)
        self._out, self._transforms = out, map_transforms(transforms, pitch_image_px)
        self._blocks = frozenset(layout.blocks())
        _check_memory(layout, in_memory=out.store is None)
        self._levels: _DiskLevels | _MemoryLevels
        if out.store is None:
            self._levels = _MemoryLevels(layout)
        else:
            matrices = {
                system: each.to_affine_matrix(("x", "y"), ("x", "y")).tolist()
                for system, each in self._transforms.items()
            }
            identity = {"fingerprint": fingerprint, "genes": self._channels, "transforms": matrices}
            self._levels = _DiskLevels(out.folder(f"map-{key}"), key, layout, identity | {"layout": asdict(layout)})
            if not self._levels.resumed:
                self._levels.start(self._channels, self._transforms)

    @property
    def pending(self) -> list[Block]:
        """Blocks (row0, row1, col0, col1), map pixels, that are not there yet; those never written are 0."""
        return [block for block in self.layout.blocks() if not self._levels.is_done(block)]

    def write(self, block: Block, values: NDArray[np.float32]) -> None:
        """Write one block (channels, rows, columns), 0 off tissue, into every level, then mark it done.

        Values have to be finite: plots of the map would fail.
        """
        row0, row1, col0, col1 = block
        if block not in self._blocks or values.shape != (len(self._channels), row1 - row0, col1 - col0):
            raise DataError(f"No block of the gene map is {block} with an array of shape {values.shape}.")
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise DataError(f"The prediction in block {block} is not finite (NaN or infinity): the model is broken.")
        image, padded = np.asarray(values, dtype=np.float32), self.layout.padded
        if row1 == self.layout.height or col1 == self.layout.width:  # the levels need more than is predicted
            rows = padded[0] - row1 if row1 == self.layout.height else 0
            cols = padded[1] - col1 if col1 == self.layout.width else 0
            image = np.pad(image, ((0, 0), (0, rows), (0, cols)))
        with self._levels.writing():
            for k, level in enumerate(self._levels.arrays):
                image = image if k == 0 else _halved(image)
                row, col = row0 >> k, col0 >> k
                level[:, row : row + image.shape[1], col : col + image.shape[2]] = image
            self._levels.mark_done(block)

    @property
    def missing_bytes(self) -> int:
        """Bytes that the blocks to come take at most."""
        return int(self.layout.nbytes * len(self.pending) / len(self._blocks))

    @property
    def missing_files(self) -> int:
        """Files that the blocks to come take at most."""
        return self.layout.n_levels * len(self.pending)

    def summary(self) -> str:
        """Say what will be written."""
        layout, n_done = self.layout, len(self._blocks) - len(self.pending)
        what, channels = ("factors", "channels") if layout.whole_channels else ("gene map", "genes")
        done = f"; {n_done} of {len(self._blocks)} blocks of the map are there already" if n_done else ""
        return (
            f"{what} {self._key!r}: {layout.n_genes} {channels}, {layout.height} x {layout.width} pixels, at most "
            f"{size_text(layout.nbytes)} in {layout.n_files:,} files{done}"
        )

    def element(self) -> Any:
        """Finish the map, for `Transaction.commit`."""
        if isinstance(self._levels, _DiskLevels):
            return self._levels.staged()
        arrays = enumerate(self._levels.arrays)
        levels = [da.from_array(array, chunks=self.layout.level_chunks(k)) for k, array in arrays]
        return image_pyramid(levels, self._channels, self._transforms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and isinstance(self._levels, _DiskLevels) and not self._out.is_late:
            self._levels.keep_or_discard()


def _halved(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of 2 x 2 pixels; nothing is made that is larger than it."""
    halved = image[:, ::2, ::2] + image[:, ::2, 1::2]
    halved += image[:, 1::2, ::2]
    halved += image[:, 1::2, 1::2]
    halved *= np.float32(0.25)
    return halved


def _check_memory(layout: MapLayout, *, in_memory: bool) -> None:
    """Refuse what would take more than half of the memory that is free: a map, or the blocks that are under way."""
    available, block_bytes = available_memory(), FLOAT_BYTES * layout.n_genes * layout.block_px**2
    needed = layout.nbytes if in_memory else _UNDER_WAY * block_bytes
    if needed > available / 2:
        streamed = "Write the object to disk first, `sdata.write('/some/folder.zarr')`: the map is streamed there."
        smaller = "Predict fewer genes (`genes=`), a coarser map (`map_um=`), or `write='factors'`."
        raise StoreError(
            f"Writing the gene map takes {size_text(needed)} of memory, more than half of the {size_text(available)} "
            f"that are free. {streamed if in_memory else smaller}"
        )


class _MemoryLevels:
    """NumPy levels, for objects that are not backed."""

    def __init__(self, layout: MapLayout) -> None:
        self.arrays: list[Any] = [np.zeros(layout.level_shape(k), np.float32) for k in range(layout.n_levels)]
        self._done: set[Block] = set()

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_done(self, block: Block) -> bool:
        return block in self._done

    def mark_done(self, block: Block) -> None:
        self._done.add(block)


class _DiskLevels:
    """Zarr levels in ``{folder}/map.zarr``, with a log of finished blocks, so that a killed run can be taken up again.

    Nothing is forced to disk: that would make the network wait for it. After a crash of the machine a logged block may
    therefore be missing in part: it counts as done only while its files have the size that the log says.
    """

    def __init__(self, folder: Path, key: str, layout: MapLayout, identity: dict[str, Any]) -> None:
        self.arrays: list[Any] = []
        self._folder, self._key, self._layout, self._partial = folder, key, layout, Partial(folder, identity)
        self._image = folder / "map.zarr" / "images" / key
        self._paths: list[Path] = []
        self._log: dict[tuple[int, int], int] = {}  # corner of a block → its bytes
        self.resumed = False
        plain_files(folder)  # raises at links
        with contextlib.suppress(OSError, ValueError, KeyError):
            if self._partial.is_there():
                self._open()
                shapes = [array.shape for array in self.arrays]
                self.resumed = shapes == [layout.level_shape(k) for k in range(layout.n_levels)]

    def start(self, channels: Sequence[str], transforms: Mapping[str, BaseTransformation]) -> None:
        """Make an empty map in place of what is there; on failure nothing remains.

        spatialdata writes a tiny one of the same kind; then arrays of the full shape are put in place of its own.
        """
        layout, side = self._layout, 2 ** (self._layout.n_levels - 1)
        tiny = Image2DModel.parse(
            np.zeros((len(channels), side, side), dtype=np.float32),
            dims=("c", "y", "x"),
            c_coords=list(channels),
            scale_factors=[2] * (layout.n_levels - 1),
            transformations=dict(transforms),
        )
        with self._partial.made("Starting the gene map"):
            write_scratch_store(self._folder / "map.zarr", {self._key: tiny})
            for k, path in enumerate(level_folders(self._image)):
                theirs = zarr.open_array(str(path), mode="r")
                zarr.create_array(
                    str(path),
                    shape=layout.level_shape(k),
                    chunks=layout.level_chunks(k),
                    shards=layout.level_shards(k),
                    dtype=theirs.dtype,
                    compressors=COMPRESSOR,
                    fill_value=theirs.fill_value,
                    dimension_names=("c", "y", "x"),
                    overwrite=True,
                )
            consolidate(self._folder / "map.zarr")
            self._open()

    def _open(self) -> None:
        """Open the levels, and read what is logged; a line that a kill cut short has no full stop and is skipped."""
        self._paths = level_folders(self._image)
        self.arrays = [zarr.open_array(str(path), mode="r+") for path in self._paths]
        log = self._folder / "done.log"
        text = log.read_text(encoding="ascii", errors="replace") if log.is_file() else ""
        for row, col, size in re.findall(r"^(\d+) (\d+) (\d+) \.$", text, re.MULTILINE):
            self._log[int(row), int(col)] = int(size)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return self._partial.used("Writing the gene map")

    def is_done(self, block: Block) -> bool:
        logged = self._log.get((block[0], block[2]))
        return logged is not None and logged == self._stored_bytes(block[0], block[2])

    def mark_done(self, block: Block) -> None:
        self._partial.check()
        size = self._stored_bytes(block[0], block[2])
        with (self._folder / "done.log").open("a", encoding="ascii") as file:
            file.write(f"\n{block[0]} {block[2]} {size} .")  # the leading newline parts it from a torn line before
        self._log[block[0], block[2]] = size

    def staged(self) -> Staged:
        """Return the element, complete with metadata."""
        with self._partial.used("Finishing the gene map"):
            broken = sum(size != self._stored_bytes(*corner) for corner, size in self._log.items())
            if broken:
                raise StoreError(
                    f"{broken} blocks of the map that were written to {self._folder} are not there any more. The store "
                    "is unchanged. Make the same call again: it goes on from those that are."
                )
            for entry in plain_files(self._folder / "map.zarr"):
                if _DRAFT.search(entry.name):  # half-written when the process of an earlier run was killed
                    os.unlink(entry.path)
        return Staged(self._key, "images", self._folder / "map.zarr")

    def keep_or_discard(self) -> None:
        """Keep a map of which something is written."""
        if self._log:
            logger.info("Blocks that are done are kept in %s; the same call goes on from there.", self._folder)
        else:
            with contextlib.suppress(OSError):
                self._partial.delete()

    def _stored_bytes(self, row: int, col: int) -> int:
        """Bytes that the files of a block take, one a level; a block of zeros has none."""
        total, side = 0, self._layout.block_px
        for level, path in zip(self.arrays, self._paths, strict=True):
            with contextlib.suppress(FileNotFoundError):
                key = level.metadata.encode_chunk_key((0, row // side, col // side))
                total += (path / key).stat().st_size
        return total
