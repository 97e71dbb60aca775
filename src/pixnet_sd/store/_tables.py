"""A small copy of the slide image, for plots of tables.

Predicted expression of regions as a table that squidpy can plot at the first call.

Regions as shapes elements, in pixels of the image's scale 0 and with all of its coordinate systems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from spatialdata.models import ShapesModel, TableModel

from pixnet_sd.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData
    from spatialdata.transformations import BaseTransformation

__all__ = ["INSTANCE_KEY", "REGION_KEY", "Thumbnail", "circles_element", "region_table", "squares_element", "thumbnail"]

OVERSAMPLE = 4


@dataclass(frozen=True)
class Thumbnail:
    """A small image and its scale.

    Attributes
    ----------
    rgb
        uint8 (rows, columns, 3).
    scale
        Thumbnail pixels per image scale-0 pixel.
    """

    rgb: NDArray[np.uint8]
    scale: float


def thumbnail(
    sdata: SpatialData, image_key: str, *, channels: Sequence[int] = (0, 1, 2), max_px: int = 2000
) -> Thumbnail:
    """Reduce an RGB image until its longer side is at most ``max_px``.

    It starts from the coarsest level that is not smaller than that, and skips pixels first where the level is far
    larger, so that a slide without levels needs little memory.

    Raises
    ------
    DataError
        When the image has fewer than three channels or its pixels are not uint8.
    """
    levels = _levels(sdata.images[image_key])
    full_side = max(levels[0].shape[1:])
    level = next((array for array in reversed(levels) if max(array.shape[1:]) >= max_px), levels[0])
    if level.shape[0] < 3 or level.dtype != np.uint8:
        raise DataError(
            f"The image {image_key!r} has {level.shape[0]} channels of {level.dtype}; a thumbnail needs RGB in uint8."
        )
    factor = -(-max(level.shape[1:]) // max_px)
    skip = max(1, factor // OVERSAMPLE)
    pixels = np.asarray(level[list(channels), skip // 2 :: skip, skip // 2 :: skip])
    rgb = _block_mean(pixels, -(-factor // skip))
    shrunk = full_side / max(level.shape[1:]) * skip * -(-factor // skip)
    return Thumbnail(np.ascontiguousarray(rgb.transpose(1, 2, 0)), 1 / shrunk)


def _levels(element: Any) -> list[Any]:
    """Arrays of all levels, finest first."""
    if hasattr(element, "children"):
        return [element[f"scale{k}"]["image"].data for k in range(len(element.children))]
    return [element.data]


def _block_mean(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Mean over ``factor`` × ``factor`` pixels; the last, incomplete ones repeat the edge."""
    if factor == 1:
        return image
    pad = [(0, 0)] + [(0, -side % factor) for side in image.shape[1:]]
    padded = np.pad(image, pad, mode="edge")
    total = np.zeros((image.shape[0], padded.shape[1] // factor, padded.shape[2] // factor), dtype=np.uint32)
    for row in range(factor):
        for col in range(factor):
            total += padded[:, row::factor, col::factor]
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


REGION_KEY = "region"
INSTANCE_KEY = "instance_id"


def region_table(
    values: NDArray[np.float32],
    genes: Sequence[str],
    instance_ids: Sequence[Any] | NDArray[Any] | pd.Index,
    *,
    region: str,
    centres_px: NDArray[np.float64],
    spot_diameter_px: float,
    picture: Thumbnail | None = None,
    library_id: str = "pixnet",
    layers: Mapping[str, NDArray[np.float32]] | None = None,
    obs: Mapping[str, Any] | pd.DataFrame | None = None,
    var: pd.DataFrame | None = None,
    uns: Mapping[str, Any] | None = None,
) -> AnnData:
    """Table of regions × genes that annotates a shapes or labels element.

    Parameters
    ----------
    values
        (n, genes) predicted expression.
    genes
        Names of the columns of ``values``.
    instance_ids
        (n,) index values of the regions in the element: integers or text, each once.
    region
        Name of the element.
    centres_px
        (n, 2) x, y in image scale-0 pixels, kept as ``obsm["spatial"]``.
    spot_diameter_px
        Diameter at which squidpy draws a region, in image scale-0 pixels: that of the circle, the side of a square.
    picture
        Small copy of the slide that squidpy draws under the regions.
    library_id
        Key of ``uns["spatial"]``.
    layers
        Other values, each (n, genes).
    obs
        More columns by region, such as ``area_um2``.
    var
        Columns by gene, such as the held-out Pearson correlation; matched to ``genes`` by name.
    uns
        More unstructured entries.

    Returns
    -------
    AnnData
        ``X`` float32, ``obs`` with ``region``, ``instance_id`` and the columns given, ``obsm["spatial"]`` and
        ``uns["spatial"]``.

    Raises
    ------
    DataError
        When lengths do not fit, or an id or gene is named twice.
    """
    ids = pd.Index(instance_ids)
    _check(values, list(genes), ids, centres_px)
    frame = pd.DataFrame(index=pd.Index(ids.astype(str)))
    for name, column in (obs if obs is not None else {}).items():
        frame[str(name)] = np.asarray(column)  # by position: the ids of `obs`, if it has any, are not looked at
    frame[REGION_KEY] = pd.Categorical([region] * len(ids))
    frame[INSTANCE_KEY] = ids.to_numpy()
    columns = pd.DataFrame(index=pd.Index([str(gene) for gene in genes]))
    if var is not None:
        columns = var.reindex(columns.index)
    table = AnnData(
        X=np.ascontiguousarray(values, dtype=np.float32),
        obs=frame,
        layers={name: np.ascontiguousarray(layer, dtype=np.float32) for name, layer in (layers or {}).items()},
        var=columns,
        obsm={"spatial": np.asarray(centres_px, dtype=np.float64)},
        uns={**(uns or {}), "spatial": {_safe_key(library_id): _library(picture, spot_diameter_px)}},
    )
    return TableModel.parse(table, region=region, region_key=REGION_KEY, instance_key=INSTANCE_KEY)


def _check(values: NDArray[np.float32], genes: list[str], ids: pd.Index, centres_px: NDArray[np.float64]) -> None:
    """Lengths and uniqueness."""
    n = len(ids)
    if values.shape != (n, len(genes)) or np.shape(centres_px) != (n, 2):
        raise DataError(
            f"{n} regions and {len(genes)} genes, but values of shape {values.shape} and centres of shape "
            f"{np.shape(centres_px)}."
        )
    for what, names in (("region", ids), ("gene", pd.Index(genes))):
        if not names.is_unique:
            raise DataError(f"The {what} {names[names.duplicated()][0]} is named twice; make its names unique.")


def _safe_key(library_id: str) -> str:
    """A key that can be stored: coordinate systems may be called ``""``, and ``/`` would nest groups."""
    return library_id.replace("/", "_") or "pixnet"


def _library(picture: Thumbnail | None, spot_diameter_px: float) -> dict[str, Any]:
    """The entry of ``uns["spatial"]`` that squidpy and scanpy read."""
    scalefactors = {"spot_diameter_fullres": float(spot_diameter_px)}
    if picture is None:
        return {"images": {}, "scalefactors": {**scalefactors, "tissue_hires_scalef": 1.0}}
    return {
        "images": {"hires": picture.rgb},
        "scalefactors": {**scalefactors, "tissue_hires_scalef": float(picture.scale)},
    }


def circles_element(
    centres_px: NDArray[np.float64],
    radius_px: float,
    transforms: Mapping[str, BaseTransformation],
    *,
    index: Sequence[Any] | NDArray[Any] | None = None,
) -> gpd.GeoDataFrame:
    """Circles of one radius.

    Parameters
    ----------
    centres_px
        (n, 2) x, y in image scale-0 pixels.
    radius_px
        Radius in image scale-0 pixels.
    transforms
        Transformations of the image (`image_transforms`).
    index
        Instance ids; default 0 … n − 1.
    """
    frame = gpd.GeoDataFrame({"radius": np.full(len(centres_px), float(radius_px))}, geometry=_points(centres_px))
    return _parsed(frame, transforms, index)


def squares_element(
    centres_px: NDArray[np.float64],
    side_px: float,
    transforms: Mapping[str, BaseTransformation],
    *,
    angle_rad: float = 0.0,
    index: Sequence[Any] | NDArray[Any] | None = None,
) -> gpd.GeoDataFrame:
    """Squares of one size.

    Parameters
    ----------
    centres_px
        (n, 2) x, y in image scale-0 pixels.
    side_px
        Side in image scale-0 pixels.
    transforms
        Transformations of the image (`image_transforms`).
    angle_rad
        Angle from the image's x axis towards its y axis by which the squares are turned.
    index
        Instance ids; default 0 … n − 1.
    """
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    ring = side_px / 2 * np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    ring = ring @ np.array([[cos, sin], [-sin, cos]])
    points = (np.asarray(centres_px, dtype=np.float64)[:, None] + ring).reshape(-1, 2)
    each = np.arange(len(points) // len(ring) + 1)
    # from flat arrays in a quarter of the time that `shapely.polygons` takes
    squares = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points, (each * len(ring), each))
    frame = gpd.GeoDataFrame(geometry=np.asarray(squares))
    return _parsed(frame, transforms, index)


def _points(centres_px: NDArray[np.float64]) -> NDArray[np.object_]:
    return np.asarray(shapely.points(np.asarray(centres_px, dtype=np.float64)))


def _parsed(
    frame: gpd.GeoDataFrame, transforms: Mapping[str, BaseTransformation], index: Sequence[Any] | NDArray[Any] | None
) -> gpd.GeoDataFrame:
    if index is not None:
        frame.index = np.asarray(index)
    return ShapesModel.parse(frame, transformations=dict(transforms))
