"""An append-only log of finished blocks.

Raster elements on the map grid: their transformations, and the tissue mask.

Where the levels of a gene map are kept while it is being written: on disk beside the store, or in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dask.array as da
import numpy as np
import zarr
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import BaseTransformation, Scale, get_transformation, set_transformation
from spatialdata.transformations import Sequence as InTurn
from xarray import DataArray, Dataset, DataTree
from zarr.codecs import BloscCodec

from pixnet_sd._util import logger
from pixnet_sd.errors import StoreError
from pixnet_sd.store import (
    Staged,
    available_memory,
    check_plain,
    check_same_folder,
    consolidate,
    delete_folder,
    explain_disk_errors,
    folder_id,
    plain_files,
    read_json,
    size_text,
    stretch,
    write_json,
    write_scratch_store,
)

from ._layout import map_layout

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from spatialdata import SpatialData
    from xarray import DataTree

    from ._layout import Block, MapLayout

__all__ = [
    "DiskSink",
    "DoneLog",
    "MapSink",
    "MemorySink",
    "image_pyramid",
    "image_transforms",
    "map_key",
    "map_transforms",
    "tissue_labels",
]


class DoneLog:
    """One line a block: its corner and the bytes that it takes on disk.

    Nothing is forced to disk: that would make the network wait for it. After a crash of the machine, a logged block may
    therefore be missing in part: it counts as done only while its files have their size.

    Parameters
    ----------
    path
        Log file.
    stored_bytes
        Bytes that a block takes on disk now.
    """

    def __init__(self, path: Path, stored_bytes: Callable[[Block], int]) -> None:
        self._path, self._stored_bytes = path, stored_bytes
        self._bytes = _read(path)

    def __len__(self) -> int:
        return len(self._bytes)

    def broken(self) -> int:
        """How many blocks were logged and are not whole any more."""
        return sum(size != self._stored_bytes((row, row, col, col)) for (row, col), size in self._bytes.items())

    def holds(self, block: Block) -> bool:
        """Whether the block was logged and is still whole."""
        logged = self._bytes.get((block[0], block[2]))
        return logged is not None and logged == self._stored_bytes(block)

    def add(self, block: Block) -> None:
        """Log a block that was written."""
        size = self._stored_bytes(block)
        with self._path.open("a", encoding="ascii") as file:
            file.write(f"\n{block[0]} {block[2]} {size} .")  # the leading newline parts it from a torn line before
        self._bytes[block[0], block[2]] = size


def _read(path: Path) -> dict[tuple[int, int], int]:
    """Corner → bytes; a line that a kill cut short has no full stop and is skipped."""
    if not path.is_file():
        return {}
    fields = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    whole = (f for f in fields if len(f) == 4 and f[3] == "." and all(word.isdecimal() for word in f[:3]))
    return {(int(f[0]), int(f[1])): int(f[2]) for f in whole}


def map_key(key_added: str) -> str:
    """Name of the image of a gene map."""
    return f"{key_added}_map"


def image_pyramid(
    levels: Iterable[Any], channels: Iterable[str], transforms: Mapping[str, BaseTransformation]
) -> DataTree:
    """Multiscale image, as `spatialdata.read_zarr` would return it, over dask arrays that halve from level to level."""
    nodes = {}
    for k, array in enumerate(levels):
        centres = {d: (np.arange(n) + 0.5) * 2.0**k for d, n in zip("yx", array.shape[1:], strict=True)}
        image = DataArray(array, dims=("c", "y", "x"), coords={"c": list(channels), **centres}, name="image")
        nodes[f"scale{k}"] = Dataset({"image": image})
    tree = DataTree.from_dict(nodes)
    set_transformation(tree, dict(transforms), set_all=True)
    Image2DModel().validate(tree)
    return tree


def image_transforms(sdata: SpatialData, image_key: str) -> dict[str, BaseTransformation]:
    """Coordinate system → transformation of an image, for all of its systems."""
    return dict(get_transformation(sdata.images[image_key], get_all=True))


def map_transforms(
    transforms: Mapping[str, BaseTransformation], pitch_image_px: float
) -> dict[str, BaseTransformation]:
    """Transformations of a raster whose pixels are ``pitch_image_px`` image pixels wide.

    Pixel i covers [i, i + 1) in both grids, so a scale alone is right: ``Sequence([Scale(pitch), source])``.
    """
    scale = Scale([pitch_image_px, pitch_image_px], axes=("x", "y"))
    return {system: InTurn([scale, source]) for system, source in transforms.items()}


def tissue_labels(mask: NDArray[np.bool_], pitch_image_px: float, transforms: Mapping[str, BaseTransformation]) -> Any:
    """Multiscale labels element of a tissue mask: 1 tissue, 0 glass.

    Parameters
    ----------
    mask
        (height, width) on the map grid.
    pitch_image_px
        Image scale-0 pixels per map pixel.
    transforms
        Transformations of the source image, for every coordinate system (`image_transforms`).
    """
    layout = map_layout(1, (mask.shape[0], mask.shape[1]), block_px=512)
    height, width = layout.padded
    padded = np.zeros((height, width), dtype=np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return Labels2DModel.parse(
        padded,
        dims=("y", "x"),
        scale_factors=[2] * (layout.n_levels - 1),
        chunks={"y": min(height, 2048), "x": min(width, 2048)},
        transformations=map_transforms(transforms, pitch_image_px),
    )


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
