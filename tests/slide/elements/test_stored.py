"""Tables and shapes that are on disk and not in memory."""

from __future__ import annotations

import copy
from typing import Any

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

from pixnet_sd.errors import StoreError
from pixnet_sd.slide import open_slide, regions_sha256
from pixnet_sd.slide.elements import StoredShapes, obs_column, open_store, regions_of, shapes_of, tables_of
from pixnet_sd.slide.tables import measured, select_tables


@pytest.fixture
def written(tmp_path):
    """Write an object, and open it again without its tables and shapes."""

    def write(sdata: sd.SpatialData) -> sd.SpatialData:
        sdata.write(tmp_path / "slide.zarr")
        return sd.read_zarr(tmp_path / "slide.zarr", selection=("images", "labels"))

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
    whole = sd.read_zarr(light.path)
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
    light = written(sd.SpatialData(shapes={"spots": ShapesModel.parse(frame, transformations={"s": move})}))
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
        sdata = sd.SpatialData(shapes={"spots": circles(np.arange(2 * n).reshape(-1, 2))})
        sdata.write(tmp_path / "slide.zarr", overwrite=True)
        light = sd.read_zarr(tmp_path / "slide.zarr", selection=("images",))
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
    whole = sd.read_zarr(tmp_path / "slide.zarr")
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
