"""Raster elements on the map grid: their transformations, and the tissue mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import BaseTransformation, Scale, Sequence, get_transformation, set_transformation
from xarray import DataArray, Dataset, DataTree

from ._map_layout import map_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

__all__ = ["image_pyramid", "image_transforms", "map_key", "map_transforms", "tissue_labels"]


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
    return {system: Sequence([scale, source]) for system, source in transforms.items()}


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
