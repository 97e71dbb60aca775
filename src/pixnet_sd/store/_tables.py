"""What regions become: tables that squidpy plots at the first call, shapes, and a small picture to plot them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import BaseTransformation

from pixnet_sd.errors import DataError

REGION_KEY = "region"
INSTANCE_KEY = "instance_id"


@dataclass(frozen=True)
class RowInfo:
    """Identity and place of m regions: all that their table and shapes hold, apart from expression."""

    ids: Any  # (m,) integers or text
    centres_px: NDArray[np.float64]  # (m, 2) x, y in image scale-0 pixels
    obs: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # column name → (m,) numbers

    def subset(self, keep: NDArray[Any]) -> RowInfo:
        """Select regions by mask (m,) or by position."""
        obs = {name: np.asarray(column)[keep] for name, column in self.obs.items()}
        return RowInfo(np.asarray(self.ids)[keep], self.centres_px[keep], obs)


class Expressed(NamedTuple):
    """Expression of m regions: ``X`` (m, genes), layers (m, genes) and columns of ``obs`` (m,) of their table."""

    x: NDArray[np.float32]
    layers: Mapping[str, NDArray[np.float32]] = {}
    obs: Mapping[str, NDArray[Any]] = {}


Describe = Callable[[int, int, "NDArray[np.float64] | None"], RowInfo]
"""``describe(start, stop, weight)``: the regions ``start`` … ``stop − 1``; weights (m,) are None for shapes."""
Express = Callable[["NDArray[np.float32]", "NDArray[np.float64]"], Expressed]
"""``express(sums, weight)``: expression from sums (m, columns) and weights (m,), both of which it may write over."""
MakeTable = Callable[[Expressed, RowInfo], AnnData]  # `region_table` with all given but the first two
MakeShapes = Callable[..., gpd.GeoDataFrame]  # an element of shapes with all given but centres and ``index``


def expression(
    sums: NDArray[np.float32], weight: NDArray[np.float64], aggregation: Literal["mean", "sum"]
) -> Expressed:
    """Take gene sums (m, genes) as they are, or divide them by the weights."""
    if aggregation == "sum":
        return Expressed(sums)
    weight = weight.astype(np.float32)  # single precision, as the sums: four times as fast
    return Expressed(np.divide(sums, weight[:, None], out=sums if sums.flags.owndata else None))


def region_table(
    values: Expressed,
    info: RowInfo,
    genes: Sequence[str],
    *,
    region: str,
    var: pd.DataFrame | None = None,
    uns: Mapping[str, Any] | None = None,
) -> AnnData:
    """Make the table of regions that annotates ``region``, a shapes or labels element.

    ``var`` has columns by gene, matched by name. A DataError tells of misfits, and of an id or gene named twice.
    """
    ids, names = pd.Index(info.ids), pd.Index([str(gene) for gene in genes])
    if values.x.shape != (len(ids), len(names)) or np.shape(info.centres_px) != (len(ids), 2):
        raise DataError(
            f"{len(ids)} regions and {len(names)} genes, but values of shape {values.x.shape} and centres of shape "
            f"{np.shape(info.centres_px)}."
        )
    for what, index in (("region", ids), ("gene", names)):
        if not index.is_unique:
            raise DataError(f"The {what} {index[index.duplicated()][0]} is named twice; make its names unique.")
    frame = pd.DataFrame(index=pd.Index(ids.astype(str)))
    for name, column in {**info.obs, **values.obs}.items():
        frame[name] = np.asarray(column)
    frame[REGION_KEY] = pd.Categorical([region] * len(ids))
    frame[INSTANCE_KEY] = ids.to_numpy()
    table = AnnData(
        X=np.ascontiguousarray(values.x, dtype=np.float32),
        obs=frame,
        layers={name: np.ascontiguousarray(layer, dtype=np.float32) for name, layer in values.layers.items()},
        var=pd.DataFrame(index=names) if var is None else var.reindex(names),
        obsm={"spatial": np.asarray(info.centres_px, dtype=np.float64)},
        uns=dict(uns or {}),
    )
    return TableModel.parse(table, region=region, region_key=REGION_KEY, instance_key=INSTANCE_KEY)


def spatial_library(
    library_id: str, spot_diameter_px: float, picture: Thumbnail | None = None
) -> dict[str, dict[str, Any]]:
    """Make ``uns["spatial"]``, which squidpy and scanpy read: a picture, and the diameter or side drawn on it."""
    key = library_id.replace("/", "_") or "pixnet"  # coordinate systems may be called "", and "/" would nest groups
    images, scale = ({}, 1.0) if picture is None else ({"hires": picture.rgb}, float(picture.scale))
    factors = {"spot_diameter_fullres": float(spot_diameter_px), "tissue_hires_scalef": scale}
    return {key: {"images": images, "scalefactors": factors}}


def circles_element(
    centres_px: NDArray[np.float64],
    radius_px: float,
    transforms: Mapping[str, BaseTransformation],
    *,
    index: Any = None,
) -> gpd.GeoDataFrame:
    """Make circles of one radius around centres (n, 2) x, y, all in image scale-0 pixels; ``index`` are ids (n,)."""
    points = np.asarray(shapely.points(np.asarray(centres_px, dtype=np.float64)))
    frame = gpd.GeoDataFrame({"radius": np.full(len(points), float(radius_px))}, geometry=points, index=_plain(index))
    return ShapesModel.parse(frame, transformations=dict(transforms))


def squares_element(
    centres_px: NDArray[np.float64],
    side_px: float,
    transforms: Mapping[str, BaseTransformation],
    *,
    angle_rad: float = 0.0,
    index: Any = None,
) -> gpd.GeoDataFrame:
    """Make squares as `circles_element` does circles, turned by an angle from the image's x towards its y axis."""
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    ring = side_px / 2 * np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    ring = ring @ np.array([[cos, sin], [-sin, cos]])
    points = (np.asarray(centres_px, dtype=np.float64)[:, None] + ring).reshape(-1, 2)
    each = np.arange(len(points) // len(ring) + 1)
    # from flat arrays in a quarter of the time that `shapely.polygons` takes
    squares = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, (each * len(ring), each))
    frame = gpd.GeoDataFrame(geometry=np.asarray(squares), index=_plain(index))
    return ShapesModel.parse(frame, transformations=dict(transforms))


