"""Tables and shapes of regions, and the picture beneath them: the first plot that a user makes has to work."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import squidpy as sq
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from pixnet_sd.errors import DataError
from pixnet_sd.store import (
    Expressed,
    RowInfo,
    circles_element,
    region_table,
    spatial_library,
    squares_element,
    thumbnail,
)
from pixnet_sd.store.gene_map import image_transforms

GENES = ["ERBB2", "MT-CO1", "KRT8"]
X, Y = np.meshgrid(np.arange(20, 400, 20.0), np.arange(20, 290, 20.0))
CENTRES = np.c_[X.ravel(), Y.ravel()]
IDS = np.arange(len(CENTRES)) + 7


def make_table(picture=None, *, genes=GENES, ids=IDS, centres=CENTRES):
    values = np.c_[CENTRES[:, 0], CENTRES[:, 1], CENTRES.sum(1)].astype(np.float32)
    return region_table(
        Expressed(values),
        RowInfo(ids, centres, {"area_um2": np.full(len(CENTRES), 200.0)}),
        genes,
        region="spots",
        var=pd.DataFrame({"pcc": [0.1, 0.2]}, index=["KRT8", "ERBB2"]),
        uns={"spatial": spatial_library("", 16.0, picture)},
    )


@pytest.mark.parametrize("with_picture", [True, False])
def test_squidpy_draws_every_spot_on_the_slide(in_memory, with_picture):
    table = make_table(thumbnail(in_memory, "_full_image", max_px=100) if with_picture else None)
    np.testing.assert_array_equal(table.var["pcc"], [0.2, np.nan, 0.1])
    assert table.obs["area_um2"].eq(200).all()
    assert table.obs_names[0] == "7"
    axes = sq.pl.spatial_scatter(table, color="ERBB2", img=with_picture or None, return_ax=True)
    spots = axes.collections[0]
    assert len(spots.get_paths()) == table.n_obs
    assert np.corrcoef(spots.get_array(), table[:, "ERBB2"].X.ravel())[0, 1] > 0.999
    scale = table.uns["spatial"]["pixnet"]["scalefactors"]["tissue_hires_scalef"]
    extents = np.array([path.get_extents().size for path in spots.get_paths()])
    np.testing.assert_allclose(extents.max(), 16 * scale, rtol=0.02)
    assert [image.get_array().shape[:2] for image in axes.images] == [(50, 70)] * with_picture
    plt.close("all")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"genes": ["A", "B"]}, "2 genes"),
        ({"genes": ["A", "B", "A"]}, "gene A"),
        ({"ids": np.zeros(len(CENTRES), dtype=int)}, "region 0"),
        ({"centres": CENTRES[1:]}, "centres"),
    ],
)
def test_refused(changes, says):
    with pytest.raises(DataError, match=says):
        make_table(**changes)


def test_shapes_lie_on_the_image_in_every_system(in_memory):
    transforms = image_transforms(in_memory, "_full_image")
    circles, squares = (make(CENTRES, 6.0, transforms) for make in (circles_element, squares_element))
    assert circles["radius"].eq(6).all()
    np.testing.assert_array_equal(np.c_[circles.geometry.x, circles.geometry.y], CENTRES)
    np.testing.assert_allclose(squares.geometry.bounds, np.c_[CENTRES - 3, CENTRES + 3])
    np.testing.assert_allclose(squares.geometry.area, 36)
    assert get_transformation(squares, get_all=True) == transforms
    for system, transform in transforms.items():
        moved = sd.transform(circles, to_coordinate_system=system)
        expected = np.c_[CENTRES, np.ones(len(CENTRES))] @ transform.to_affine_matrix(("x", "y"), ("x", "y")).T
        np.testing.assert_allclose(np.c_[moved.geometry.x, moved.geometry.y], expected[:, :2])


@pytest.mark.parametrize(
    ("height", "width", "factors", "max_px"),
    [(20, 31, [2], 7), (300, 701, [2, 2], 100), (411, 222, [2], 300), (999, 500, None, 10)],
)
def test_a_thumbnail_is_small_enough_and_in_place(height, width, factors, max_px):
    pixels = np.zeros((3, height, width), dtype=np.uint8)
    pixels[0] = np.arange(width) * 255 // width  # red grows with the column
    pixels[1] = (np.arange(height) * 255 // height)[:, None]  # green with the row
    sdata = sd.SpatialData(images={"im": Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=factors)})
    small = thumbnail(sdata, "im", max_px=max_px)
    rows, cols = small.rgb.shape[:2]
    assert max_px // 2 <= max(rows, cols) <= max_px
    assert small.rgb.dtype == np.uint8
    middle = rows // 2, cols // 2
    for channel, row, col in [(0, middle[0], cols // 5), (0, 1, middle[1]), (1, rows // 5, 0), (1, *middle)]:
        expected = pixels[channel, int((row + 0.5) / small.scale), int((col + 0.5) / small.scale)]
        one_pixel = 255 / (rows if channel else cols)
        assert abs(int(small.rgb[row, col, channel]) - int(expected)) <= 0.5 * one_pixel + 1
    whole = thumbnail(sdata, "im")
    assert whole.scale == 1
    np.testing.assert_array_equal(whole.rgb, pixels.transpose(1, 2, 0))


def test_a_thumbnail_is_rgb():
    sdata = sd.SpatialData(images={"im": Image2DModel.parse(np.zeros((3, 9, 9), np.float32), dims=("c", "y", "x"))})
    with pytest.raises(DataError, match="float32"):
        thumbnail(sdata, "im")
