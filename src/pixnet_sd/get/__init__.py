"""Predictions as images: any genes of a predicted map, or their scatter, lazily, however the map is stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import dask.array as da
import numpy as np
import pandas as pd
from spatialdata.transformations import get_transformation

from pixnet_sd._arguments import checked
from pixnet_sd._notes import stored_note
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.geometry import MAP_STRIDE
from pixnet_sd.slide.tables import check_genes
from pixnet_sd.store.gene_map import check_not_rewritten, factors_key, image_pyramid, map_key, read_head

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataTree

    from pixnet_sd.model.noise import Dispersion
    from pixnet_sd.store.gene_map import FactorHead

__all__ = ["gene_map"]


@checked()
def gene_map(
    sdata: SpatialData,
    genes: Sequence[str] | str | None = None,
    *,
    what: Literal["mean", "sd"] = "mean",
    key_added: str = "pixnet",
) -> DataTree:
    """Some genes of a predicted map, or how far measurements scatter about it, as a lazy multiscale image.

    Takes the map that :func:`~pixnet_sd.tl.predict` wrote, or the factors that it wrote with ``write="factors"``, of
    which it makes the genes as they are asked for. Nothing is read before pixels are.

    Parameters
    ----------
    sdata
        Object with a predicted map.
    genes
        Genes, and ``"total_counts"`` with a model of counts; default: all.
    what
        ``"mean"``: the map. ``"sd"``, with a model of counts: the standard deviation of what would be measured in each
        pixel of each level, at the mean depth of the training slides, sqrt(m / A + α m²) of a density m in a pixel of
        area A, with the gene's dispersion α for regions of that area; not of ``"total_counts"``, which has none.
    key_added
        As in `predict`.

    Returns
    -------
    Multiscale image, float32, ``c`` = genes in the order given, 0 off tissue, in every coordinate system of the slide
    image; of the same units as the map. It can be plotted, or kept as an element of the object:
    ``sdata.images["ERBB2"] = gene_map(sdata, "ERBB2")``. Coarser levels of densities that are made of factors are
    means of level 0, so that each of their pixels takes as much reading as the part of level 0 below it.

    Raises
    ------
    ElementError
        When nothing was predicted under that name.
    DataError
        Genes that the map does not have, or ``what="sd"`` of a map that has no dispersion.
    StoreError
        The map was replaced in the store since the object was opened.
    """
    wanted = [genes] if isinstance(genes, str) else None if genes is None else list(dict.fromkeys(genes))
    key = stored_key(sdata, wanted, key_added)
    check_not_rewritten(sdata, key)
    element = sdata.images[key]
    head = None if key == map_key(key_added) else read_head(sdata, key)
    if "scale0" not in getattr(element, "children", {}):
        raise ElementError(f"The image {key!r} is not multiscale, so it is not one that tl.predict wrote.")
    levels = [element[f"scale{k}"]["image"].data for k in range(len(element.children))]
    known = _channels(element) if head is None else head.genes
    name = f"the gene map {key!r}" if head is None else f"the factors {key!r}"
    noted = _noted_dispersion(sdata, key, name) if what == "sd" else None
    usable = known if noted is None else [gene for gene in known if gene in noted.genes]
    wanted = usable if wanted is None else wanted
    check_genes(wanted, usable, name)
    index = [known.index(gene) for gene in wanted]
    levels = [level[index] for level in levels] if head is None else _made_of_factors(head, levels, index)
    if noted is not None:
        levels = _standard_deviations(levels, noted, wanted)
    return image_pyramid(levels, wanted, get_transformation(element, get_all=True))


def stored_key(sdata: SpatialData, wanted: Sequence[str] | None, key_added: str) -> str:
    """Name the image that has the genes wanted: the map, or the factors where there is none or it lacks some."""
    whole, factors = map_key(key_added), factors_key(key_added)
    if factors not in sdata.images and whole not in sdata.images:
        present = ", ".join(map(repr, sdata.images)) or "none"
        raise ElementError(
            f"There is no gene map {whole!r}, nor factors {factors!r}. Images: {present}. Run tl.predict(sdata), or "
            "give key_added= as it was given there."
        )
    if factors not in sdata.images:
        return whole
    has_all = whole in sdata.images and wanted is not None and set(wanted) <= {*_channels(sdata.images[whole])}
    return whole if has_all else factors


def _channels(element: DataTree) -> list[str]:
    return [str(name) for name in element["scale0"]["image"].coords["c"].values]


def _made_of_factors(head: FactorHead, levels: Sequence[Any], index: Sequence[int]) -> list[Any]:
    """Make genes of every level of factors, block by block; densities of level 0 only, which the others average."""
    values = partial(head.values, index=np.array(index, dtype=np.intp))
    arrays = []
    for level in levels if head.is_linear else levels[:1]:
        factors = level.rechunk({0: -1})  # a block has all of them
        chunks = ((len(index),), *factors.chunks[1:])
        arrays.append(da.map_blocks(values, factors, chunks=chunks, dtype=np.float32))
    return [*arrays, *(da.coarsen(np.mean, arrays[0], {1: 2**k, 2: 2**k}) for k in range(len(arrays), len(levels)))]


class _NotedDispersion(NamedTuple):
    """What a map's note says of the scatter of measurements."""

    genes: pd.Index
    dispersion: Dispersion  # of these
    pixel_um2: float  # area of a pixel of level 0


def _noted_dispersion(sdata: SpatialData, key: str, name: str) -> _NotedDispersion:
    note = stored_note(sdata, "maps", key) or {}
    if "dispersion" not in note:
        raise DataError(
            f"what='sd': {name} has no dispersion, because it is not of a model of counts, or was written by an older "
            "version. Fit with objective='nb_pcc', and predict."
        )
    from pixnet_sd.model.noise import Dispersion  # loads torch

    pitch_um = MAP_STRIDE * note["working_mpp"] * note["factor"]
    genes = pd.Index(note["dispersion"]["genes"])  # channels may have been picked or sorted since
    return _NotedDispersion(genes, Dispersion.noted(note["dispersion"]), pitch_um**2)


def _standard_deviations(levels: Sequence[Any], noted: _NotedDispersion, genes: Sequence[str]) -> list[Any]:
    """Turn densities of every level into the standard deviation of counts over area in each pixel."""
    dispersion, made = noted.dispersion.of(noted.genes.get_indexer(pd.Index(genes))), []
    for k, density in enumerate(levels):
        area_um2 = noted.pixel_um2 * 4**k
        alpha = dispersion.at(np.array([area_um2]))[0].astype(np.float32)[:, None, None]
        made.append(da.sqrt(density / np.float32(area_um2) + alpha * density**2))
    return made
