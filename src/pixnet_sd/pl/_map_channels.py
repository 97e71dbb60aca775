"""The channels of a gene map that are drawn, as a lazy image of their own."""

from __future__ import annotations

from collections.abc import Sequence

from spatialdata import SpatialData, get_pyramid_levels
from xarray import DataArray, Dataset, DataTree

from pixnet_sd._errors import ElementError
from pixnet_sd.slide import check_genes

__all__ = ["map_channels"]


def map_channels(sdata: SpatialData, *, genes: Sequence[str], key_added: str) -> DataTree:
    """Some channels of a gene map; nothing is read.

    Parameters
    ----------
    sdata
        Object that holds it.
    genes
        Channels, in the order wanted.
    key_added
        First part of its name, as of :func:`pixnet_sd.tl.predict`.

    Returns
    -------
    Multiscale image of these channels, finest level first, with the map's transformations.

    Raises
    ------
    ElementError
        There is no such map.
    DataError
        The map lacks a gene.
    """
    key = f"{key_added}_map"
    if key not in sdata.images:
        there = ", ".join(map(repr, sdata.images)) or "none"
        raise ElementError(
            f"There is no gene map {key!r}. Images: {there}. Write one with tl.predict(sdata), or give key_added= the "
            "first part of its name."
        )
    element = sdata.images[key]
    levels = [element] if isinstance(element, DataArray) else list(get_pyramid_levels(element))
    check_genes(genes, [str(name) for name in levels[0].coords["c"].values], f"gene map {key!r}")
    parts = {f"scale{k}": Dataset({"image": level.sel(c=list(genes))}) for k, level in enumerate(levels)}
    return DataTree.from_dict(parts)
