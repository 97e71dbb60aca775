"""Slides with gene maps whose every pixel is known, made without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from spatialdata import SpatialData
from tests.slide.conftest import make_visium_hd

from pixnet_sd.slide.elements import scale0
from pixnet_sd.store import Transaction
from pixnet_sd.store.gene_map import GeneMapWriter, image_transforms, map_layout, tissue_labels

mpl.use("Agg")

import matplotlib.pyplot as plt

MAP_UM = 2.0


def add_map(
    sdata: SpatialData, image_key: str, system: str, *, mpp: float, genes: list[str], **note: Any
) -> np.ndarray[Any, Any]:
    """Write a gene map over all of an image, off tissue in its last 20 columns; returns its values, NaN there."""
    sizes, pitch = scale0(sdata.images[image_key]).sizes, MAP_UM / mpp
    shape = tuple(round(sizes[axis] / pitch) for axis in "yx")
    row, col = np.indices(shape, dtype=np.float32)
    tissue = col < shape[1] - 20
    values = np.stack([tissue * (k + 1 + (col if k % 2 else row) / 10) for k in range(len(genes))])
    layout, transforms = map_layout(len(genes), shape, block_px=32), image_transforms(sdata, image_key)
    noted = {"image": image_key, "coordinate_system": system, "mpp": mpp, "target_sum": 100.0, **note}
    options = {"layout": layout, "transforms": transforms, "pitch_image_px": pitch, "fingerprint": "x"}
    with Transaction(sdata, {"pixnet_map": "images", "pixnet_map_tissue": "labels"}) as out:
        writer = GeneMapWriter(out, key="pixnet_map", channels=genes, **options)
        for block in writer.pending:
            writer.write(block, values[:, block[0] : block[1], block[2] : block[3]])
        elements = {"pixnet_map": writer.element(), "pixnet_map_tissue": tissue_labels(tissue, pitch, transforms)}
        out.commit(elements, provenance={"maps": {"pixnet_map": noted}})
    return np.where(tissue, values, np.nan)


def hd(
    genes: Sequence[str] = ("GENE0", "GENE1", "OTHER"), note: dict[str, Any] | None = None, **options: Any
) -> tuple[SpatialData, np.ndarray[Any, Any]]:
    """A Visium HD slide, 120 x 160 µm at 0.5 µm/px, its map of 60 x 80 pixels, and the map's values."""
    sdata = make_visium_hd(**options)
    return sdata, add_map(sdata, "sample_full_image", "sample", mpp=0.5, genes=list(genes), **(note or {}))


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")
