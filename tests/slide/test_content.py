"""Hashes of content, and what a backed object has only in memory before results are written into its store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Identity, Translation, set_transformation
from tests.slide.conftest import make_image

from pixnet_sd.errors import StoreError
from pixnet_sd.geometry import Circles, LabelGrid
from pixnet_sd.slide import check_on_disk, open_slide, pixel_content, regions_sha256
from pixnet_sd.slide.elements import open_store

KEYS = ("he", "single", "cells", "circles", "labels")
PLACES = {"transformations": {"sample": Identity()}}
LABELS = np.kron(np.arange(12).reshape(3, 4), np.ones((8, 8), int))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("on_disk") / "slide.zarr"
    boxes = gpd.GeoDataFrame(geometry=[shapely.box(x, 5, x + 4, 9) for x in range(0, 40, 8)], index=list("abcde"))
    points = gpd.GeoDataFrame({"radius": [3.0] * 3}, geometry=shapely.points([[9, 9], [20, 20], [40, 30]]))
    SpatialData(
        images={"he": make_image(scale_factors=(2, 2)), "single": make_image(64, 80)},
        labels={"labels": Labels2DModel.parse(LABELS, dims=("y", "x"), **PLACES)},
        shapes={"cells": ShapesModel.parse(boxes, **PLACES), "circles": ShapesModel.parse(points, **PLACES)},
    ).write(path)
    return path


@pytest.fixture
def backed(path: Path) -> SpatialData:
    return sd.read_zarr(path)


def image_as(change: Callable[[np.ndarray], np.ndarray], key: str) -> Callable[[SpatialData], None]:
    def replace(sdata: SpatialData) -> None:
        pixels = sdata[key]["scale0"].image.values if key == "he" else sdata[key].values
        options = {"scale_factors": [2, 2]} if key == "he" else {}
        sdata[key] = Image2DModel.parse(change(pixels), dims=("c", "y", "x"), **PLACES, **options)

    return replace


def other_level(sdata: SpatialData) -> None:
    level = sdata["he"]["scale1"]["image"]
    sdata["he"]["scale1"]["image"] = level.copy(data=255 - level.data)


def shapes_as(change: Callable[[gpd.GeoDataFrame], gpd.GeoDataFrame], key: str) -> Callable[[SpatialData], None]:
    def replace(sdata: SpatialData) -> None:
        frame = change(sdata[key].copy())
        frame.attrs = {}
        sdata[key] = ShapesModel.parse(frame, **PLACES)

    return replace


CHANGES = {
    "mirrored": ("he", image_as(lambda x: x[:, :, ::-1], "he"), "pixels"),
    "one pixel": ("single", image_as(lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, 9, x), "single"), ""),
    "cropped": ("single", image_as(lambda x: x[:, 4:], "single"), "pixels"),
    "a coarse level": ("he", other_level, "pixels"),
    "fewer levels": ("he", lambda sdata: sdata["he"].__delitem__("scale2"), "levels"),
    "moved shapes": ("cells", shapes_as(lambda f: f.set_geometry(f.geometry.translate(2, 0)), "cells"), "outlines"),
    "renamed shapes": ("cells", shapes_as(lambda f: f.set_index([list("edcba")]), "cells"), "ids"),
    "wider circles": ("circles", shapes_as(lambda f: f.assign(radius=4.0), "circles"), "outlines"),
    "other labels": ("labels", lambda sdata: sdata["labels"].__setitem__(slice(3), 7), "pixels"),
}


def test_what_was_read_is_on_disk(backed: SpatialData, path: Path) -> None:
    check_on_disk(backed, *KEYS, None)
    check_on_disk(open_store(path), *KEYS)
    check_on_disk(sd.SpatialData(images={"he": make_image()}), "he")
    image_as(lambda x: x.copy(), "he")(backed)  # the same in memory
    image_as(lambda x: x.copy(), "single")(backed)
    shapes_as(lambda f: f, "cells")(backed)
    check_on_disk(backed, *KEYS)


def test_moved_in_memory(backed: SpatialData) -> None:
    """In a system that is on disk, and in one that is not."""
    for key in KEYS:
        others = KEYS[KEYS.index(key) + 1 :]
        set_transformation(backed[key], Translation([40, 0], axes=("x", "y")), "sample")
        with pytest.raises(StoreError, match=rf"'{key}'.*'sample'.*sdata\.write_transformations\('{key}'\)"):
            check_on_disk(backed, key)
        set_transformation(backed[key], {"sample": Identity(), "new": Identity()}, set_all=True)
        with pytest.raises(StoreError, match=f"'{key}'.*'new'"):
            check_on_disk(backed, key)
        check_on_disk(backed, *others)


@pytest.mark.parametrize(("key", "change", "what"), CHANGES.values(), ids=CHANGES)
def test_changed_in_memory_or_not_on_disk(backed: SpatialData, key: str, change, what: str) -> None:
    change(backed)
    with pytest.raises(StoreError, match=f"'{key}' .*{what}"):
        check_on_disk(backed, key)
    if key in ("he", "cells", "labels"):
        backed[f"{key}_2"] = backed[key]
        with pytest.raises(StoreError, match=rf"'{key}_2'.*sdata\.write_element\('{key}_2'\)"):
            check_on_disk(backed, f"{key}_2")


@pytest.mark.slow
def test_millions_are_compared_by_ids_and_a_sample(tmp_path: Path) -> None:
    xy = np.random.default_rng(0).uniform(0, 1000, (1_000_001, 2))
    points = gpd.GeoDataFrame({"radius": np.ones(len(xy))}, geometry=shapely.points(xy))
    sdata = SpatialData(shapes={"cells": ShapesModel.parse(points, **PLACES)})
    sdata.write(tmp_path / "cells.zarr")
    check_on_disk(sdata, "cells")
    whole = sdata["cells"]
    for change in (lambda f: f.assign(radius=2.0), lambda f: f.iloc[1:]):
        sdata["cells"] = whole
        shapes_as(change, "cells")(sdata)
        with pytest.raises(StoreError, match="'cells'"):
            check_on_disk(sdata, "cells")


def test_pixels_are_hashed_alike_wherever_they_are(path: Path) -> None:
    pixels = make_image(64, 80).values
    turned = Image2DModel.parse(pixels[::-1], c_coords=["b", "g", "r"], chunks=(1, 32, 32), **PLACES)
    objects = [sd.read_zarr(path), SpatialData(images={"single": turned})]
    slides = [open_slide(sdata, image_key="single", mpp=0.5) for sdata in objects]
    assert pixel_content(slides[0]).sha256 == pixel_content(slides[1]).sha256
    turned.data = turned.data.map_blocks(lambda block: block ^ 1)
    assert pixel_content(open_slide(objects[1], image_key="single", mpp=0.5)).sha256 != pixel_content(slides[0]).sha256


def test_regions_are_hashed_by_where_they_are() -> None:
    circles = Circles(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, 2.0]))
    assert regions_sha256(circles) == regions_sha256(circles.subset([0, 1])) != regions_sha256(circles.subset([1, 0]))
    hashes = [
        regions_sha256(LabelGrid(labels, np.arange(1, 12), np.eye(3)))
        for labels in (LABELS, LABELS.astype(np.int16), LABELS.T.copy())
    ]
    assert hashes[0] == hashes[1] != hashes[2]