def _plain(index: Any) -> Any:
    return None if index is None else np.asarray(index)  # without a name, which the file would get


class Thumbnail(NamedTuple):
    """A small image, uint8 (rows, columns, 3), and its pixels per image scale-0 pixel."""

    rgb: NDArray[np.uint8]
    scale: float


OVERSAMPLE = 4


def thumbnail(
    sdata: SpatialData, image_key: str, *, channels: Sequence[int] = (0, 1, 2), max_px: int = 2000
) -> Thumbnail:
    """Reduce an image until its longer side is at most ``max_px``; a DataError tells that it is not RGB uint8.

    Where the coarsest level that will do is far larger, pixels are skipped first, which needs little memory.
    """
    image: Any = sdata.images[image_key]
    levels = [node["image"].data for node in image.children.values()] if hasattr(image, "children") else [image.data]
    full_side = max(levels[0].shape[1:])
    level = next((array for array in reversed(levels) if max(array.shape[1:]) >= max_px), levels[0])
    if level.shape[0] < 3 or level.dtype != np.uint8:
        raise DataError(
            f"The image {image_key!r} has {level.shape[0]} channels of {level.dtype}; a thumbnail needs RGB in uint8."
        )
    side = max(level.shape[1:])
    factor = -(-side // max_px)
    skip = max(1, factor // OVERSAMPLE)
    mean_over = -(-factor // skip)
    pixels = np.asarray(level[list(channels), skip // 2 :: skip, skip // 2 :: skip])
    rgb = _block_mean(pixels, mean_over)
    return Thumbnail(np.ascontiguousarray(rgb.transpose(1, 2, 0)), side / (full_side * skip * mean_over))


def _block_mean(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average (channels, rows, columns) over ``factor`` × ``factor`` pixels; incomplete blocks repeat the edge."""
    if factor == 1:
        return image
    padded = np.pad(image, [(0, 0), *((0, -side % factor) for side in image.shape[1:])], mode="edge")
    total = np.zeros((image.shape[0], padded.shape[1] // factor, padded.shape[2] // factor), dtype=np.uint32)
    for row in range(factor):
        for col in range(factor):
            total += padded[:, row::factor, col::factor]
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)
