"""Part of a gene map in memory: the pixels that a view shows, from the level that suits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from spatialdata import get_pyramid_levels
from xarray import DataArray, DataTree

from pixnet_sd._errors import PixNetError
from pixnet_sd.slide import Slide, affine_matrix

from ._view import View, coarsest_level, shifted

__all__ = ["Raster", "read_map"]


@dataclass(frozen=True, eq=False)
class Raster:
    """Pixels and where they are.

    Attributes
    ----------
    values
        (channels, rows, columns) float32; NaN where there is nothing.
    to_um
        Map of (x, y, 1) from pixels of `values` to µm, shape (3, 3).
    """

    values: NDArray[np.float32]
    to_um: NDArray[np.float64]


def read_map(tree: DataTree, tissue: Any, slide: Slide, view: View, *, scale: str | None = None) -> Raster:
    """Read what is shown of a gene map, without what lies off tissue.

    Parameters
    ----------
    tree
        Multiscale image, as `get.gene_map` gives it.
    tissue
        Labels element of its tissue (0: none); None: pixels that are 0 in all channels are off tissue.
    slide
        The slide that the map lies on.
    view
        What is shown.
    scale
        Level, ``"scale0"`` or ``"full"`` for the finest; default: the coarsest that is fine enough.

    Raises
    ------
    PixNetError
        There is no such level.
    """
    levels = list(get_pyramid_levels(tree))
    to_um = _um_from_image(slide) @ np.linalg.inv(slide.to_system) @ affine_matrix(tree, slide.coordinate_system)
    pitch = float(np.sqrt(abs(np.linalg.det(to_um[:2, :2]))))
    ratios = [_ratio(levels[0], level) for level in levels]
    k = coarsest_level([pitch * max(r) for r in ratios], view.um_per_px) if scale is None else _named(scale, levels)
    level, ratio = levels[k], ratios[k]
    from_level = to_um @ np.diag([ratio[1], ratio[0], 1.0])
    rows, cols = view.pixels_in(from_level, level.shape[1:])
    values = np.asarray(_computed(level.data[:, rows, cols]), dtype=np.float32)
    off = ~values.any(axis=0) if tissue is None else ~_tissue(tissue, ratio, rows, cols)
    return Raster(np.where(off, np.float32(np.nan), values), from_level @ shifted(cols.start, rows.start))


def _um_from_image(slide: Slide) -> NDArray[np.float64]:
    return np.diag([slide.mpp, slide.mpp, 1.0])


def _ratio(finest: DataArray, level: DataArray) -> tuple[float, float]:
    """Pixels of the finest level per pixel of another, (y, x)."""
    return finest.sizes["y"] / level.sizes["y"], finest.sizes["x"] / level.sizes["x"]


def _named(scale: str, levels: list[DataArray]) -> int:
    names = [f"scale{k}" for k in range(len(levels))]
    if scale == "full":
        return 0
    if scale not in names:
        raise PixNetError(f"scale={scale!r}: the map has {', '.join(map(repr, names))}; 'full' is the first of them.")
    return names.index(scale)


def _computed(block: Any) -> Any:
    """In threads, never through a distributed client that is open by chance."""
    return block.compute(scheduler="threads") if hasattr(block, "compute") else block


def _tissue(labels: Any, ratio: tuple[float, float], rows: slice, cols: slice) -> NDArray[np.bool_]:
    """Whether the centres of some pixels of a level of the map are on tissue."""
    levels = [labels] if isinstance(labels, DataArray) else list(get_pyramid_levels(labels))
    own = [_ratio(levels[0], level) for level in levels]
    k = coarsest_level([max(r) for r in own], max(ratio))
    row, col = (
        np.clip(((np.arange(s.start, s.stop) + 0.5) * r / mine).astype(np.int64), 0, size - 1)
        for s, r, mine, size in zip((rows, cols), ratio, own[k], levels[k].shape, strict=True)
    )
    if not len(row) or not len(col):
        return np.zeros((len(row), len(col)), bool)
    block = np.asarray(_computed(levels[k].data[row[0] : row[-1] + 1, col[0] : col[-1] + 1]))
    return block[np.ix_(row - row[0], col - col[0])] > 0
