"""Any genes of a predicted map as a lazy multiscale image, however the map is stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from spatialdata.transformations import get_transformation

from pixnet_sd._arguments import checked
from pixnet_sd.errors import ElementError
from pixnet_sd.slide.tables import check_genes
from pixnet_sd.store.gene_map import check_not_rewritten, factors_key, image_pyramid, map_key, read_head

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataTree

__all__ = ["gene_map", "stored_key"]


@checked()
def gene_map(sdata: SpatialData, genes: Sequence[str] | str | None = None, *, key_added: str = "pixnet") -> DataTree:
    """Some genes of a predicted map, as a lazy multiscale image.

    Takes the map that :func:`~pixnet_sd.tl.predict` wrote, or the factors that it wrote with ``store="factors"``, of
    which it makes the genes as they are asked for. Nothing is read before pixels are.

    Parameters
    ----------
    sdata
        Object with a predicted map.
    genes
        Genes, and ``"total_counts"`` with a model of counts; default: all.
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
        Genes that the map does not have.
    StoreError
        The map was replaced in the store since the object was opened.
    """
    wanted = [genes] if isinstance(genes, str) else None if genes is None else list(dict.fromkeys(genes))
    key = stored_key(sdata, wanted, key_added)
    check_not_rewritten(sdata, key)
    return _of_map(sdata.images[key], wanted, key) if key == map_key(key_added) else _of_factors(sdata, wanted, key)


def stored_key(sdata: SpatialData, wanted: Sequence[str] | None, key_added: str) -> str:
    """Name of the image that has some genes: the map, or the factors where there is none or it lacks some."""
    stored, factors = map_key(key_added), factors_key(key_added)
    if stored in sdata.images and (factors not in sdata.images or _has(sdata.images[stored], wanted)):
        return stored
    if factors in sdata.images:
        return factors
    found = ", ".join(map(repr, sdata.images)) or "none"
    raise ElementError(
        f"There is no gene map {stored!r}, nor factors {factors!r}. Images: {found}. Run tl.predict(sdata), or give "
        "key_added= as it was given there."
    )


def _levels(element: Any, key: str) -> list[Any]:
    if "scale0" not in getattr(element, "children", {}):
        raise ElementError(f"The image {key!r} is not multiscale, so it is not one that tl.predict wrote.")
    return [element[f"scale{k}"]["image"] for k in range(len(element.children))]


def _has(element: Any, wanted: Sequence[str] | None) -> bool:
    there = set(map(str, element["scale0"]["image"].coords["c"].values))
    return wanted is not None and set(wanted) <= there


def _of_map(element: Any, wanted: list[str] | None, key: str) -> DataTree:
    levels = _levels(element, key)
    there = [str(gene) for gene in levels[0].coords["c"].values]
    wanted = there if wanted is None else wanted
    check_genes(wanted, there, f"the gene map {key!r}")
    index = [there.index(gene) for gene in wanted]
    return image_pyramid([level.data[index] for level in levels], wanted, get_transformation(element, get_all=True))


def _of_factors(sdata: SpatialData, wanted: list[str] | None, key: str) -> DataTree:
    element, head = sdata.images[key], read_head(sdata, key)
    levels = _levels(element, key)
    wanted = head.genes if wanted is None else wanted
    check_genes(wanted, head.genes, f"the factors {key!r}")
    values = partial(head.values, index=np.array([head.genes.index(gene) for gene in wanted], dtype=np.intp))
    arrays = [_lazily(values, level.data, len(wanted)) for level in (levels if head.is_linear else levels[:1])]
    for k in range(len(arrays), len(levels)):
        arrays.append(da.coarsen(np.mean, arrays[0], {1: 2**k, 2: 2**k}))
    return image_pyramid(arrays, wanted, get_transformation(element, get_all=True))


def _lazily(values: partial[Any], factors: Any, n_genes: int) -> Any:
    """Genes, block by block; a block of factors has all of them."""
    factors = factors.rechunk({0: -1})
    return da.map_blocks(values, factors, chunks=((n_genes,), *factors.chunks[1:]), dtype=np.float32)
