"""Hashes of content, and what a backed object has only in memory before results are written into its store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Identity, Translation, set_transformation
from tests.slide.conftest import make_circles, make_image, make_labels
from xarray import DataArray, DataTree

from pixnet_sd.errors import StoreError
from pixnet_sd.geometry import Circles, LabelGrid
from pixnet_sd.slide import check_on_disk, open_slide, pixel_content, regions_sha256
from pixnet_sd.slide.elements import open_store

PLACES = {"transformations": {"sample": Identity()}}
LABELS = np.kron(np.arange(12).reshape(3, 4), np.ones((8, 8), int))


def elements() -> dict[str, Any]:
    boxes = gpd.GeoDataFrame(geometry=[shapely.box(x, 5, x + 4, 9) for x in range(0, 40, 8)], index=list("abcde"))
    return {
        "he": make_image(scale_factors=(2, 2)),
        "single": make_image(64, 80),
        "cells": ShapesModel.parse(boxes, **PLACES),
        "circles": make_circles([[9, 9], [20, 20], [40, 30]], 3.0),
        "labels": make_labels(LABELS),
    }


KEYS = tuple(elements())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("on_disk") / "slide.zarr"
    SpatialData.init_from_elements(elements()).write(path)
    return path


@pytest.fixture
def backed(path: Path) -> SpatialData:
    return sd.read_zarr(path)


def one_pixel(image: DataArray) -> DataArray:
    image[0, 5, 7] = 255 - image[0, 5, 7]
    return image


def coarse_level(image: DataTree) -> DataTree:
    image["scale1"]["image"] = 255 - image["scale1"]["image"]
    return image


CHANGES = {
    "one pixel": ("single", one_pixel, "pixels"),
    "cropped": ("single", lambda image: image[:, 4:], "pixels"),
    "a coarse level": ("he", coarse_level, "pixels"),
    "fewer levels": ("he", lambda image: image.drop_nodes("scale2"), "levels"),
    "moved shapes": ("cells", lambda f: f.set_geometry(f.geometry.translate(2, 0)), "outlines"),
    "renamed shapes": ("cells", lambda f: f.set_index([list("edcba")]), "ids"),
    "wider circles": ("circles", lambda f: f.assign(radius=4.0), "outlines"),
    "other labels": ("labels", lambda labels: labels.copy(data=labels.data[::-1]), "pixels"),
}


def test_what_was_read_is_on_disk(backed: SpatialData, path: Path) -> None:
    in_memory = elements()
    check_on_disk(backed, *KEYS, None)
    check_on_disk(open_store(path), *KEYS)
    check_on_disk(SpatialData.init_from_elements(in_memory), *KEYS)
    for key in KEYS:  # the same in memory
        backed[key] = in_memory[key]
    check_on_disk(backed, *KEYS)


def test_moved_in_memory(backed: SpatialData) -> None:
    """In a system that is on disk, and in one that is not."""
    for key in KEYS:
        set_transformation(backed[key], Translation([40, 0], axes=("x", "y")), "sample")
        with pytest.raises(StoreError, match=rf"'{key}'.*'sample'.*sdata\.write_transformations\('{key}'\)"):
            check_on_disk(backed, key)
        set_transformation(backed[key], {"sample": Identity(), "new": Identity()}, set_all=True)
        with pytest.raises(StoreError, match=f"'{key}'.*'new'"):
            check_on_disk(backed, key)


@pytest.mark.parametrize(("key", "change", "what"), CHANGES.values(), ids=CHANGES)
def test_changed_in_memory_or_not_on_disk(backed: SpatialData, key: str, change, what: str) -> None:
    backed[key] = backed["new"] = change(backed[key])
    with pytest.raises(StoreError, match=f"'{key}' .*{what}"):
        check_on_disk(backed, key)
    with pytest.raises(StoreError, match=r"'new'.*sdata\.write_element\('new'\)"):
        check_on_disk(backed, "new")


@pytest.mark.slow
def test_millions_are_compared_by_ids_and_a_sample(tmp_path: Path) -> None:
    cells = make_circles(np.random.default_rng(0).uniform(0, 1000, (1_000_001, 2)), 1.0)
    sdata = SpatialData(shapes={"cells": cells})
    sdata.write(tmp_path / "cells.zarr")
    check_on_disk(sdata, "cells")
    for changed in (cells.assign(radius=2.0), cells.iloc[1:]):
        sdata["cells"] = changed
        with pytest.raises(StoreError, match="'cells'"):
            check_on_disk(sdata, "cells")


def test_pixels_are_hashed_alike_wherever_they_are(backed: SpatialData) -> None:
    pixels = backed["single"].values[::-1]
    hashes = [pixel_content(open_slide(backed, image_key="single", mpp=0.5)).sha256]
    for values in (pixels, pixels ^ 1):
        image = Image2DModel.parse(values, c_coords=["b", "g", "r"], chunks=(1, 32, 32), **PLACES)
        hashes.append(pixel_content(open_slide(SpatialData(images={"single": image}), mpp=0.5)).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_regions_are_hashed_by_where_they_are() -> None:
    circles = Circles(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, 2.0]))
    labels = (LABELS, LABELS.astype(np.int16), LABELS.T.copy())
    grids = [LabelGrid(pixels, np.arange(1, 12), np.eye(3)) for pixels in labels]
    for same, again, other in ([circles, circles.subset([0, 1]), circles.subset([1, 0])], grids):
        assert regions_sha256(same) == regions_sha256(again) != regions_sha256(other)
