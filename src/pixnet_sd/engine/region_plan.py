"""Which pixels of the map the requested regions need, and by what their sums are divided.

The map is zero off tissue, and a region sums the map (Eq. 5), so glass inside a region adds nothing; a mean divides by
the tissue pixels. A region that lies on glass altogether was still asked for by its user: it is predicted from all of
its pixels, and the network has to run there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pixnet_sd.nn.aggregation import Grid, Window, build_operator, count_pixels
from pixnet_sd.nn.regions import Regions

__all__ = ["RegionPlan", "plan_regions", "windows_of"]

_REACH = 2  # map pixels around a window that its bilinear weights can reach


@dataclass(frozen=True)
class RegionPlan:
    """Regions to predict.

    Attributes
    ----------
    regions
        n regions, working pixels.
    grid
        Map grid.
    tissue
        Tissue mask on it.
    n_px
        Pixels of each region inside the slide; 0 marks one that holds no pixel centre.
    divisor
        By which a sum is divided to give a mean: tissue pixels, or all pixels for a region on glass; 0: off the slide.
    on_glass
        Regions without tissue.
    glass_support
        Map pixels off tissue that regions on glass need.
    """

    regions: Regions
    grid: Grid
    tissue: NDArray[np.bool_]
    n_px: NDArray[np.float64]
    divisor: NDArray[np.float64]
    on_glass: NDArray[np.bool_]
    glass_support: NDArray[np.bool_]

    def operator(self, window: Window) -> tuple[NDArray[np.intp], sparse.csr_array]:
        """Regions that a window touches, and their weights on the window's map pixels, tissue taken into account."""
        index, matrix = _touching(self.regions, self.grid, window, self.n_px)
        mask = self.tissue[window.row0 : window.row1, window.col0 : window.col1].ravel()
        kept = mask[matrix.indices] | np.repeat(self.on_glass[index], np.diff(matrix.indptr))
        matrix = sparse.csr_array((matrix.data * kept, matrix.indices, matrix.indptr), shape=matrix.shape)
        return index, matrix


def windows_of(grid: Grid, side: int) -> Iterator[Window]:
    """Square windows, map pixels, that tile a grid; those at the far edges are cut off."""
    for row0 in range(0, grid.height, side):
        for col0 in range(0, grid.width, side):
            yield Window(row0, min(row0 + side, grid.height), col0, min(col0 + side, grid.width))


def _touching(
    regions: Regions, grid: Grid, window: Window, n_px: NDArray[np.float64]
) -> tuple[NDArray[np.intp], sparse.csr_array]:
    """Regions whose boxes reach a window, and their operator's columns there."""
    row0, row1, col0, col1 = window
    low = np.array([col0 - _REACH, row0 - _REACH]) * grid.stride
    high = np.array([col1 + _REACH, row1 + _REACH]) * grid.stride
    box = regions.bounds
    index = np.nonzero(np.all((box[:, 2:] >= low) & (box[:, :2] <= high), axis=1))[0]
    return index, build_operator(regions.subset(index), grid, window=window, n_px=n_px[index]).matrix


def plan_regions(regions: Regions, grid: Grid, tissue: NDArray[np.bool_], window_side: int) -> RegionPlan:
    """Find out what the regions need before the network runs.

    Parameters
    ----------
    regions
        In working pixels.
    grid
        Map grid.
    tissue
        Tissue mask, shape (grid.height, grid.width).
    window_side
        Map pixels looked at together.

    Returns
    -------
    The plan.
    """
    n_px = count_pixels(regions, grid.height * grid.stride, grid.width * grid.stride)
    whole, on_tissue = np.zeros(len(regions)), np.zeros(len(regions))
    for window in windows_of(grid, window_side):
        index, matrix = _touching(regions, grid, window, n_px)
        mask = tissue[window.row0 : window.row1, window.col0 : window.col1].ravel()
        whole[index] += matrix.sum(axis=1)
        on_tissue[index] += matrix @ mask.astype(np.float64)
    on_glass = on_tissue <= 1e-9 * np.maximum(whole, 1)
    divisor = np.where(on_glass, whole, on_tissue)
    support = _support(regions, grid, window_side, n_px, on_glass) & ~tissue
    return RegionPlan(regions, grid, tissue, n_px, divisor, on_glass, support)


def _support(regions: Regions, grid: Grid, side: int, n_px: NDArray[Any], chosen: NDArray[np.bool_]) -> Any:
    """Map pixels on which some regions have weight."""
    support = np.zeros((grid.height, grid.width), bool)
    index = np.nonzero(chosen)[0]
    if len(index):
        picked = regions.subset(index)
        for window in windows_of(grid, side):
            _, matrix = _touching(picked, grid, window, n_px[index])
            part = np.zeros(window.shape[0] * window.shape[1], bool)
            part[matrix.indices[matrix.data > 0]] = True
            support[window.row0 : window.row1, window.col0 : window.col1] = part.reshape(window.shape)
    return support
