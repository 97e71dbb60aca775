"""Shapes, labels and bins as regions, their maps, ids and lattices; tables and shapes that are on disk alone."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from spatialdata import SpatialData, read_zarr
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, get_transformation, set_transformation
from tests.slide.conftest import make_labels, similarity

from pixnet_sd.errors import DataError, ElementError, ResolutionError, StoreError
from pixnet_sd.geometry import Circles, LabelGrid, Polygons
from pixnet_sd.slide import open_slide, regions_sha256
from pixnet_sd.slide.elements import (
    LazyLabels,
    StoredShapes,
    bins_of_table,
    check_regions_on_image,
    fit_lattice,
    obs_column,
    open_store,
    regions_from_shapes,
    regions_of,
    shapes_of,
    similarity_scale,
    table_link,
    tables_of,
)
from pixnet_sd.slide.tables import measured, select_tables

XY = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
SAMPLE = {"coordinate_system": "sample", "from_system": np.eye(3)}
PLACE = SAMPLE | {"from_system": np.diag([2.0, 2.0, 1.0])}
SQUARE = shapely.box(2, 3, 8, 9)
RING = shapely.Polygon(shapely.box(0, 0, 10, 10).exterior, [shapely.box(2, 2, 5, 6).exterior])
ISLANDS = shapely.MultiPolygon([shapely.box(20, 20, 24, 24), shapely.Polygon(shapely.affinity.translate(RING, 30, 0))])


def frame(geometry: list[Any], **columns: Any) -> gpd.GeoDataFrame:
    return gpd.GeoDataFrame(columns, geometry=geometry, index=[f"c{i}" for i in range(len(geometry))])


def test_polygons_holes_and_multipolygons_in_order() -> None:
    geometry = [RING, SQUARE, ISLANDS, shapely.reverse(RING), shapely.force_3d(SQUARE, 7.0)]
    regions = regions_from_shapes(frame(geometry), "x")
    assert isinstance(regions, Polygons)
    np.testing.assert_allclose(regions.area, shapely.area(geometry))
    np.testing.assert_allclose(regions.centre_xy, shapely.get_coordinates(shapely.centroid(geometry)))
    np.testing.assert_allclose(regions.bounds, shapely.bounds(geometry))
    rings = regions_from_shapes(frame([RING, SQUARE]), "x")
    np.testing.assert_array_equal(rings.ring_offsets, [0, 4, 8, 12])  # no ring repeats its first vertex
    np.testing.assert_array_equal(rings.ring_region, [0, 0, 1])


with np.errstate(invalid="ignore"):
    BAD = [
        shapely.GeometryCollection([SQUARE]),
        shapely.Point(1, 2),
        shapely.LineString([(0, 0), (1, 1)]),
        shapely.Polygon(),
        None,
        shapely.Polygon([(0, 0), (4, np.nan), (4, 0)]),
        shapely.Polygon([(0, 0), (4, 4), (4, 0), (0, 4)]),  # intersects itself
    ]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_geometries_are_counted_and_named(bad: Any) -> None:
    with pytest.raises(DataError, match=r"Shapes 'cells': 2 of 4 .*first: 'c1', 'c3'"):
        regions_from_shapes(frame([SQUARE, bad, RING, bad]), "Shapes 'cells'")


def test_circles_are_finite_and_have_a_size() -> None:
    for x, radius in ((1, 0.0), (1, -1.0), (1, np.nan), (1, np.inf), (np.nan, 1.0)):
        with pytest.raises(DataError, match="1 of 2 .*first: 'c1'"):
            regions_from_shapes(frame([shapely.Point(1, 2), shapely.Point(x, 2)], radius=[1.0, radius]), "x")
    for geometry in ([], [shapely.Point(1, 2)]):  # none, or without a radius
        with pytest.raises(DataError, match="'cells'"):
            regions_from_shapes(frame(geometry), "Shapes 'cells'")


far = st.floats(-1e5, 1e5)
similarities = st.builds(similarity, st.floats(1e-3, 1e3), st.floats(-np.pi, np.pi), st.booleans(), st.tuples(far, far))


@given(similarities, similarities)
def test_circles_through_two_maps_and_the_scales_of_these(to_system: np.ndarray, from_system: np.ndarray) -> None:
    spots = gpd.GeoDataFrame({"radius": [2.0, 5.0]}, geometry=shapely.points([[10, 20], [30, 5]]), index=["b", "a"])
    sdata = SpatialData(shapes={"spots": ShapesModel.parse(spots, transformations={"s": Affine(to_system, **XY)})})
    regions, ids = regions_of(sdata, "spots", coordinate_system="s", from_system=from_system)
    assert isinstance(regions, Circles)
    assert list(ids) == ["b", "a"]
    both = from_system @ to_system
    centres = (both @ [[10, 30], [20, 5], [1, 1]])[:2].T
    np.testing.assert_allclose(regions.centre_xy, centres, atol=1e-9 * np.abs(both).max())
    first, second = (np.hypot(*matrix[:2, 0]) for matrix in (to_system, from_system))
    np.testing.assert_allclose(regions.radius, np.array([2, 5]) * first * second, rtol=1e-6)
    scales = [similarity_scale(matrix, "x") for matrix in (to_system, both, np.linalg.inv(to_system))]
    np.testing.assert_allclose(scales, [first, first * second, 1 / first], rtol=1e-6)


def some_labels(kind: Any = np.uint16, background: int = 0, **options: Any) -> Any:
    values = np.full((20, 30), background, dtype=kind)
    values[2:5, 3:9], values[7:9, 1:3], values[12:20, 20:30] = 7, 3, 100
    return make_labels(values, **options)


def test_labels_are_read_lazily_and_keep_their_values_as_ids(tmp_path) -> None:
    SpatialData(labels={"cells": some_labels()}).write(tmp_path / "a.zarr")
    multiscale = SpatialData(labels={"cells": some_labels(scale_factors=[2])})
    negative = [SpatialData(labels={"cells": some_labels(np.int8, value)}) for value in (-1, -7)]  # are background
    for sdata in (read_zarr(tmp_path / "a.zarr"), multiscale, *negative):
        regions, ids = regions_of(sdata, "cells", **PLACE)
        assert isinstance(regions, LabelGrid)
        assert isinstance(regions.labels, LazyLabels)
        assert list(ids) == [3, 7, 100]
        np.testing.assert_allclose(pickle.loads(pickle.dumps(regions)).area, np.array([4, 18, 80]) * 4)
        np.testing.assert_allclose(regions.bounds[1], [6, 4, 18, 10])
    for kind, value in ((int, -1), ("u1", 0), ("f4", 1), ("f8", 1), ("c8", 1)):  # nothing, and no whole numbers
        with pytest.raises(DataError, match="'cells'"):
            regions_of(SpatialData(labels={"cells": make_labels(np.full((4, 4), value, kind))}), "cells", **SAMPLE)
    zeros = da.zeros((100, 100), "u1", chunks=10)  # of which nothing is read but what is asked for
    lazy = LazyLabels(zeros.map_blocks(lambda block, block_id=(1,): block + 1 // (block_id[0] == 1), dtype="u1"))
    assert lazy[15:18, 15:25].sum() == 30


def test_labels_of_bins_lie_on_the_bins(visium_hd) -> None:
    """As spatialdata places them, half a label pixel off, and as they would lie right."""
    sdata, key = visium_hd(labels=True, matrix=similarity(2.0, 1.0, True, (3, -5))), "sample_square_016um"
    bins, bin_ids = regions_of(sdata, key, **SAMPLE)
    obs = sdata.tables["square_016um"].obs
    rasterized = get_transformation(sdata.labels[f"{key}_labels"], "sample").to_affine_matrix(("x", "y"), ("x", "y"))
    for place in (rasterized, rasterized @ np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])):
        set_transformation(sdata.labels[f"{key}_labels"], {"sample": Affine(place, **XY)}, set_all=True)
        labels, label_ids = regions_of(sdata, f"{key}_labels", **SAMPLE)
        of_label = labels.centre_xy[label_ids.get_indexer(obs["relabeled_location_id"])]
        np.testing.assert_allclose(of_label, bins.centre_xy[bin_ids.get_indexer(obs["location_id"])], atol=1e-6)
    sdata = SpatialData(labels={"cells_labels": some_labels(), "cells": some_labels()})  # named like no bins
    np.testing.assert_array_equal(regions_of(sdata, "cells_labels", **SAMPLE)[0].to_grid, np.eye(3))


def test_missing_element_or_system_or_no_similarity(circles) -> None:
    sdata = SpatialData(shapes={"cells": circles([[1, 2]])})
    with pytest.raises(ElementError, match="'nuclei'.*'cells'"):
        regions_of(sdata, "nuclei", **SAMPLE)
    with pytest.raises(ElementError, match="'um'"):
        regions_of(sdata, "cells", coordinate_system="um", from_system=np.eye(3))
    assert similarity_scale(np.diag([1.0, 1.0009, 1.0]), "x") == pytest.approx(np.sqrt(1.0009))
    sheared = np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1.0]])
    for matrix in (np.diag([1.0, 1.01, 1.0]), sheared, np.diag([1.0, 0.0, 1.0]), np.diag([np.nan, 1.0, 1.0])):
        set_transformation(sdata.shapes["cells"], {"sample": Affine(matrix, **XY)}, set_all=True)
        with pytest.raises(ResolutionError, match="'cells'"):
            regions_of(sdata, "cells", **SAMPLE)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.arange(4, dtype=np.int8), "int64"),
        (np.arange(4, dtype=np.uint64) + 2**63, "uint64"),
        (pd.array(range(4), dtype="Int64"), "int64"),
        (pd.CategoricalIndex(range(4)), "int64"),
        (pd.array(list("abcd"), dtype="string"), None),
        (pd.CategoricalIndex(["", "1", "a/b", "x" * 5000]), None),
    ],
)
def test_ids_that_a_table_can_hold(circles, ids, expected) -> None:
    sdata = SpatialData(shapes={"cells": circles(np.arange(8.0).reshape(4, 2))})
    sdata.shapes["cells"].index = pd.Index(ids, name="radius")
    found = regions_of(sdata, "cells", **SAMPLE)[1]
    assert found.tolist() == list(ids)
    assert found.name is None  # a table has columns of its own, which may be called alike
    assert expected is None or found.dtype == expected


TWICE = [[0, 4, 4, 5], [1, "1", 2, 3]]
UNFIT = [
    *(np.arange(4) * 1.0, np.arange(4) + 0.5, pd.CategoricalIndex(np.arange(4) * 1.0)),
    *([None, "b", "c", "d"], pd.array([None, 1, 2, 3], dtype="Int64"), [True, False, None, 3]),
    *(pd.MultiIndex.from_product([range(2), range(2)]), pd.Index([[k] for k in range(4)])),
    *(pd.date_range("2020", periods=4), [b"a", b"b", b"c", b"d"], ["\ud800", "b", "c", "d"]),
]


@pytest.mark.parametrize(("ids", "is_mended"), [*product(TWICE, [False]), *product(UNFIT, [True])], ids=str)
def test_ids_that_no_table_can_hold(circles, ids, is_mended: bool) -> None:
    sdata = SpatialData(shapes={"cells": circles(np.arange(8.0).reshape(4, 2))})
    sdata.shapes["cells"].index = ids
    with pytest.raises(DataError, match="Shapes 'cells'") as caught:
        regions_of(sdata, "cells", **SAMPLE)
    if is_mended:  # by the line that is proposed
        exec(str(caught.value).partition("its own: ")[2].partition(", and the ids")[0], {"sdata": sdata})
        assert len(regions_of(sdata, "cells", **SAMPLE)[1]) == 4


IMAGE = {"width": 400, "height": 100, "what": "Shapes 'cells'"}


@pytest.mark.filterwarnings("error")
def test_regions_inside_across_the_edge_and_outside() -> None:
    assert check_regions_on_image(Circles(np.array([(10, 10), (399, 99), (-1, 50), (401, 50)]), 2), **IMAGE).all()
    few = Circles(np.array([(10, 90), (50, 50), (60, 101)]), 2)  # are not "swapped"
    assert check_regions_on_image(few, **IMAGE).all()
    with pytest.warns(UserWarning, match="Shapes 'cells': 1 of 3"):
        touches = check_regions_on_image(Circles(np.array([(10, 10), (500, 50), (300, 50)]), 2), **IMAGE)
    np.testing.assert_array_equal(touches, [True, False, True])
    swapped = [(y, x) for x in range(110, 400, 20) for y in range(5, 100, 20)]
    for xy, found in ((swapped, "100% would.*swapped.*x 3 to"), ([(1000, 10), (2000, 10)], "none of 2.*x 998 to")):
        with pytest.raises(ResolutionError, match=f"'cells'.*{found}"):
            check_regions_on_image(Circles(np.array(xy), 2), **IMAGE)


TABLE, SHAPES = "square_008um", "sample_square_008um"


@given(
    st.floats(0.5, 50),
    st.floats(-np.pi, np.pi),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=3, max_size=30, unique=True),
)
def test_fit_with_any_gaps(pitch: float, angle: float, points: list[tuple[int, int]]) -> None:
    col_row, lattice = np.array(points, dtype=float), similarity(pitch, angle, False, (7, 9))
    matrix = fit_lattice(col_row, col_row @ lattice[:2, :2].T + lattice[:2, 2])
    assert (matrix is not None) == (np.linalg.matrix_rank(col_row[1:] - col_row[0]) == 2)
    if matrix is not None:
        np.testing.assert_allclose(matrix, lattice, atol=1e-6 * pitch)


def bins(sdata):
    return bins_of_table(sdata, table_link(sdata, table_key=TABLE), **PLACE)


@pytest.mark.parametrize(("angle", "circles"), [(0.0, False), (-0.4, True), (1.6, False), (3.0, True)])
@pytest.mark.parametrize("keep", [None, lambda row, col: (row + 2 * col) % 5 > 1], ids=["all", "gaps"])
def test_bins_lie_on_their_centres_and_are_turned(visium_hd, circles: bool, angle: float, keep) -> None:
    sdata = visium_hd(angle=angle, circles=circles, keep=keep, bins=(8,))
    order = np.random.default_rng(0).permutation(sdata.tables[TABLE].n_obs)  # of the table's rows
    sdata.tables[TABLE] = sdata.tables[TABLE][order].copy()
    found = bins(sdata)
    obs = sdata.tables[TABLE].obs.iloc[found.rows]
    assert len(found.lattice) == len(sdata.shapes[SHAPES])
    np.testing.assert_array_equal(found.lattice.row, obs["array_row"])
    np.testing.assert_array_equal(found.lattice.col, obs["array_col"])
    np.testing.assert_array_equal(found.instances, obs["location_id"])
    assert (np.diff(found.lattice.row * 1000 + found.lattice.col) > 0).all()
    drawn = sdata.shapes[SHAPES].geometry.loc[found.instances].to_numpy()
    np.testing.assert_allclose(found.lattice.centre_xy, 2 * shapely.get_coordinates(shapely.centroid(drawn)), atol=1e-6)
    np.testing.assert_allclose(found.lattice.area, (2 * 8 / 0.5) ** 2)
    turn = found.lattice.to_grid[:2, 0]
    assert np.arctan2(turn[1], turn[0]) == pytest.approx(angle, abs=1e-9)
    regions, ids = regions_of(sdata, SHAPES, **PLACE)
    assert regions_sha256(regions) == regions_sha256(found.lattice)
    np.testing.assert_array_equal(ids, found.instances)


def swapped(obs) -> None:
    obs[["array_row", "array_col"]] = obs[["array_col", "array_row"]].sample(frac=1, random_state=0).to_numpy()


SPOILT = {
    "swapped": swapped,
    "halved": lambda obs: obs.update({"array_row": obs["array_row"] // 2}),
    "fraction": lambda obs: obs.isetitem(obs.columns.get_loc("array_row"), obs["array_row"] + 0.5),
    "text": lambda obs: obs.isetitem(obs.columns.get_loc("array_row"), obs["array_row"].astype(str)),
    "twice": lambda obs: obs.update(obs[["array_row", "array_col"]].iloc[:1].set_index(obs.index[1:2])),
    "exchanged": lambda obs: obs.update(obs[["array_row", "array_col"]].iloc[[0, 50]].set_index(obs.index[[50, 0]])),
    "missing": lambda obs: obs.isetitem(obs.columns.get_loc("array_col"), obs["array_col"].where(obs["array_col"] > 0)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_wrong_indices_fall_back_to_what_is_drawn(visium_hd, spoil) -> None:
    for drawn, kind in (({}, Polygons), ({"circles": True}, Circles), ({"labels": True}, LabelGrid)):
        sdata = visium_hd(bins=(8,), **drawn)
        spoil(sdata.tables[TABLE].obs)
        assert bins(sdata) is None
        regions, ids = regions_of(sdata, f"{SHAPES}_labels" if kind is LabelGrid else SHAPES, **PLACE)
        assert isinstance(regions, kind)
        assert len(ids) == len(sdata.shapes[SHAPES])
    sdata.tables[TABLE] = visium_hd(bins=(8,)).tables[TABLE][5:].copy()  # of some bins
    assert isinstance(regions_of(sdata, SHAPES, **PLACE)[0], Polygons)


def test_lattices_that_are_none_of_touching_squares(visium_hd, visium) -> None:
    apart = visium_hd(circles=True)
    apart.shapes[SHAPES]["radius"] *= 0.5
    assert bins(apart) is None
    spots = visium()
    row, col = (index.ravel() for index in np.mgrid[:6, :6])
    spots.tables["table"].obs["array_row"], spots.tables["table"].obs["array_col"] = row, 2 * col + row % 2
    link = table_link(spots, table_key="table")
    assert bins_of_table(spots, link, coordinate_system="global", from_system=np.eye(3)) is None


@pytest.fixture
def written(tmp_path):
    """Write an object, and open it again without its tables and shapes."""

    def write(sdata: SpatialData) -> SpatialData:
        sdata.write(tmp_path / "slide.zarr")
        return read_zarr(tmp_path / "slide.zarr", selection=("images", "labels"))

    return write


@pytest.mark.parametrize(
    ("kind", "arguments", "make"),
    [
        ("visium_hd", {"labels": True}, sparse.csr_matrix),
        ("visium_hd", {"circles": True, "dataset_id": ""}, np.asarray),
        ("visium", {}, sparse.csc_matrix),
    ],
)
def test_same_regions_and_counts_as_opened_whole(request, written, monkeypatch, kind: str, arguments, make) -> None:
    sdata = request.getfixturevalue(kind)(**arguments)
    for key, table in sdata.tables.items():
        sdata.tables[key] = table[np.random.default_rng(0).permutation(table.n_obs)].copy()
        sdata.tables[key].X = make(sdata.tables[key].X.toarray())
    light = written(sdata)
    whole = read_zarr(light.path)
    if kind == "visium_hd":
        monkeypatch.setattr(StoredShapes, "load", None)  # of bins nothing is read whole
    slides = [open_slide(one, working_mpp=1.0) for one in (light, whole)]
    assert slides[0].taken() == slides[1].taken()

    def assert_same(one: Any, other: Any, ids: pd.Index, other_ids: pd.Index) -> None:
        assert regions_sha256(one) == regions_sha256(other)
        pd.testing.assert_index_equal(ids, other_ids, check_names=False)

    for one, other in zip(measured(light, slides[0]), measured(whole, slides[1]), strict=True):
        assert (one.table_key, one.element_key) == (other.table_key, other.element_key)
        assert list(one.var_names) == list(other.var_names)
        assert_same(one.regions, other.regions, one.instances, other.instances)
        np.testing.assert_array_equal(one.counts.to_csr().toarray(), other.counts.to_csr().toarray())
        assert isinstance(obs_column(tables_of(light)[one.table_key], "region"), pd.Categorical)  # not a text a row
    place = {"coordinate_system": slides[0].coordinate_system, "from_system": np.eye(3)}
    for key in (*whole.shapes, *whole.labels):
        if not ("labels" in arguments and key in whole.shapes):  # the tables annotate the labels
            (one, ids), (other, other_ids) = (regions_of(s, key, **place) for s in (light, whole))
            assert_same(one, other, ids, other_ids)


NAMED = pd.Index([f"cell {k}" for k in range(6000)], name="id")


@pytest.mark.parametrize("index", [pd.RangeIndex(5, 18005, 3), NAMED], ids=["counted by 3", "text"])
def test_sample_of_shapes(written, index: pd.Index) -> None:
    move = Affine(np.array([[2.0, 0, 1], [0, 2, 3], [0, 0, 1]]), input_axes=("x", "y"), output_axes=("x", "y"))
    frame = gpd.GeoDataFrame({"radius": 1.0}, geometry=shapely.points(np.arange(12000.0).reshape(-1, 2)), index=index)
    light = written(SpatialData(shapes={"spots": ShapesModel.parse(frame, transformations={"s": move})}))
    stored = shapes_of(light)["spots"]
    for n_rows in (None, 7):  # in one group of rows, and in many, of which 16 are read
        if n_rows:
            file = stored.path / "shapes.parquet"
            pq.write_table(pq.read_table(file), file, row_group_size=n_rows)
            stored = shapes_of(light)["spots"]
        positions = shapely.get_coordinates(stored.sample().geometry)[:, 0].astype(int) // 2
        assert len(stored) == len(stored.index) == 6000
        assert list(stored.sample().index) == list(index[positions])
        assert set(get_transformation(stored.sample(), get_all=True)) == {"s"}
        assert (positions[0], positions[-1]) == (0, 5999)
        assert len(positions) == (15 * n_rows + 6000 % n_rows if n_rows else 5000)
        assert len(set(positions // n_rows)) == 16 if n_rows else np.diff(positions).max() == 2
    assert list(stored.load().index) == list(index)


def test_a_file_that_changed_is_sampled_anew(circles, tmp_path) -> None:
    for n in (3, 5):
        sdata = SpatialData(shapes={"spots": circles(np.arange(2 * n).reshape(-1, 2))})
        sdata.write(tmp_path / "slide.zarr", overwrite=True)
        light = read_zarr(tmp_path / "slide.zarr", selection=("images",))
        assert len(shapes_of(light)["spots"].sample()) == n


@pytest.mark.filterwarnings("error:The table is annotating")
def test_open_store(visium_hd, circles, table, tmp_path, caplog) -> None:
    sdata = visium_hd(labels=True)
    n = 70_000  # of 500 bytes each
    sdata["cells"] = circles(np.random.default_rng(0).uniform(0, 200, (n, 2)))
    sdata["counts"] = table("cells", np.arange(n), x=np.zeros((n, 80), np.float32))
    sdata.write(tmp_path / "slide.zarr")
    caplog.set_level("INFO", "pixnet_sd")
    light = open_store(str(tmp_path / "slide.zarr"))
    assert set(light.tables) == {"square_008um", "square_016um"}
    assert set(light.shapes) == {"sample_square_008um", "sample_square_016um"}
    assert (len(light.images), len(light.labels), light.path) == (3, 2, tmp_path / "slide.zarr")
    assert "left on disk, to be read when needed: cells, counts" in caplog.text
    pd.testing.assert_frame_equal(light.tables["square_016um"].obs, sdata.tables["square_016um"].obs)
    for each in (light, copy.copy(light)):  # a copy of the object knows what was left on disk, too
        assert set(tables_of(each)) == {"square_008um", "square_016um", "counts"}
        assert isinstance(shapes_of(each)["cells"], StoredShapes)
    whole = read_zarr(tmp_path / "slide.zarr")
    for each in (light, whole):
        del each.tables["square_008um"]  # what was taken out stays out
        assert set(tables_of(each)) == {"square_016um", "counts"}
    with pytest.raises(StoreError, match="convert_visium_hd"):
        open_store(tmp_path)


def test_results_do_not_hide_what_is_on_disk(visium_hd, written) -> None:
    sdata = visium_hd(bins=(8,))
    result = sdata.tables["square_008um"].copy()
    result.uns["pixnet_sd"] = {"target_sum": 1e4}
    sdata.tables["pixnet_bins"] = result
    light = written(sdata)
    assert set(tables_of(light)) == {"square_008um", "pixnet_bins"}
    assert select_tables(light) == ["square_008um"]
    light.tables["pixnet_bins"] = light.tables["pixnet_not_written"] = result
    assert set(tables_of(light)) == {"square_008um", "pixnet_bins", "pixnet_not_written"}
