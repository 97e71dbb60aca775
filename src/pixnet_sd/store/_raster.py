"""Raster elements on the map grid: their transformations, and the tissue mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata.models import Labels2DModel
from spatialdata.transformations import BaseTransformation, Scale, Sequence, get_transformation

from ._map_layout import map_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

__all__ = ["image_transforms", "map_transforms", "tissue_labels"]


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
