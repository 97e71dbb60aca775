"""A gene map kept as its factors: the C channels of the feature map, and a table with the weights of every gene.

A gene of a linear head is a weighted sum of them, ``D W + b``, with b where tissue is: the last channel is 1 there and
0 elsewhere, so that averages of pixels, and with them the coarser levels, need no exception. Densities are what a link
makes of such sums, ``unit softplus(D W + b)``, pixel by pixel, times that of all genes (see `nn.head.Head`).

The gene map, written block by block and read back by pixel range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from spatialdata import get_dask_backing_files
from spatialdata.models import TableModel

from pixnet_sd._notes import stored_note
from pixnet_sd._util import logger
from pixnet_sd.errors import DataError, ElementError, StoreError
from pixnet_sd.store import (
    WRITTEN,
    RegionResults,
    check_target,
    commit,
    element_stamp,
    hold_lock,
    image_stamp,
    local_store,
    read_json,
    size_text,
    work_folder,
)

from ._layout import Block, MapLayout, estimate_bytes, map_layout
from ._writer import DiskSink, MemorySink, image_transforms, map_transforms

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData
    from spatialdata.transformations import BaseTransformation

__all__ = [
    "FactorHead",
    "GeneMapReader",
    "GeneMapWriter",
    "check_not_rewritten",
    "estimate_bytes",
    "factor_names",
    "factors_key",
    "head_key",
    "is_as_written",
    "open_map",
    "read_block",
    "read_head",
]

TISSUE = "tissue"
_AT_ONE = np.float32(math.log(math.e - 1))  # where softplus is 1


def factors_key(key_added: str) -> str:
    """Name of the image of the factors."""
    return f"{key_added}_factors"


def head_key(key: str) -> str:
    """Name of the table of weights that belongs to an image of factors."""
    return f"{key}_head"


def factor_names(n_factors: int) -> list[str]:
    """Channels of the image: the factors, then where tissue is."""
    return [*(f"factor_{k}" for k in range(n_factors)), TISSUE]


@dataclass(frozen=True)
class FactorHead:
    """What makes genes of factors.

    Attributes
    ----------
    genes
        Outputs; of densities the last is the sum over all genes.
    weight, bias
        W, shape (M, C), and b, shape (M,).
    unit
        Of densities what a link's 1 stands for, shape (M,); None for a linear head.
    """

    genes: list[str]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    unit: NDArray[np.float32] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether averages of factors give averages of genes."""
        return self.unit is None

    def table(self, units: str, fingerprint: str) -> ad.AnnData:
        """As an element: rows are outputs, columns factors.

        Parameters
        ----------
        units
            What the values are, in words.
        fingerprint
            Of the factors that these weights belong to.
        """
        obs = pd.DataFrame({"bias": self.bias}, index=pd.Index(self.genes, dtype=object))
        if self.unit is not None:
            obs["unit"] = self.unit
        var = pd.DataFrame(index=pd.Index(factor_names(self.weight.shape[1])[:-1], dtype=object))
        link = "identity" if self.is_linear else "softplus"
        uns = {"pixnet_sd": {"link": link, "units": units, "fingerprint": fingerprint}}
        return TableModel.parse(ad.AnnData(self.weight, obs, var, uns=uns))

    def values(self, factors: NDArray[np.float32], index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Some outputs at some pixels.

        Parameters
        ----------
        factors
            Factors and tissue, shape (C + 1, rows, columns).
        index
            Which outputs.

        Returns
        -------
        Shape (outputs, rows, columns), float32.
        """
        flat = np.asarray(factors, dtype=np.float32).reshape(len(factors), -1)
        weight = np.concatenate([self.weight, self.bias[:, None]], axis=1)
        if self.unit is None:
            return (weight[index] @ flat).reshape(len(index), *factors.shape[1:])
        total = _softplus(weight[-1:] @ flat + _AT_ONE)
        found = _softplus(weight[index] @ flat + _AT_ONE) * self.unit[index, None]
        found[index != len(self.genes) - 1] *= total
        found *= flat[-1]
        return found.reshape(len(index), *factors.shape[1:])


def _softplus(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.logaddexp(x, np.float32(0))


def read_head(sdata: SpatialData, key: str) -> FactorHead:
    """Weights that belong to the image of factors ``key``.

    Raises
    ------
    ElementError
        When the table is missing.
    DataError
        When it is not one that `predict` writes, or does not fit the image.
    """
    name = head_key(key)
    if name not in sdata.tables:
        raise ElementError(f"The image {key!r} needs the table {name!r} beside it, which is not there. Predict again.")
    table = sdata.tables[name]
    n_channels = sdata.images[key]["scale0"]["image"].sizes["c"]
    link = table.uns.get("pixnet_sd", {}).get("link")
    if link not in ("identity", "softplus") or "bias" not in table.obs or table.n_vars != n_channels - 1:
        raise DataError(
            f"The table {name!r} does not hold the weights for the {n_channels} channels of {key!r}. Predict again, "
            "with overwrite=True."
        )
    known = (stored_note(sdata, "maps", key) or {}).get("fingerprint")
    if known is not None and known != table.uns["pixnet_sd"].get("fingerprint"):
        raise DataError(
            f"The table {name!r} in this object belongs to other factors than {key!r}, which were written since. Open "
            "the store anew, or predict again with overwrite=True."
        )
    columns = ["bias", "unit"] if link == "softplus" else ["bias"]
    found = (table.obs[column].to_numpy(np.float32) for column in columns)
    return FactorHead(list(table.obs_names.astype(str)), np.asarray(table.X, dtype=np.float32), *found)


LOCK_WAIT_S = 15.0


class GeneMapWriter:
    """Streams a gene map into a SpatialData object, in blocks of any order; open it with `GeneMapWriter.open`.

    The blocks lie beside the store until `commit` moves the finished element in. What a killed run has written is taken
    up by the next one with the same fingerprint. Use it as a context manager: leaving it without `commit` keeps the
    partial map for that. `write` may be called from several threads.

    Attributes
    ----------
    layout
        Shapes, chunks and blocks.
    blocks
        All blocks (row0, row1, col0, col1), aligned, in map pixels. Blocks that are never written are 0 and take no
        room.
    resumed
        Whether a partial map was taken up.
    """

    def __init__(
        self,
        sdata: SpatialData,
        *,
        key: str,
        genes: Sequence[str],
        layout: MapLayout,
        transforms: Mapping[str, BaseTransformation],
        sink: DiskSink | MemorySink,
        overwrite: bool,
        lock: ExitStack,
    ) -> None:
        self.layout = layout
        self.blocks = layout.blocks()
        self.resumed = isinstance(sink, DiskSink) and sink.resumed
        self._sdata, self._key, self._genes, self._transforms = sdata, key, list(genes), dict(transforms)
        self._sink, self._overwrite, self._lock = sink, overwrite, lock
        self._known = frozenset(self.blocks)
        self._handed_over = False

    @classmethod
    def open(
        cls,
        sdata: SpatialData,
        *,
        key: str,
        genes: Sequence[str],
        shape: tuple[int, int],
        pitch_image_px: float,
        image_key: str,
        fingerprint: str,
        block_px: int | None = None,
        whole_channels: bool = False,
        overwrite: bool = False,
    ) -> GeneMapWriter:
        """Start a gene map, or take up a partial one.

        Parameters
        ----------
        sdata
            The object that the map is for. A map for an object in memory stays in memory.
        key
            Name of the image element to be.
        genes
            Channel names, each once.
        shape
            Height and width in map pixels.
        pitch_image_px
            Image scale-0 pixels per map pixel.
        image_key
            Source image; the map gets all of its coordinate systems.
        fingerprint
            Text that is equal for two runs exactly when their values would be (model, slide, settings).
        block_px
            Side of a block, a power of two; default: the largest up to 512 with at most 64 MiB a block, 16 MiB with
            `whole_channels`.
        whole_channels
            Whether channels are needed all at once, as factors are.
        overwrite
            Whether an image of that name may be replaced.

        Raises
        ------
        StoreError
            Name taken, store read-only, too little disk or memory, another run writing the same map.
        DataError
            When a gene is named twice.
        """
        if len(set(genes)) != len(genes):
            twice = sorted({gene for gene in genes if list(genes).count(gene) > 1})
            raise DataError(f"Genes named twice: {', '.join(twice[:5])}. Channel names have to be unique.")
        layout = map_layout(len(genes), shape, block_px, whole_channels=whole_channels)
        check_target(sdata, {key: "images"}, overwrite=overwrite)
        transforms = map_transforms(image_transforms(sdata, image_key), pitch_image_px)
        store = local_store(sdata)
        sink: DiskSink | MemorySink
        with ExitStack() as stack:
            if store is None:
                sink = MemorySink(layout)
            else:
                work = work_folder(store)
                busy = f"Another run is writing the gene map {key!r} of {store}. Wait for it, or choose another key."
                stack.enter_context(hold_lock(work / f"map-{key}.lock", wait_s=LOCK_WAIT_S, busy=busy))
                identity = _identity(fingerprint, genes, layout, transforms)
                sink = DiskSink(
                    work / f"map-{key}", key=key, genes=genes, transforms=transforms, layout=layout, identity=identity
                )
                _check_room(sdata, key, overwrite, layout, sink)
            return cls(
                sdata,
                key=key,
                genes=genes,
                layout=layout,
                transforms=transforms,
                sink=sink,
                overwrite=overwrite,
                lock=stack.pop_all(),
            )

    @property
    def pending(self) -> list[Block]:
        """Blocks that are not there yet."""
        return [block for block in self.blocks if not self._sink.is_done(block)]

    def write(self, block: Block, values: NDArray[np.float32]) -> None:
        """Write one block into every level, then mark it done.

        Parameters
        ----------
        block
            One of `blocks`.
        values
            (genes, rows, columns), 0 off tissue.

        Raises
        ------
        DataError
            When the block is not one of `blocks`, the shape is another, or a value is not finite (plots of the map
            would fail).
        """
        row0, row1, col0, col1 = block
        if block not in self._known:
            raise DataError(f"{block} is not one of the blocks of the gene map.")
        if values.shape != (len(self._genes), row1 - row0, col1 - col0):
            raise DataError(f"Block {block} of {len(self._genes)} genes got an array of shape {values.shape}.")
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise DataError(f"The prediction in block {block} is not finite (NaN or infinity): the model is broken.")
        image = _padded(np.asarray(values, dtype=np.float32), block, self.layout)
        with self._sink.writing():
            for k, level in enumerate(self._sink.levels):
                image = image if k == 0 else _halved(image)
                row, col = row0 >> k, col0 >> k
                level[:, row : row + image.shape[1], col : col + image.shape[2]] = image
            self._sink.mark_done(block)

    def _done(self) -> str:
        """How many blocks are there, in words; nothing when there are none."""
        n_done = len(self.blocks) - len(self.pending)
        return f"{n_done} of {len(self.blocks)} blocks of the map" if n_done else ""

    @property
    def missing_bytes(self) -> int:
        """Bytes that the blocks to come take at most."""
        return int(self.layout.nbytes * len(self.pending) / len(self.blocks))

    def summary(self) -> str:
        """What will be written, in words."""
        layout = self.layout
        what, channels = ("factors", "channels") if layout.whole_channels else ("gene map", "genes")
        done = self._done() if self.resumed else ""
        return (
            f"{what} {self._key!r}: {layout.n_genes} {channels}, {layout.height} x {layout.width} pixels, at most "
            f"{size_text(layout.nbytes)}{f'; {done} are there already' if done else ''}"
        )

    def commit(
        self,
        elements: Mapping[str, Any] | None = None,
        regions: RegionResults | None = None,
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Move the finished map into the object, together with other elements, all at once.

        Parameters
        ----------
        elements
            Other elements of the same result (tissue mask), name → element.
        regions
            Table and shapes of the same result.
        provenance
            Section → key → info for ``sdata.attrs["pixnet_sd"]``.
        """
        regions = regions or RegionResults()
        others = {**(elements or {}), **regions.elements}
        staged = regions.staged
        if isinstance(self._sink, MemorySink):
            others[self._key] = self._sink.element(self._genes, self._transforms)
            provenance = {**(provenance or {}), WRITTEN: {self._key: image_stamp(others[self._key])}}
        else:
            staged = (*staged, self._sink.staged)
        self._handed_over = True  # a commit that fails half-way still needs it
        commit(self._sdata, others, overwrite=self._overwrite, staged=staged, provenance=provenance)
        self.close()

    def abort(self) -> None:
        """Delete what was written."""
        self._sink.discard()
        self.close()

    def close(self) -> None:
        """Let go of the partial map; another run may then take it up."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and isinstance(self._sink, DiskSink) and not self._handed_over:
            if self._sink.n_logged:
                logger.info("Blocks that are done are kept in %s; the same call goes on from there.", self._sink.folder)
            else:
                self._sink.discard()
        self.close()


def _identity(
    fingerprint: str, genes: Sequence[str], layout: MapLayout, transforms: Mapping[str, BaseTransformation]
) -> dict[str, Any]:
    """What two runs have to share for one to take up the other's partial map."""
    matrices = {
        system: transform.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for system, transform in transforms.items()
    }
    return {"fingerprint": fingerprint, "genes": list(genes), "layout": asdict(layout), "transforms": matrices}


def _check_room(sdata: SpatialData, key: str, overwrite: bool, layout: MapLayout, sink: DiskSink) -> None:
    """Disk for the blocks that are still to come."""
    blocks = layout.blocks()
    missing = sum(not sink.is_done(block) for block in blocks)
    needed = int(layout.nbytes * missing / len(blocks))
    try:
        check_target(sdata, {key: "images"}, overwrite=overwrite, needed_bytes=needed)
    except BaseException:
        if not sink.resumed:
            sink.discard()
        raise


def _padded(values: NDArray[np.float32], block: Block, layout: MapLayout) -> NDArray[np.float32]:
    """Zeros after the last predicted row and column, up to what the levels need."""
    height, width = layout.padded
    rows = height - block[1] if block[1] == layout.height else 0
    cols = width - block[3] if block[3] == layout.width else 0
    return np.pad(values, ((0, 0), (0, rows), (0, cols))) if rows or cols else values


def _halved(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of 2 × 2 pixels; nothing is made that is larger than it."""
    halved = image[:, ::2, ::2] + image[:, ::2, 1::2]
    halved += image[:, 1::2, ::2]
    halved += image[:, 1::2, 1::2]
    halved *= np.float32(0.25)
    return halved


@dataclass(frozen=True)
class GeneMapReader:
    """Level 0 of a gene map; can be sent to worker processes when the map is on disk.

    Attributes
    ----------
    genes
        Channel names.
    shape
        Height and width in map pixels, padding included.
    """

    genes: tuple[str, ...]
    shape: tuple[int, int]
    _array: Any = field(repr=False)

    def read(
        self, row0: int, row1: int, col0: int, col1: int, channels: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Values (channels, row1 − row0, col1 − col0); ``channels`` None: all of them.

        Raises
        ------
        DataError
            When the range leaves the map.
        """
        if not (0 <= row0 <= row1 <= self.shape[0] and 0 <= col0 <= col1 <= self.shape[1]):
            raise DataError(f"Rows {row0}:{row1}, columns {col0}:{col1} leave the map of {self.shape} pixels.")
        wanted = slice(None) if channels is None else np.asarray(channels, dtype=np.intp)
        if isinstance(self._array, zarr.Array):
            part = self._array.oindex[wanted, slice(row0, row1), slice(col0, col1)]
        else:
            part = self._array[wanted, row0:row1, col0:col1].compute(scheduler="synchronous")
        return np.asarray(part, dtype=np.float32)


def open_map(sdata: SpatialData, key: str) -> GeneMapReader:
    """Open a gene map for reading: straight from Zarr when it lies in the object's store, else from memory.

    Raises
    ------
    ElementError
        When there is no multiscale image of that name.
    StoreError
        As `check_not_rewritten`.
    """
    element = sdata.images.get(key)
    if element is None or "scale0" not in getattr(element, "children", {}):
        found = ", ".join(sdata.images) or "none"
        raise ElementError(f"{key!r} is not a gene map of this object. Its images: {found}.")
    image = element["scale0"]["image"]
    check_not_rewritten(sdata, key)
    genes = tuple(str(gene) for gene in image.coords["c"].values)
    shape = (image.sizes["y"], image.sizes["x"])
    folder = _folder(sdata, key)
    return GeneMapReader(genes, shape, image.data if folder is None else _level0(folder))


def check_not_rewritten(sdata: SpatialData, key: str) -> None:
    """Refuse a map that another run has replaced in the store since the object was opened.

    Its pixels would be read from the store, and named after the channels that the object remembers.

    Raises
    ------
    StoreError
        When channels or size in the store are others.
    """
    folder = _folder(sdata, key)
    if folder is None:
        return
    image = sdata.images[key]["scale0"]["image"]
    channels = [channel["label"] for channel in _ome(folder)["omero"]["channels"]]
    if channels != [str(gene) for gene in image.coords["c"].values] or _level0(folder).shape != image.shape:
        raise StoreError(
            f"The map {key!r} was replaced in the store since this object was opened. Open the store anew: "
            f"spatialdata.read_zarr({str(sdata.path)!r})."
        )


def _folder(sdata: SpatialData, key: str) -> Path | None:
    """Folder of a map whose pixels are read from the object's store; None for one in memory."""
    store = local_store(sdata)
    folder = None if store is None else store / "images" / key
    return folder if folder is not None and _is_backed_by(sdata.images[key], folder) else None


def is_as_written(sdata: SpatialData, key: str) -> bool:
    """Whether a gene map is what this package wrote, and nobody else since."""
    noted = stored_note(sdata, WRITTEN, key)
    folder = _folder(sdata, key)
    return noted is not None and noted == (image_stamp(sdata.images[key]) if folder is None else element_stamp(folder))


def read_block(
    sdata: SpatialData, key: str, row0: int, row1: int, col0: int, col1: int, channels: Sequence[int] | None = None
) -> NDArray[np.float32]:
    """One part of a gene map, float32 (channels, rows, columns); for many parts use `open_map` once."""
    return open_map(sdata, key).read(row0, row1, col0, col1, channels)


def _is_backed_by(element: Any, folder: Path) -> bool:
    """Whether an image in memory is, chunk by chunk, what lies in ``folder``."""
    files = get_dask_backing_files(element)
    return bool(files) and all(Path(file).resolve().is_relative_to(folder) for file in files)


def _level0(folder: Path) -> Any:
    return zarr.open_array(str(folder / _ome(folder)["multiscales"][0]["datasets"][0]["path"]), mode="r")


def _ome(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = read_json(folder / "zarr.json")["attributes"]["ome"]
    return metadata
