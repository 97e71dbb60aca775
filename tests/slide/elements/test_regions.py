from __future__ import annotations

import pickle

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData, read_zarr
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Affine, Identity, Scale, set_transformation

from pixnet_sd.errors import DataError, ElementError, ResolutionError
from pixnet_sd.geometry import Circles, LabelGrid, Lattice, Polygons
from pixnet_sd.slide.elements import LazyLabels, regions_of

XY = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
SAMPLE = {"coordinate_system": "sample", "from_system": np.eye(3)}


def turned(scale: float, angle: float, flip: bool) -> np.ndarray:
    cos, sin, sign = scale * np.cos(angle), scale * np.sin(angle), -1 if flip else 1
    return np.array([[cos, -sin * sign, 3.0], [sin, cos * sign, -5.0], [0, 0, 1]])


def some_labels(**kwargs) -> Labels2DModel:
    values = np.zeros((20, 30), dtype=np.uint16)
    values[2:5, 3:9], values[7:9, 1:3], values[12:20, 20:30] = 7, 3, 300
    return Labels2DModel.parse(values, dims=("y", "x"), transformations={"sample": Identity()}, **kwargs)


@given(st.floats(0.05, 20), st.floats(-np.pi, np.pi), st.booleans(), st.floats(0.05, 20), st.floats(-np.pi, np.pi))
def test_circles_through_two_maps(scale: float, angle: float, flip: bool, scale2: float, angle2: float) -> None:
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel

    to_system, from_system = turned(scale, angle, flip), turned(scale2, angle2, False)
    frame = GeoDataFrame({"radius": [2.0, 5.0]}, geometry=shapely.points([[10, 20], [30, 5]]), index=["b", "a"])
    spots = ShapesModel.parse(frame, transformations={"s": Affine(to_system, **XY)})
    regions, ids = regions_of(
        SpatialData(shapes={"spots": spots}), "spots", coordinate_system="s", from_system=from_system
    )
    assert isinstance(regions, Circles)
    assert list(ids) == ["b", "a"]
    np.testing.assert_allclose(regions.radius, np.array([2, 5]) * scale * scale2)
    expected = (from_system @ to_system @ [[10, 30], [20, 5], [1, 1]])[:2].T
    np.testing.assert_allclose(regions.centre_xy, expected, atol=1e-9)


@pytest.mark.parametrize("dataset_id", ["sample", ""])
def test_square_bins(visium_hd, dataset_id: str) -> None:
    sdata = visium_hd(dataset_id=dataset_id, mpp=0.25)
    key = f"{dataset_id}_square_008um"
    regions, ids = regions_of(sdata, key, coordinate_system=dataset_id, from_system=np.diag([0.5, 0.5, 1]))
    assert isinstance(regions, Lattice)
    assert list(ids) == list(sdata.shapes[key].index)
    np.testing.assert_allclose(regions.area, (8 / 0.5) ** 2)
    centres = shapely.get_coordinates(shapely.centroid(sdata.shapes[key].geometry.to_numpy()))
    np.testing.assert_allclose(regions.centre_xy, centres / 2)


def test_bins_without_indices_as_drawn(visium_hd) -> None:
    sdata = visium_hd()
    del sdata.tables["square_008um"]
    regions, ids = regions_of(sdata, "sample_square_008um", **SAMPLE)
    assert isinstance(regions, Polygons)
    assert list(ids) == list(sdata.shapes["sample_square_008um"].index)


def test_labels_keep_their_values_as_ids() -> None:
    sdata = SpatialData(labels={"cells": some_labels()})
    regions, ids = regions_of(sdata, "cells", coordinate_system="sample", from_system=np.diag([2.0, 2.0, 1]))
    assert isinstance(regions, LabelGrid)
    assert list(ids) == [3, 7, 300]
    np.testing.assert_allclose(regions.area, np.array([4, 18, 80]) * 4)
    np.testing.assert_allclose(regions.bounds[1], [6, 4, 18, 10])


def test_multiscale_labels_use_scale_0() -> None:
    sdata = SpatialData(labels={"cells": some_labels(scale_factors=[2])})
    regions, _ = regions_of(sdata, "cells", **SAMPLE)
    np.testing.assert_allclose(regions.area, [4, 18, 80])


