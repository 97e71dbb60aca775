"""Eq. 4-5 to the letter: every gene resized to the slide, every region a boolean mask. The fast path must equal it.

Nothing here is shared with `pixnet_sd.model`: points are tested one by one, and torch does the resizing.
"""

from __future__ import annotations

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional

from pixnet_sd.geometry import Circles, Grid, LabelGrid, Polygons, Regions

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]


def inside(regions: Regions, k: int, x: Float, y: Float) -> Bool:
    """Which of some points lie in region k."""
    if isinstance(regions, Circles):
        cx, cy = regions.centre_xy[k]
        return np.asarray((x - cx) ** 2 + (y - cy) ** 2 <= regions.radius[k] ** 2)
    if isinstance(regions, Polygons):
        return np.logical_xor.reduce([shapely.contains_xy(ring, x, y) for ring in rings(regions, k)])
    assert isinstance(regions, LabelGrid)
    xy = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    col, row = np.rint(np.linalg.solve(regions.to_grid, xy)[:2] - 0.5).astype(int)  # nearest centre of a label pixel
    height, width = regions.labels.shape
    on = (col >= 0) & (row >= 0) & (col < width) & (row < height)
    labels = regions.labels[np.clip(row, 0, height - 1), np.clip(col, 0, width - 1)]
    return np.asarray(on & (labels == regions.ids[k])).reshape(x.shape)


def rings(polygons: Polygons, k: int) -> list[shapely.Polygon]:
    """The rings of region k, each as a polygon without holes."""
    ends = zip(polygons.ring_offsets[:-1], polygons.ring_offsets[1:], strict=True)
    mine = [pair for pair, region in zip(ends, polygons.ring_region, strict=True) if region == k]
    return [shapely.Polygon(polygons.vertices[start:stop]) for start, stop in mine]


def masks(regions: Regions, height: int, width: int) -> Bool:
    """Pixels whose centre lies in each region, shape (n, height, width)."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.array([inside(regions, k, x, y) for k in range(len(regions))], bool).reshape(-1, height, width)


def resize(low: Tensor, stride: int) -> Tensor:
    """Eq. 4: maps (M, h, w) -> (M, h * stride, w * stride)."""
    size = (low.shape[1] * stride, low.shape[2] * stride)
    return functional.interpolate(low[None], size, mode="bilinear", align_corners=False)[0]


def sums(full: Tensor, inside: Bool) -> Tensor:
    """Eq. 5: maps (M, H, W) and masks (n, H, W) -> (n, M)."""
    return torch.stack([full[:, torch.from_numpy(mask)].sum(1) for mask in inside])


def at_points(low: Tensor, xy: Float, stride: int) -> Tensor:
    """The resized maps (M, h, w) between pixel centres, at points (n, 2) -> (n, M)."""
    size = np.array([low.shape[2], low.shape[1]]) * stride
    where = torch.from_numpy(xy / size * 2 - 1)[None, None]
    return functional.grid_sample(low[None], where, padding_mode="border", align_corners=False)[0, :, 0].T


def aggregates(regions: Regions, low: Tensor, stride: int) -> tuple[Tensor, Float]:
    """What `build_operator` promises, of maps (M, h, w) in float64: sums (n, M), and the pixels they are of, (n,).

    A region without a pixel centre counts with the map
    at its centre times its area (1 px² if it has none), when that is on the slide, else not at all.
    """
    height, width = low.shape[1] * stride, low.shape[2] * stride
    mask = masks(regions, height, width)
    n_px = mask.sum((1, 2)).astype(np.float64)
    total = sums(resize(low, stride), mask)
    for k in np.nonzero(n_px == 0)[0]:
        centre, area = regions.centre_xy[k], regions.area[k] or 1.0
        if (centre >= 0).all() and (centre < (width, height)).all():
            n_px[k] = area
            total[k] = at_points(low, centre[None], stride)[0] * area
    return total, n_px


def dense_operator(regions: Regions, grid: Grid) -> tuple[Float, Float]:
    """A as a dense matrix (n, h * w), by aggregating maps that are one at one pixel, and the pixels of each region."""
    n = grid.height * grid.width
    one_hot = torch.eye(n, dtype=torch.float64).reshape(n, grid.height, grid.width)
    total, n_px = aggregates(regions, one_hot, grid.stride)
    return total.numpy(), n_px


def example_map(grid: Grid) -> Tensor:
    """Three random maps (3, h, w) in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, grid.height, grid.width, dtype=torch.float64, generator=generator)


def literal_expectation(mean: np.ndarray, alpha: np.ndarray, total: np.ndarray) -> np.ndarray:
    """E[log1p(1e4 y / total)] as a sum over all counts that have a probability."""
    y = np.arange(30_000)[:, None, None]
    probability = stats.nbinom.pmf(y, 1 / alpha, 1 / (1 + alpha * mean))
    return (probability * np.log1p(1e4 * y / total)).sum(axis=0)
