"""Tables and shapes of regions, and the picture beneath them, which a first plot shows; sparse tables in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import spatialdata as sd
import squidpy as sq
import zarr
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.store import (
    Expressed,
    RowInfo,
    TableArrays,
    chunks_as_given,
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


N_ROWS = 2**18 + 7  # more than one chunk of rows and of entries


def write_one(folder: Path, counts: Any, column: str, values: Any = (0,), **more: np.ndarray) -> Path:
    """Table of one row, as the reader gives it."""
    obs = pd.DataFrame({column: values, "region": pd.Categorical(["a"])}, index=["one"])
    one = ad.AnnData(counts, obs=obs, obsm=more)
    with chunks_as_given():
        ad.io.write_elem(zarr.open_group(folder, mode="w", zarr_format=3), "t", one)
    return folder / "t"


def test_rows_in_pieces_of_any_size_make_the_table(tmp_path: Path) -> None:
    counts = sp.random(N_ROWS, 6, 0.4, format="csr", dtype=np.float32, random_state=1)
    names = np.array([f"row {i}" for i in range(N_ROWS)], dtype=object)
    folder = write_one(tmp_path, counts[:1], "number", spatial=np.zeros((1, 2)))
    table = TableArrays(folder, N_ROWS, 6, counts.nnz)
    for start, stop in [(0, 1), (1, 10), (10, 200_000), (200_000, N_ROWS)]:
        rows, part = np.arange(start, stop), counts[start:stop]
        table.add_rows(names[rows], {"number": rows}, np.outer(rows, [1.0, 2.0]))
        table.add_counts(np.ones(part.nnz, np.int32), part.indices.astype(np.int64), np.diff(part.indptr))
    table.finish()
    found = ad.read_zarr(folder)
    expected = counts.copy()
    expected.data = np.ones_like(expected.data)
    assert (expected != found.X).nnz == 0
    assert found.X.dtype == np.float32
    assert list(found.obs_names) == list(names)
    np.testing.assert_array_equal(found.obs["number"], np.arange(N_ROWS))
    assert list(found.obs["region"].unique()) == ["a"]
    np.testing.assert_array_equal(table.centres_px(3, 9), np.outer(np.arange(3, 9), [1.0, 2.0]))


def test_more_entries_than_32_bits_count_get_wide_indices(tmp_path: Path) -> None:
    folder = write_one(tmp_path, sp.csr_matrix((1, 3), dtype=np.float32), "number")
    TableArrays(folder, 10, 3, 2**31)
    for name in ("indices", "indptr"):
        assert zarr.open_array(folder / "X" / name, mode="r").dtype == np.int64


def test_columns_that_get_no_values_are_refused(tmp_path: Path) -> None:
    table = TableArrays(write_one(tmp_path, sp.csr_matrix((1, 3), dtype=np.float32), "unknown"), 2, 3, 0)
    table.add_rows(np.array(["a", "b"], dtype=object), {})
    with pytest.raises(StoreError, match="unknown"):
        table.finish()


def test_columns_in_the_encodings_of_anndata(tmp_path: Path) -> None:
    folder = write_one(tmp_path, np.ones((1, 2), np.float32), "kind", pd.Categorical(["x"]))
    with pytest.raises(StoreError, match="'kind'"):
        TableArrays(folder, 5, 2)
    table = TableArrays(write_one(tmp_path, np.ones((1, 2), np.float32), "kind", pd.array([7], dtype="Int64")), 5, 2)
    table.add_rows(np.arange(5), {"kind": np.arange(5)})
    table.add_values(np.ones((5, 2), np.float32), {})
    table.finish()
    kinds = ad.read_zarr(folder).obs["kind"]
    assert kinds.tolist() == [0, 1, 2, 3, 4]
    assert not kinds.isna().any()
