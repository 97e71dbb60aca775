"""Tables and shapes that are on disk and not in memory."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata as sd
from scipy import sparse
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, Identity, get_transformation

from pixnet_sd.errors import ElementError, StoreError
from pixnet_sd.slide import find_mpp, open_slide
from pixnet_sd.slide.elements import (
    StoredShapes,
    StoredTable,
    obs_column,
    obs_names,
    open_store,
    regions_of,
    shapes_of,
    table_link,
    tables_of,
)
from pixnet_sd.slide.elements import _stored as _open_store
from pixnet_sd.slide.elements import _stored as _stored_shapes
from pixnet_sd.slide.tables import measured, select_tables

VARIANTS = [{}, {"circles": True}, {"labels": True}, {"dataset_id": ""}]


@pytest.fixture
def written(tmp_path):
    """Write an object, and open it again without its tables and shapes."""

    def write(sdata: sd.SpatialData) -> sd.SpatialData:
        sdata.write(tmp_path / "slide.zarr")
        return sd.read_zarr(tmp_path / "slide.zarr", selection=("images", "labels"))

    return write


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_same_measured_as_opened_whole(visium_hd, written, arguments, shuffled: bool) -> None:
    sdata = visium_hd(**arguments)
    if shuffled:
        order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
        sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    light = written(sdata)
    whole = sd.read_zarr(light.path)
    assert not len(light.tables)
    assert not len(light.shapes)
    slides = [open_slide(one, working_mpp=1.0) for one in (light, whole)]
    assert slides[0].mpp == slides[1].mpp
    for one, other in zip(measured(light, slides[0]), measured(whole, slides[1]), strict=True):
        assert (one.table_key, one.element_key) == (other.table_key, other.element_key)
        pd.testing.assert_index_equal(one.instances, other.instances, check_names=False)
        pd.testing.assert_index_equal(one.var_names, other.var_names, check_names=False)
        np.testing.assert_array_equal(one.regions.centre_xy, other.regions.centre_xy)
        every = np.arange(len(one))
        np.testing.assert_array_equal(one.rows(every).toarray(), other.rows(every).toarray())
        assert one.is_complete


@pytest.mark.parametrize("arguments", VARIANTS)
def test_nothing_whole_is_read_for_bins(visium_hd, written, monkeypatch, arguments) -> None:
    light = written(visium_hd(**arguments))
    monkeypatch.setattr(StoredShapes, "load", None)
    slide = open_slide(light)
    assert len(measured(light, slide)) == 2
    place = {"coordinate_system": slide.coordinate_system, "from_system": slide.working_from_system}
    for key in (*shapes_of(light), *light.labels):
        if not (arguments.get("labels") and key in shapes_of(light)):  # its table annotates the labels
            assert len(regions_of(light, key, **place)[0])


@pytest.mark.parametrize("arguments", VARIANTS)
def test_regions_for_prediction(visium_hd, written, arguments) -> None:
    light = written(visium_hd(**arguments))
    whole = sd.read_zarr(light.path)
    for key in (*whole.shapes, *whole.labels):
        (one, ids), (other, names) = (
            regions_of(s, key, coordinate_system=arguments.get("dataset_id", "sample"), from_system=np.eye(3))
            for s in (light, whole)
        )
        assert type(one) is type(other)
        np.testing.assert_array_equal(ids, names)
        np.testing.assert_array_equal(one.centre_xy, other.centre_xy)


def test_spots_are_loaded(visium, written) -> None:
    light = written(visium())
    where = {"image_key": "tissue_full_image", "coordinate_system": "global"}
    assert find_mpp(light, **where) == find_mpp(sd.read_zarr(light.path), **where)
    (found,) = measured(light, open_slide(light))
    assert len(found) == 36


def test_tables_and_links(visium_hd, written) -> None:
    sdata = visium_hd(bins=(16, 8))
    light = written(sdata)
    assert select_tables(light) == ["square_008um", "square_016um"]
    link, other = (table_link(s, table_key="square_008um") for s in (light, sdata))
    assert link.element_key == other.element_key
    np.testing.assert_array_equal(link.rows, other.rows)
    np.testing.assert_array_equal(link.instances, other.instances)
    with pytest.raises(ElementError, match="There is no table 'other'. Tables: 'square_008um', 'square_016um'"):
        select_tables(light, table_key="other")


def test_predictions_on_disk_are_not_taken_for_counts(visium_hd, written) -> None:
    sdata = visium_hd(bins=(8,))
    sdata.tables["pixnet_x"] = sdata.tables["square_008um"].copy()
    sdata.tables["pixnet_x"].uns["pixnet_sd"] = {"target_sum": 1e4}
    assert select_tables(written(sdata)) == ["square_008um"]


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_stored_table(visium_hd, written, make) -> None:
    table = visium_hd(bins=(8,)).tables["square_008um"]
    table.X = make(table.X.toarray())
    whole = visium_hd(bins=(8,))
    whole.tables["square_008um"] = table
    light = written(whole)
    stored = tables_of(light)["square_008um"]
    assert isinstance(stored, StoredTable)
    assert (stored.n_obs, stored.n_vars) == table.shape
    assert list(stored.var_names) == list(table.var_names)
    assert obs_names(stored) == obs_names(table)
    assert dict(stored.uns["spatialdata_attrs"]) == table.uns["spatialdata_attrs"]
    assert "pixnet_sd" not in stored.uns
    assert stored.n_bytes > 0
    for name in ("array_row", "location_id"):
        np.testing.assert_array_equal(obs_column(stored, name), obs_column(table, name))
    assert isinstance(obs_column(stored, "region"), pd.Categorical)
    (found,) = measured(light, open_slide(light))
    dense = table.X.toarray() if sparse.issparse(table.X) else table.X
    np.testing.assert_array_equal(found.rows(np.arange(len(found))).toarray(), dense)


@pytest.mark.parametrize(
    "index",
    [pd.RangeIndex(30), pd.RangeIndex(5, 95, 3), pd.Index(range(30, 0, -1), name="id"), pd.Index(list("abc") * 10)],
)
def test_sample_of_shapes(written, monkeypatch, index: pd.Index) -> None:
    monkeypatch.setattr(_stored_shapes, "_SAMPLE", 7)
    monkeypatch.setattr(_stored_shapes, "_BATCH_ROWS", 4)
    move = Affine(np.array([[2.0, 0, 1], [0, 2, 3], [0, 0, 1]]), input_axes=("x", "y"), output_axes=("x", "y"))
    frame = gpd.GeoDataFrame({"radius": 1.0}, geometry=shapely.points(np.arange(60.0).reshape(-1, 2)), index=index)
    shapes = ShapesModel.parse(frame, transformations={"s": move, "": Identity()})
    stored = shapes_of(written(sd.SpatialData(shapes={"spots": shapes})))["spots"]
    picked = [0, 4, 9, 14, 19, 24, 29]
    assert len(stored) == 30
    assert list(stored.index) == list(index)
    assert list(stored.sample.index) == list(index[picked])
    np.testing.assert_array_equal(shapely.get_coordinates(stored.sample.geometry)[:, 0] / 2, picked)
    assert set(get_transformation(stored.sample, get_all=True)) == {"s", ""}
    assert len(stored.load()) == 30


def test_a_sample_is_taken_from_few_groups_of_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_stored_shapes, "_SAMPLE", 5)
    monkeypatch.setattr(_stored_shapes, "_SAMPLED_GROUPS", 3)
    frame = gpd.GeoDataFrame({"radius": np.ones(30)}, geometry=shapely.points(np.arange(60.0).reshape(-1, 2)))
    sd.SpatialData(shapes={"spots": ShapesModel.parse(frame)}).write(tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / "shapes" / "spots" / "shapes.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=4)  # groups begin at 0, 4, ... 28
    read = []
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, **options: (read.append(options["row_groups"]), whole(self, **options))[1],
    )
    sample = StoredShapes(file.parent).sample
    assert read == [[0, 3, 7]]
    assert list(sample.index) == [0, 2, 12, 14, 29]  # places 0, 2, 4, 6, 9 of those ten
    np.testing.assert_array_equal(shapely.get_coordinates(sample.geometry)[:, 0] / 2, sample.index)


def test_a_file_that_changed_is_sampled_anew(circles, tmp_path) -> None:
    for n in (3, 5):
        sdata = sd.SpatialData(shapes={"spots": circles(np.arange(2 * n).reshape(-1, 2))})
        sdata.write(tmp_path / "slide.zarr", overwrite=True)
        light = sd.read_zarr(tmp_path / "slide.zarr", selection=("images",))
        assert len(shapes_of(light)["spots"].sample) == n


@pytest.mark.filterwarnings("error:The table is annotating")
def test_open_store(visium_hd, written, monkeypatch, caplog) -> None:
    path = written(visium_hd(labels=True)).path
    whole = open_store(path)
    assert set(whole.tables) == {"square_008um", "square_016um"}
    assert set(whole.shapes) == {"sample_square_008um", "sample_square_016um"}
    assert len(whole.images) == 3
    assert len(whole.labels) == 2
    assert whole.path == path
    assert "left on disk" not in caplog.text
    small = StoredTable(path / "tables" / "square_016um"), StoredShapes(path / "shapes" / "sample_square_016um")
    monkeypatch.setattr(_open_store, "_SMALL_BYTES", max(element.n_bytes for element in small))
    caplog.set_level("INFO", "pixnet_sd")
    light = open_store(str(path))
    assert set(light.tables) == {"square_016um"}
    assert set(light.shapes) == {"sample_square_016um"}
    assert "left on disk, to be read when needed: sample_square_008um, square_008um" in caplog.text
    pd.testing.assert_frame_equal(light.tables["square_016um"].obs, whole.tables["square_016um"].obs)
    assert select_tables(light) == ["square_008um", "square_016um"]


def test_no_store(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"There is no store at .*convert_visium_hd\(folder, store\)"):
        open_store(tmp_path)


def test_what_was_taken_out_of_an_object_stays_out(visium_hd, written) -> None:
    whole = sd.read_zarr(written(visium_hd()).path)
    del whole.tables["square_008um"]
    del whole.shapes["sample_square_016um"]
    assert set(tables_of(whole)) == {"square_016um"}
    assert set(shapes_of(whole)) == {"sample_square_008um"}


@pytest.mark.filterwarnings("ignore:The table is annotating")
def test_results_do_not_hide_what_is_on_disk(visium_hd, written) -> None:
    sdata = visium_hd()
    result = sdata.tables["square_008um"].copy()
    result.uns["pixnet_sd"] = {"target_sum": 1e4}
    sdata.tables["pixnet_bins"] = result
    light = written(sdata)
    assert set(tables_of(light)) == {"square_008um", "square_016um", "pixnet_bins"}
    light.tables["pixnet_bins"] = light.tables["pixnet_not_written"] = result
    assert set(tables_of(light)) == {"square_008um", "square_016um", "pixnet_bins", "pixnet_not_written"}
