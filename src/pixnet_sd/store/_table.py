"""Predicted expression of regions as a table that squidpy can plot at the first call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata.models import TableModel

from pixnet_sd._errors import DataError

from ._thumbnail import Thumbnail

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["INSTANCE_KEY", "REGION_KEY", "region_table"]

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
