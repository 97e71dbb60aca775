"""Elements on the map grid: the gene map's image, its factors with the weights of every gene, the tissue mask.

A map of H x W pixels is stored in levels that halve each time. It is written in square blocks. A block of b pixels is
one file (a zarr shard) of b / 2^k pixels on level k, so no file is ever written twice, and a map of any shape has fewer
than 20,000. Inside a shard a few genes lie together (a chunk), so that one gene is read without the others.

A gene of a linear head is a weighted sum of the C channels of the feature map, ``D W + b``, with b where tissue is: the
last channel of the factors is 1 there and 0 elsewhere, so that averages of pixels, and with them the coarser levels,
need no exception. Densities are what a link makes of such sums, ``unit softplus(D W + b)``, pixel by pixel, times that
of all genes (see `model.Head`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, TableModel
from spatialdata.transformations import BaseTransformation, Scale, get_transformation, set_transformation
from spatialdata.transformations import Sequence as InTurn
from xarray import DataArray, Dataset, DataTree
from zarr.storage import LocalStore

from pixnet_sd._notes import note_of, stored_note, table_note, table_uns
from pixnet_sd.errors import DataError, ElementError, StoreError
from pixnet_sd.store import WRITTEN, element_stamp, image_stamp, local_store, read_json

Block = tuple[int, int, int, int]  # row0, row1, col0, col1 in map pixels

MAX_FILES = 20_000
MAX_BLOCK_BYTES = 64 * 2**20
MAX_WHOLE_BYTES = 16 * 2**20  # of a block whose channels are read together
BLOCK_PX = (32, 512)  # side of a block
COARSEST_PX = 512
CHUNK_BYTES = 4 * 2**20
CHUNK_GENES = 8
FLOAT_BYTES = 4


@dataclass(frozen=True)
class MapLayout:
    """How a gene map lies on disk."""

    n_genes: int
    height: int  # map pixels that are predicted
    width: int
    block_px: int  # a power of two
    n_levels: int  # the full one included, at least 2
    whole_channels: bool = False  # a chunk holds all channels: of factors all are needed at once, of genes a few

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width rounded up to a multiple of 2^(levels - 1): every level is exactly half of the one below."""
        factor = 2 ** (self.n_levels - 1)
        return -(-self.height // factor) * factor, -(-self.width // factor) * factor

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """Channels, height, width of a level."""
        height, width = self.padded
        return self.n_genes, height >> level, width >> level

    def level_chunks(self, level: int) -> tuple[int, int, int]:
        """Chunk shape of a level: one block wide; more channels the coarser, to keep the number of chunks down."""
        height, width = (min(self.block_px, side) for side in self.padded)
        genes = self.n_genes
        if not self.whole_channels:
            fitting = max(1, CHUNK_BYTES // (height * width * FLOAT_BYTES))
            genes = min(genes, min(fitting, CHUNK_GENES) << level)
        return genes, height >> level, width >> level

    def level_shards(self, level: int) -> tuple[int, int, int] | None:
        """Shape of a level's files, all channels of a block; None where that is one chunk."""
        genes, height, width = self.level_chunks(level)
        return None if genes == self.n_genes else (-(-self.n_genes // genes) * genes, height, width)

    def blocks(self) -> list[Block]:
        """All blocks, row by row, clipped to the predicted pixels."""
        step = self.block_px
        return [
            (row, min(row + step, self.height), col, min(col + step, self.width))
            for row in range(0, self.height, step)
            for col in range(0, self.width, step)
        ]

    @property
    def n_files(self) -> int:
        """Files of all blocks."""
        return self.n_levels * prod(-(-side // self.block_px) for side in (self.height, self.width))

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of all levels, as if all of it were tissue."""
        return sum(FLOAT_BYTES * prod(self.level_shape(level)) for level in range(self.n_levels))


def map_layout(
    n_genes: int, shape: tuple[int, int], block_px: int | None = None, *, whole_channels: bool = False
) -> MapLayout:
    """Lay out a map of ``n_genes`` over ``shape`` (height, width) map pixels.

    Levels are added until the longer side is at most 512 pixels, but no more than a block can be halved. Blocks are the
    largest that stay under a limit of bytes, and larger where there would be too many files.
    """
    height, width = shape
    if n_genes < 1 or height < 1 or width < 1:
        raise StoreError(f"A gene map of {n_genes} genes over {height} x {width} pixels is empty.")
    if block_px is not None and (block_px < 2 or block_px & (block_px - 1)):
        raise StoreError(f"block_px is {block_px}; it has to be a power of two, at least 2.")
    most, (least_px, block) = MAX_WHOLE_BYTES if whole_channels else MAX_BLOCK_BYTES, BLOCK_PX
    while block > least_px and n_genes * block * block * FLOAT_BYTES > most:
        block //= 2
    block = block_px or block
    while True:
        halvings = 1
        while -(-max(height, width) >> halvings) > COARSEST_PX and 2 << halvings <= block:
            halvings += 1
        layout = MapLayout(n_genes, height, width, block, halvings + 1, whole_channels)
        if layout.n_files < MAX_FILES:
            return layout
        block *= 2


TISSUE = "tissue"
_AT_ONE = np.float32(math.log(math.e - 1))  # where softplus is 1


def map_key(key_added: str) -> str:
    """Name of the image of a gene map."""
    return f"{key_added}_map"


def factors_key(key_added: str) -> str:
    """Name of the image of the factors."""
    return f"{key_added}_factors"


def head_key(key: str) -> str:
    """Name of the table of weights that belongs to an image of factors."""
    return f"{key}_head"


def factor_names(n_factors: int) -> list[str]:
    """Name the channels of the image of factors: the factors, then where tissue is."""
    return [*(f"factor_{k}" for k in range(n_factors)), TISSUE]


def image_pyramid(
    levels: Iterable[Any], channels: Iterable[str], transforms: Mapping[str, BaseTransformation]
) -> DataTree:
    """Make a multiscale image, as `spatialdata.read_zarr` does, of dask arrays that halve from level to level."""
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
    """Transformations of a raster whose pixels are ``pitch_image_px`` image pixels wide."""
    # pixel i covers [i, i + 1) in both grids, so a scale alone is right
    scale = Scale([pitch_image_px, pitch_image_px], axes=("x", "y"))
    return {system: InTurn([scale, source]) for system, source in transforms.items()}


def tissue_labels(mask: NDArray[np.bool_], pitch_image_px: float, transforms: Mapping[str, BaseTransformation]) -> Any:
    """Make labels, 1 tissue, 0 glass, of a mask (height, width) on the map grid; ``transforms`` are the image's."""
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


@dataclass(frozen=True)
class FactorHead:
    """Weights that make genes of C factors."""

    genes: list[str]  # outputs; of densities the last is the sum over all genes
    weight: NDArray[np.float32]  # W, (M, C)
    bias: NDArray[np.float32]  # b, (M,)
    unit: NDArray[np.float32] | None = None  # of densities what a link's 1 stands for, (M,); None for a linear head

    @property
    def is_linear(self) -> bool:
        """Whether averages of factors give averages of genes."""
        return self.unit is None

    def table(self, units: str, fingerprint: str) -> ad.AnnData:
        """Make the element: rows are outputs, columns factors; ``fingerprint`` is that of the factors."""
        obs = pd.DataFrame({"bias": self.bias}, index=pd.Index(self.genes, dtype=object))
        if self.unit is not None:
            obs["unit"] = self.unit
        var = pd.DataFrame(index=pd.Index(factor_names(self.weight.shape[1])[:-1], dtype=object))
        link = "identity" if self.is_linear else "softplus"
        uns = table_uns({"link": link, "units": units, "fingerprint": fingerprint})
        return TableModel.parse(ad.AnnData(self.weight, obs, var, uns=uns))

    def values(self, factors: NDArray[np.float32], index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Compute the outputs ``index`` (k,) of factors and tissue (C + 1, rows, columns), as (k, rows, columns)."""
        flat = np.asarray(factors, dtype=np.float32).reshape(len(factors), -1)
        weight = np.concatenate([self.weight, self.bias[:, None]], axis=1)
        if self.unit is None:
            return (weight[index] @ flat).reshape(len(index), *factors.shape[1:])
        total = _softplus(weight[-1:] @ flat + _AT_ONE)
        values = _softplus(weight[index] @ flat + _AT_ONE) * self.unit[index, None]
        values[index != len(self.genes) - 1] *= total
        values *= flat[-1]
        return values.reshape(len(index), *factors.shape[1:])


def _softplus(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.logaddexp(x, np.float32(0))


def read_head(sdata: SpatialData, key: str) -> FactorHead:
    """Read the weights that belong to the image of factors ``key``, and check that they fit it."""
    name = head_key(key)
    if name not in sdata.tables:
        raise ElementError(f"The image {key!r} needs the table {name!r} beside it, which is not there. Predict again.")
    table = sdata.tables[name]
    n_channels = sdata.images[key]["scale0"]["image"].sizes["c"]
    link = note_of(table_note(table), "link")
    if link not in ("identity", "softplus") or "bias" not in table.obs or table.n_vars != n_channels - 1:
        raise DataError(
            f"The table {name!r} does not hold the weights for the {n_channels} channels of {key!r}. Predict again, "
            "with overwrite=True."
        )
    known = (stored_note(sdata, "maps", key) or {}).get("fingerprint")
    if known is not None and known != table_note(table).get("fingerprint"):
        raise DataError(
            f"The table {name!r} in this object belongs to other factors than {key!r}, which were written since. Open "
            "the store anew, or predict again with overwrite=True."
        )
    columns = ["bias", "unit"] if link == "softplus" else ["bias"]
    read = (table.obs[column].to_numpy(np.float32) for column in columns)
    return FactorHead(list(table.obs_names.astype(str)), np.asarray(table.X, dtype=np.float32), *read)


@dataclass(frozen=True)
class GeneMapReader:
    """Level 0 of a gene map; can be sent to worker processes when the map is on disk."""

    genes: tuple[str, ...]
    shape: tuple[int, int]  # map pixels, padding included
    _array: Any = field(repr=False)

    def read(self, channels: Sequence[int], window: Sequence[int]) -> NDArray[np.float32]:
        """Read (channels, rows, columns) of a window, row0, row1, col0, col1."""
        row0, row1, col0, col1 = window
        if not (0 <= row0 <= row1 <= self.shape[0] and 0 <= col0 <= col1 <= self.shape[1]):
            raise DataError(f"Rows {row0}:{row1}, columns {col0}:{col1} leave the map of {self.shape} pixels.")
        wanted = np.asarray(channels, dtype=np.intp)
        if isinstance(self._array, zarr.Array):
            values = self._array.oindex[wanted, slice(row0, row1), slice(col0, col1)]
        else:
            values = self._array[wanted, row0:row1, col0:col1].compute(scheduler="synchronous")
        return np.asarray(values, dtype=np.float32)


def open_map(sdata: SpatialData, key: str) -> GeneMapReader:
    """Open a gene map for reading: straight from Zarr when it lies in the object's store, else from memory."""
    element = sdata.images.get(key)
    if element is None or "scale0" not in getattr(element, "children", {}):
        names = ", ".join(sdata.images) or "none"
        raise ElementError(f"{key!r} is not a gene map of this object. Its images: {names}.")
    image = element["scale0"]["image"]
    check_not_rewritten(sdata, key)
    genes = tuple(str(gene) for gene in image.coords["c"].values)
    folder = _folder(sdata, key)
    return GeneMapReader(genes, (image.sizes["y"], image.sizes["x"]), image.data if folder is None else _level0(folder))


def check_not_rewritten(sdata: SpatialData, key: str) -> None:
    """Refuse a map that was replaced in the store since the object, which remembers its channels, was opened."""
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


def is_as_written(sdata: SpatialData, key: str) -> bool:
    """Whether a gene map is what this package wrote, and nobody else since."""
    noted, folder = stored_note(sdata, WRITTEN, key), _folder(sdata, key)
    return noted is not None and noted == (image_stamp(sdata.images[key]) if folder is None else element_stamp(folder))


def _folder(sdata: SpatialData, key: str) -> Path | None:
    """Folder of a map whose levels are read as they lie in the object's store; None for one in memory, or computed."""
    store = local_store(sdata)
    if store is None:
        return None
    folder = store / "images" / key
    levels = getattr(sdata.images[key], "children", {})
    sources = [_source(level["image"].data) for level in levels.values()]
    return folder if sources and all(source and source.resolve().is_relative_to(folder) for source in sources) else None


def _source(array: Any) -> Path | None:
    """Folder of the Zarr array that a dask array reads, all of it and nothing else; None where there is none."""
    # As `dask.array.from_zarr` names it; a look at every node, as spatialdata's, takes a second on a large map.
    layers, name = getattr(getattr(array, "dask", None), "layers", {}), f"original-{getattr(array, 'name', '')}"
    source = layers[name][name] if layers.keys() == {name, array.name} else None
    if isinstance(source, zarr.Array) and isinstance(source.store, LocalStore):
        return Path(source.store.root) / source.path
    return None


def level_folders(folder: Path) -> list[Path]:
    """Folders of the levels of an image in ``folder``, the finest first."""
    return [folder / dataset["path"] for dataset in _ome(folder)["multiscales"][0]["datasets"]]


def _level0(folder: Path) -> Any:
    return zarr.open_array(str(level_folders(folder)[0]), mode="r")


def _ome(folder: Path) -> Any:
    return read_json(folder / "zarr.json")["attributes"]["ome"]