def test_labels_are_read_lazily_and_pickle_small(tmp_path) -> None:
    SpatialData(labels={"cells": some_labels()}).write(tmp_path / "a.zarr")
    regions, _ = regions_of(read_zarr(tmp_path / "a.zarr"), "cells", **SAMPLE)
    assert isinstance(regions.labels, LazyLabels)
    copy = pickle.loads(pickle.dumps(regions))
    np.testing.assert_allclose(copy.area, [4, 18, 80])
    assert isinstance(regions.labels[2:4, 3:5], np.ndarray)


def test_lazy_labels_read_only_what_is_asked_for() -> None:
    seen = []

    def block(info: dict) -> np.ndarray:
        seen.append(info)
        return np.ones((10, 10), np.uint8)

    lazy = LazyLabels(da.map_blocks(lambda x: block(x), da.zeros((100, 100), chunks=10), meta=np.empty((0, 0), "u1")))
    assert lazy.shape == (100, 100)
    assert lazy[15:18, 15:25].shape == (3, 10)
    assert len(seen) == 2


@pytest.mark.parametrize("matrix", [None, turned(2.0, 1.0, True)])
def test_labels_of_bins_lie_on_the_bins(visium_hd, matrix) -> None:
    sdata = visium_hd(labels=True, matrix=matrix)
    table = sdata.tables["square_016um"]
    bins, bin_ids = regions_of(sdata, "sample_square_016um", **SAMPLE)
    labels, label_ids = regions_of(sdata, "sample_square_016um_labels", **SAMPLE)
    of_bin = labels.centre_xy[label_ids.get_indexer(table.obs["relabeled_location_id"])]
    of_label = bins.centre_xy[bin_ids.get_indexer(table.obs["location_id"])]
    np.testing.assert_allclose(of_bin, of_label, atol=1e-6)


def test_labels_of_bins_that_already_lie_right_are_not_moved(visium_hd) -> None:
    sdata = visium_hd(labels=True)
    key = "sample_square_016um_labels"
    (rasterized,) = (
        t.to_affine_matrix(("x", "y"), ("x", "y"))
        for s, t in sdata.labels[key].attrs["transform"].items()
        if s == "sample"
    )
    right = rasterized @ np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    set_transformation(sdata.labels[key], {"sample": Affine(right, **XY)}, set_all=True)
    np.testing.assert_allclose(regions_of(sdata, key, **SAMPLE)[0].to_grid, right)


def test_labels_named_like_no_bins_are_not_moved() -> None:
    sdata = SpatialData(labels={"cells_labels": some_labels(), "cells": some_labels()})
    np.testing.assert_array_equal(regions_of(sdata, "cells_labels", **SAMPLE)[0].to_grid, np.eye(3))


def test_only_background() -> None:
    labels = Labels2DModel.parse(np.zeros((4, 4), np.uint8), dims=("y", "x"), transformations={"sample": Identity()})
    with pytest.raises(DataError, match="nothing but background"):
        regions_of(SpatialData(labels={"cells": labels}), "cells", **SAMPLE)


def test_index_must_be_unique(circles) -> None:
    sdata = SpatialData(shapes={"cells": circles([[1, 2], [3, 4], [5, 6]], index=[0, 4, 4])})
    with pytest.raises(DataError, match=r"1 of 3 ids occurred before \(first 4\)"):
        regions_of(sdata, "cells", **SAMPLE)


