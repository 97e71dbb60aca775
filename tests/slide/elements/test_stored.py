"""Tables and shapes that are on disk and not in memory."""

from __future__ import annotations

import copy

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata as sd
from scipy import sparse
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, get_transformation

from pixnet_sd.errors import ElementError, StoreError
from pixnet_sd.slide import open_slide
from pixnet_sd.slide.elements import (
    StoredShapes,
    obs_column,
    open_store,
    regions_of,
    shapes_of,
    tables_of,
)
from pixnet_sd.slide.tables import measured, select_tables

pytestmark = pytest.mark.filterwarnings("ignore:zarr v3 autosharding")  # of anndata, as spatialdata writes
VARIANTS = [{"labels": True}, {"circles": True, "dataset_id": ""}]


@pytest.fixture
def written(tmp_path):
    """Write an object, and open it again without its tables and shapes."""

    def write(sdata: sd.SpatialData) -> sd.SpatialData:
        sdata.write(tmp_path / "slide.zarr")
        return sd.read_zarr(tmp_path / "slide.zarr", selection=("images", "labels"))

    return write


@pytest.mark.parametrize(("arguments", "shuffled"), [(each, k % 2 == 0) for k, each in enumerate(VARIANTS)])
def test_same_regions_and_counts_as_opened_whole(visium_hd, written, monkeypatch, arguments, shuffled: bool) -> None:
    sdata = visium_hd(**arguments)
    if shuffled:
        order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
        sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    light = written(sdata)
    whole = sd.read_zarr(light.path)
    monkeypatch.setattr(StoredShapes, "load", None)  # of bins nothing is read whole
    slides = [open_slide(one, working_mpp=1.0) for one in (light, whole)]
    assert slides[0].mpp == slides[1].mpp
    for one, other in zip(measured(light, slides[0]), measured(whole, slides[1]), strict=True):
        assert (one.table_key, one.element_key) == (other.table_key, other.element_key)
        pd.testing.assert_index_equal(one.instances, other.instances, check_names=False)
        np.testing.assert_array_equal(one.regions.centre_xy, other.regions.centre_xy)
        every = np.arange(len(one))
        np.testing.assert_array_equal(one.rows(every).toarray(), other.rows(every).toarray())
    place = {"coordinate_system": arguments.get("dataset_id", "sample"), "from_system": np.eye(3)}
    for key in (*whole.shapes, *whole.labels):
        if not (arguments.get("labels") and key in whole.shapes):  # the tables annotate the labels
            (one, ids), (other, names) = (regions_of(s, key, **place) for s in (light, whole))
            assert type(one) is type(other)
            np.testing.assert_array_equal(ids, names)
            np.testing.assert_array_equal(one.centre_xy, other.centre_xy)


def test_what_is_no_lattice_is_loaded(visium, written) -> None:
    light = written(visium())
    whole = sd.read_zarr(light.path)
    slides = [open_slide(one) for one in (light, whole)]
    assert slides[0].taken() == slides[1].taken()
    one, other = (measured(*each)[0].regions for each in zip((light, whole), slides, strict=True))
    np.testing.assert_array_equal(one.centre_xy, other.centre_xy)
    np.testing.assert_array_equal(one.radius, other.radius)


@pytest.mark.parametrize("make", [np.asarray, sparse.csc_matrix])
def test_stored_table(visium_hd, written, make) -> None:
    whole = visium_hd(bins=(8,))
    table = whole.tables["square_008um"]
    table.X = make(table.X.toarray())
    light = written(whole)
    stored = tables_of(light)["square_008um"]
    assert (stored.n_obs, stored.n_vars) == stored.shape == table.shape
    assert list(stored.var_names) == list(table.var_names)
    assert set(stored.obs.columns) == set(table.obs.columns)
    assert list(stored.var.columns) == list(table.var.columns)
    assert dict(stored.uns["spatialdata_attrs"]) == table.uns["spatialdata_attrs"]
    assert "pixnet_sd" not in stored.uns
    for name in ("array_row", "location_id"):
        np.testing.assert_array_equal(obs_column(stored, name), obs_column(table, name))
    assert isinstance(obs_column(stored, "region"), pd.Categorical)
    (found,) = measured(light, open_slide(light))
    dense = table.X.toarray() if sparse.issparse(table.X) else table.X
    np.testing.assert_array_equal(found.rows(np.arange(len(found))).toarray(), dense)
    with pytest.raises(ElementError, match="'other'.*'square_008um'"):
        select_tables(light, table_key="other")


NAMED = pd.Index([f"cell {k}" for k in range(6000)], name="id")


@pytest.mark.parametrize("index", [pd.RangeIndex(5, 18005, 3), NAMED], ids=["counted by 3", "text"])
def test_sample_of_shapes(written, index: pd.Index) -> None:
    move = Affine(np.array([[2.0, 0, 1], [0, 2, 3], [0, 0, 1]]), input_axes=("x", "y"), output_axes=("x", "y"))
    frame = gpd.GeoDataFrame({"radius": 1.0}, geometry=shapely.points(np.arange(12000.0).reshape(-1, 2)), index=index)
    light = written(sd.SpatialData(shapes={"spots": ShapesModel.parse(frame, transformations={"s": move})}))
    stored = shapes_of(light)["spots"]
    for n_rows in (None, 7):  # in one group of rows, and in many, of which 16 are read
        if n_rows:
            file = stored.path / "shapes.parquet"
            pq.write_table(pq.read_table(file), file, row_group_size=n_rows)
            stored = shapes_of(light)["spots"]
        positions = shapely.get_coordinates(stored.sample.geometry)[:, 0].astype(int) // 2
        assert len(stored) == len(stored.index) == 6000
        assert list(stored.sample.index) == list(index[positions])
        assert set(get_transformation(stored.sample, get_all=True)) == {"s"}
        assert (positions[0], positions[-1]) == (0, 5999)
        assert len(positions) == (15 * n_rows + 6000 % n_rows if n_rows else 5000)
        assert len(set(positions // n_rows)) == 16 if n_rows else np.diff(positions).max() == 2
    assert list(stored.load().index) == list(index)


def test_a_file_that_changed_is_sampled_anew(circles, tmp_path) -> None:
    for n in (3, 5):
        sdata = sd.SpatialData(shapes={"spots": circles(np.arange(2 * n).reshape(-1, 2))})
        sdata.write(tmp_path / "slide.zarr", overwrite=True)
        light = sd.read_zarr(tmp_path / "slide.zarr", selection=("images",))
        assert len(shapes_of(light)["spots"].sample) == n


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
    whole = sd.read_zarr(tmp_path / "slide.zarr")
    for each in (light, whole):
        del each.tables["square_008um"]  # what was taken out stays out
        assert set(tables_of(each)) == {"square_016um", "counts"}
    with pytest.raises(StoreError, match="convert_visium_hd"):
        open_store(tmp_path)


@pytest.mark.filterwarnings("ignore:The table is annotating")
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
