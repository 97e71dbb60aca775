"""Values do not depend on tiles or on how a slide lies in its coordinate system; what belongs together stays so."""

from __future__ import annotations

from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata as sd
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, get_transformation, set_transformation
from tests.tl.conftest import BINS, FULL, map_values

import pixnet_sd as ps
from pixnet_sd.errors import StoreError

SYSTEM = "sample"


def similarity(*, degrees: float = 0.0, scale: float = 1.0, mirror: bool = False, shift=(0.0, 0.0)) -> np.ndarray:
    a = np.deg2rad(degrees)
    flip = np.diag([-1.0, 1.0]) if mirror else np.eye(2)
    matrix = np.eye(3)
    matrix[:2, :2] = scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ flip
    matrix[:2, 2] = shift
    return matrix


def affine(matrix: np.ndarray) -> Affine:
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


def at(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points, (n, 2), where a matrix moves them."""
    return np.column_stack([xy, np.ones(len(xy))]) @ matrix[:2].T


def to_system(element, xy: np.ndarray) -> np.ndarray:
    """Points of an element in the coordinate system."""
    return at(get_transformation(element, SYSTEM).to_affine_matrix(("x", "y"), ("x", "y")), xy)


def centres(shapes: gpd.GeoDataFrame) -> np.ndarray:
    return shapely.get_coordinates(shapely.centroid(shapes.geometry.to_numpy()))


def test_tile_size_leaves_no_trace(fitted, model, predict, forward_passes):
    """At a third of the resolution the slide is larger than a tile, also when its map is read back for regions."""
    sharp = ps.PixNet(model.network, replace(model.record, working_mpp=1 / 3))
    maps, passes = [], []
    for tile_px in (256, 512, 1024):
        predict(fitted, sharp, tile_px=tile_px, key_added=f"t{tile_px}")
        maps.append(map_values(fitted, f"t{tile_px}_map"))
        passes.append(len(forward_passes) - sum(passes))
    assert passes == [8, 3, 1]  # of 9, 4 and 1; corners are glass
    spread = maps[0][:, :150, :150].std()
    assert spread > 0
    predict(fitted, sharp, key_added="four", batch_size=4)
    for other in (*maps[1:], map_values(fitted, "four_map")):
        assert np.abs(other - maps[0]).max() <= 1e-4 * spread
    del forward_passes[:]
    for key in ("t256", "run"):
        predict(fitted, sharp, key_added=key, shapes_key=BINS, write=None)
        assert bool(forward_passes) == (key == "run")
    np.testing.assert_allclose(fitted.tables[f"t256_{BINS}"].X, fitted.tables[f"run_{BINS}"].X, atol=1e-4 * spread)


def test_slide_moved_in_its_coordinate_system(fitted, predict):
    for regions in ({"shapes_key": BINS}, {"radius_um": 12, "write": None}):
        predict(fitted, key_added="before", **regions)
    moved = similarity(degrees=-33, scale=0.4, mirror=True, shift=(-70.0, 10.0))
    for element in (fitted.images[FULL], fitted.shapes[BINS]):
        set_transformation(element, affine(moved), SYSTEM)
    del fitted.images["sample_hires_image"], fitted.images["sample_lowres_image"]  # they were not moved
    fitted.write_transformations()
    with pytest.raises(StoreError, match="before_map"):  # written where the image was, it cannot stand for a new one
        predict(fitted, key_added="before", coordinate_system=SYSTEM)
    for regions in ({"shapes_key": BINS}, {"radius_um": 12, "write": None}):
        predict(fitted, key_added="after", coordinate_system=SYSTEM, **regions)
    for name in (BINS, "circles_12um"):
        before, after = (fitted.tables[f"{when}_{name}"] for when in ("before", "after"))
        np.testing.assert_allclose(after.X, before.X, atol=1e-5)
        np.testing.assert_allclose(after.obs["area_um2"], before.obs["area_um2"], rtol=1e-6)
    np.testing.assert_allclose(map_values(fitted, "after_map"), map_values(fitted, "before_map"), atol=1e-6)
    old, new = (fitted.shapes[f"{when}_circles_12um_shapes"] for when in ("before", "after"))
    np.testing.assert_allclose(to_system(new, centres(new)), at(moved, to_system(old, centres(old))), atol=1e-6)


MPP = 0.7
SPOT_XY = np.array([311.3, 208.9])  # px of the image, on no pixel's centre
LANDMARKS = SPOT_XY + np.array([[0, 0], [60, -40], [-70, 30], [20, 80]])


def spotted_image(transformation: Affine):
    """Glass, a pale disk of tissue, and one dark spot in it."""
    y, x = np.mgrid[:420, :560] + 0.5
    tissue = (x - 300) ** 2 + (y - 210) ** 2 < 170**2
    pixels = np.where(tissue, [[[205]], [[150]], [[190]]], 240).astype(float)
    pixels -= 90 * np.exp(-((x - SPOT_XY[0]) ** 2 + (y - SPOT_XY[1]) ** 2) / (2 * 12**2))
    place = {"scale_factors": [2], "transformations": {SYSTEM: transformation}}
    return Image2DModel.parse(pixels.round().astype(np.uint8), dims=("c", "y", "x"), c_coords=list("rgb"), **place)


@pytest.fixture(params=["turned", "mirrored"])
def landmark_slide(request) -> tuple[sd.SpatialData, np.ndarray]:
    """A slide, rotated, scaled and shifted in its system, and shapes that are drawn in the system itself."""
    matrix = similarity(degrees=25, scale=MPP, shift=(130.0, -60.0), mirror=request.param == "mirrored")
    there = at(matrix, LANDMARKS)
    shapes = ShapesModel.parse(there, geometry=0, radius=6.0, transformations={SYSTEM: affine(np.eye(3))})
    sdata = sd.SpatialData(images={"he": spotted_image(affine(matrix))}, shapes={"landmarks": shapes})
    return sdata, there[0]


def weighted_centre(xy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Centre of what stands out above the tissue around."""
    weight = np.clip(values - (np.median(values) + 0.3 * (values.max() - np.median(values))), 0, None)
    return (xy * weight[:, None]).sum(axis=0) / weight.sum()


@pytest.mark.parametrize("map_um", [None, 12.0])
def test_landmark(landmark_slide, darkness, predict, map_um):
    """The spot is where it was drawn, which no training blurs, and regions have the mean darkness of their pixels."""
    sdata, spot = landmark_slide
    predict(sdata, darkness, mpp="coordinate_system", radius_um=4, map_um=map_um)
    predict(sdata, darkness, mpp="coordinate_system", shapes_key="landmarks", write=None)
    half_map_px = (map_um or 4.0) / 2  # µm, the unit of the system

    picture = map_values(sdata)[0]
    rows, cols = np.nonzero(picture)
    map_centre = weighted_centre(np.column_stack([cols, rows]) + 0.5, picture[rows, cols])
    assert np.linalg.norm(to_system(sdata.images["pixnet_map"], map_centre[None])[0] - spot) < half_map_px / 2
    for level in sdata.images["pixnet_map"].children.values():  # coordinates of every level are pixels of level 0
        image = level["image"]
        place = np.unravel_index(image.values[0].argmax(), image.shape[1:])
        xy = np.array([[image.x.values[place[1]], image.y.values[place[0]]]])
        pitch = float(image.x.values[1] - image.x.values[0]) * 2 * half_map_px
        assert np.linalg.norm(to_system(sdata.images["pixnet_map"], xy)[0] - spot) < pitch / 2 * np.sqrt(2)

    circles, table = sdata.shapes["pixnet_circles_4um_shapes"], sdata.tables["pixnet_circles_4um"]
    drawn = weighted_centre(to_system(circles, centres(circles)), table.X[:, 0])
    assert np.linalg.norm(drawn - spot) < 1.0
    assert (circles.index == table.obs["instance_id"]).all()

    pixels = 255 - sdata.images["he"]["scale0"]["image"].values.mean(axis=0)
    y, x = np.mgrid[:420, :560] + 0.5
    inside = [(x - cx) ** 2 + (y - cy) ** 2 <= (6.0 / MPP) ** 2 for cx, cy in LANDMARKS]
    expected = [pixels[mask].mean() for mask in inside]
    np.testing.assert_allclose(sdata.tables["pixnet_landmarks"].X[:, 0], expected, rtol=0.03)


def test_coarser_map_in_several_blocks(darkness, predict):
    """A strip wider than a block of the native map, 512 pixels of 4 working ones."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(100, 180, (3, 60, 150), dtype=np.uint8), 16, axis=2)
    sdata = sd.SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list("rgb"))})
    predict(sdata, darkness, mpp=1.0)
    predict(sdata, darkness, mpp=1.0, key_added="coarse", map_um=12.0, tile_px=64)
    expected = map_values(sdata)[0, :15, :600].reshape(5, 3, 200, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(map_values(sdata, "coarse_map")[0, :5, :200], expected, atol=1e-3)