N = 4


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.arange(N, dtype=np.int8), "int64"),
        (np.arange(N, dtype=np.uint64) + 2**63, "uint64"),
        (pd.array(range(N), dtype="Int64"), "int64"),
        (pd.CategoricalIndex(range(N)), "int64"),
        (list("abcd"), None),
        (pd.array(list("abcd"), dtype="string"), None),
        (pd.CategoricalIndex(["", "1", "a/b", "x" * 5000]), None),
    ],
)
@pytest.mark.parametrize("name", [None, "radius", "region", "instance_id", 5, ("a", 1)])
def test_ids_that_a_table_can_hold(circles, ids, expected, name) -> None:
    sdata = SpatialData(shapes={"cells": circles(np.arange(2.0 * N).reshape(N, 2))})
    sdata.shapes["cells"].index = pd.Index(ids).rename(name)
    found = regions_of(sdata, "cells", **SAMPLE)[1]
    assert found.tolist() == list(ids)
    assert found.name is None  # a table has columns of its own, which may be called alike
    assert expected is None or found.dtype == expected


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(N) * 1.0,
        np.arange(N) + 0.5,
        [np.nan, 1, 2, 3],
        [None, "b", "c", "d"],
        pd.array([None, 1, 2, 3], dtype="Int64"),
        [1, "1", 2, 3],
        pd.date_range("2020", periods=N),
        pd.to_timedelta(range(N), unit="s"),
        pd.period_range("2020", periods=N),
        pd.interval_range(0, N),
        pd.CategoricalIndex(np.arange(N) * 1.0),
        pd.MultiIndex.from_product([range(2), range(2)]),
        pd.Index([(k, k) for k in range(N)], tupleize_cols=False),
        pd.Index([[k] for k in range(N)]),
        [b"a", b"b", b"c", b"d"],
        np.arange(N) * 1j,
        [True, False, None, 3],
        ["\ud800", "b", "c", "d"],
    ],
    ids=str,
)
def test_ids_that_no_table_can_hold(circles, ids) -> None:
    sdata = SpatialData(shapes={"cells": circles(np.arange(2.0 * N).reshape(N, 2))})
    sdata.shapes["cells"].index = ids
    with pytest.raises(DataError, match=r"(?s)Shapes 'cells'.*sdata\['cells'\].index = "):
        regions_of(sdata, "cells", **SAMPLE)


def test_remedy_for_ids_works(circles) -> None:
    sdata = SpatialData(shapes={"cells": circles(np.arange(2.0 * N).reshape(N, 2))})
    for ids in (
        np.arange(N) * 1.0,
        pd.MultiIndex.from_product([range(2), range(2)]),
        ["\ud800", *"bcd"],
        [1, "a", 2, 3],
    ):
        sdata.shapes["cells"].index = ids
        with pytest.raises(DataError) as caught:
            regions_of(sdata, "cells", **SAMPLE)
        exec(str(caught.value).partition("its own: ")[2].partition(", and the ids")[0], {"sdata": sdata})
        assert len(regions_of(sdata, "cells", **SAMPLE)[1]) == N


def test_missing_element_or_system_or_stretched(circles) -> None:
    sdata = SpatialData(shapes={"cells": circles([[1, 2]])})
    with pytest.raises(ElementError, match=r"'nuclei'.*Shapes: 'cells'"):
        regions_of(sdata, "nuclei", **SAMPLE)
    with pytest.raises(ElementError, match="'um'"):
        regions_of(sdata, "cells", coordinate_system="um", from_system=np.eye(3))
    set_transformation(sdata.shapes["cells"], {"sample": Scale([1.0, 2.0], axes=("x", "y"))}, set_all=True)
    with pytest.raises(ResolutionError, match="element 'cells'"):
        regions_of(sdata, "cells", **SAMPLE)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64])
@pytest.mark.parametrize("negative", [-1, -7])
def test_negative_labels_are_background(kind, negative) -> None:
    values = np.full((20, 30), negative, kind)
    values[2:5, 3:9], values[7:9, 1:3], values[12:20, 20:30] = 7, 3, 0
    labels = Labels2DModel.parse(values, dims=("y", "x"), transformations={"sample": Identity()})
    regions, ids = regions_of(SpatialData(labels={"cells": labels}), "cells", **SAMPLE)
    assert list(ids) == [3, 7]
    np.testing.assert_array_equal(regions.area, [4, 18])


@pytest.mark.parametrize("values", [np.full((4, 4), -1), np.zeros((4, 4), int)])
def test_nothing_but_background(values) -> None:
    labels = Labels2DModel.parse(values, dims=("y", "x"), transformations={"sample": Identity()})
    with pytest.raises(DataError, match="'cells'"):
        regions_of(SpatialData(labels={"cells": labels}), "cells", **SAMPLE)


@pytest.mark.parametrize("kind", ["f4", "f8", "c8"])
def test_labels_that_are_not_whole_numbers(kind) -> None:
    labels = Labels2DModel.parse(np.ones((4, 4), kind), dims=("y", "x"), transformations={"sample": Identity()})
    with pytest.raises(DataError, match=f"'cells' are of dtype {np.dtype(kind)}"):
        regions_of(SpatialData(labels={"cells": labels}), "cells", **SAMPLE)
