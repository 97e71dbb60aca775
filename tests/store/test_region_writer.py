"""A table that was streamed to disk is the table that is made in memory, and enters the store like any result."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from contextlib import contextmanager
from functools import partial

import anndata as ad
import geopandas as gpd
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import squidpy as sq
import zarr
from geopandas.testing import assert_geodataframe_equal
from spatialdata.transformations import get_transformation
from tests.store.putting import enter

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import RegionShare, Window
from pixnet_sd.store import (
    Expressed,
    RegionWriter,
    RowInfo,
    Transaction,
    _stream,
    circles_element,
    estimate_table_bytes,
    expression,
    hold_lock,
    region_table,
    squares_element,
    thumbnail,
    work_folder,
)
from pixnet_sd.store import _notes as _read_back
from pixnet_sd.store.gene_map import image_transforms

GENES = ["ERBB2", "MT-CO1", "gène"]
N = 57
OFF = 6  # every seventh region holds no pixel of the slide
WINDOWS = [Window(k, k + 1, 0, 1) for k in range(4)]
IDS = {"numbers": np.arange(N) * 3 + 1, "text": np.array([f"célula-{k}" for k in range(N)], object)}
CENTRES = np.random.default_rng(3).uniform(20, 280, (N, 2))


def describe(ids, start, stop, weight):
    obs = {"area_um2": CENTRES[start:stop, 0], "n_px": np.arange(start, stop), "edge": np.arange(start, stop) % 2 == 0}
    return RowInfo(ids[start:stop], CENTRES[start:stop], obs)


def put_all(writer, n_windows=4):
    for number, window in enumerate(WINDOWS[:n_windows]):
        rng = np.random.default_rng(number)
        mine, shared = np.arange(N) % 5 == number, np.arange(N) % 5 == 4
        index = np.flatnonzero((mine | shared) & (np.arange(N) % 7 != OFF))
        sums = rng.random((len(index), len(GENES)), dtype=np.float32)
        writer.put(RegionShare(window, index, sums, rng.uniform(1, 9, len(index)), mine[index]))


@contextmanager
def open_writer(sdata, *, fingerprint="f", overwrite=False, n_bytes=0, wait_s=15.0, **options):
    names = {"pixnet_t": "tables", "pixnet_t_shapes": "shapes"}
    with (
        Transaction(sdata, names, overwrite=overwrite, n_bytes=n_bytes, wait_s=wait_s) as out,
        RegionWriter.open(
            out, table_key="pixnet_t", n_regions=N, genes=GENES, fingerprint=fingerprint, **options
        ) as writer,
    ):
        writer.commit = out.commit
        yield writer


def makers(sdata, kind):
    transforms = image_transforms(sdata, "_full_image")
    make_table = partial(
        region_table,
        genes=GENES,
        region="pixnet_t_shapes",
        spot_diameter_px=16.0,
        picture=thumbnail(sdata, "_full_image", max_px=100),
        library_id="",
        var=pd.DataFrame({"held_out_pcc": [0.1, np.nan, 0.2]}, index=GENES),
        uns={"pixnet_sd": {"model_sha256": "abc", "mpp": 0.5}},
    )
    if kind == "circles":
        return make_table, partial(circles_element, radius_px=8.0, transforms=transforms)
    return make_table, partial(squares_element, side_px=8.0, angle_rad=0.2, transforms=transforms)


def counted(sums, weight):
    """A layer and a column besides the values."""
    return Expressed(np.log1p(sums), {"expected_counts": sums}, {"expected_total_counts": sums.sum(axis=1)})


def results(sdata, writer, ids="numbers", kind="circles", aggregation="mean"):
    make_table, make_shapes = makers(sdata, kind)
    return writer.results(
        partial(describe, IDS[ids]),
        make_table=make_table,
        express=counted if aggregation == "counts" else partial(expression, aggregation=aggregation),
        shapes_key="pixnet_t_shapes",
        make_shapes=make_shapes,
    )


def run(sdata, ids="numbers", kind="circles", aggregation="mean", **options):
    with open_writer(sdata, **options) as writer:
        put_all(writer)
        made = results(sdata, writer, ids, kind, aggregation)
        writer.commit(made, provenance={"tables": {"pixnet_t": {}}})


def assert_same_table(found, expected):
    np.testing.assert_array_equal(found.X, expected.X)
    assert found.X.dtype == expected.X.dtype == np.float32
    assert set(found.layers) == set(expected.layers)
    for name, layer in expected.layers.items():
        np.testing.assert_array_equal(found.layers[name], layer)
        assert layer.any()
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_exact=True)
    pd.testing.assert_frame_equal(found.var, expected.var, check_exact=True)
    np.testing.assert_array_equal(found.obsm["spatial"], expected.obsm["spatial"])
    assert found.obsm["spatial"].dtype == expected.obsm["spatial"].dtype
    assert set(found.uns) == set(expected.uns)
    assert found.uns["spatialdata_attrs"] == expected.uns["spatialdata_attrs"]
    assert found.uns["pixnet_sd"] == expected.uns["pixnet_sd"]
    ours, theirs = (table.uns["spatial"]["pixnet"] for table in (found, expected))
    assert ours["scalefactors"] == theirs["scalefactors"]
    np.testing.assert_array_equal(ours["images"]["hires"], theirs["images"]["hires"])


@pytest.fixture(params=[2, 2**16], ids=["small chunks", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(_stream, "MAX_VALUE_ROWS", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("ids", "kind", "aggregation"),
    [
        ("numbers", "circles", "mean"),
        ("text", "squares", "sum"),
        ("numbers", "squares", "mean"),
        ("text", "circles", "counts"),
    ],
)
def test_streamed_equals_made_in_memory(slide, in_memory, tmp_path, user_files, ids, kind, aggregation):
    before = user_files(slide.path)
    run(slide, ids, kind, aggregation)
    run(in_memory, ids, kind, aggregation)
    in_memory.write(tmp_path / "theirs.zarr")
    theirs = sd.read_zarr(tmp_path / "theirs.zarr")
    assert theirs.tables["pixnet_t"].n_obs == N - N // 7
    for ours in (slide, sd.read_zarr(slide.path)):
        assert_same_table(ours.tables["pixnet_t"], theirs.tables["pixnet_t"])
        found, expected = (sdata.shapes["pixnet_t_shapes"] for sdata in (ours, theirs))
        assert_geodataframe_equal(found, expected)
        matrices = [
            {system: matrix.to_affine_matrix(("x", "y"), ("x", "y")) for system, matrix in transforms.items()}
            for transforms in (get_transformation(element, get_all=True) for element in (found, expected))
        ]
        np.testing.assert_equal(*matrices)
    assert user_files(slide.path) == before
    assert not work_folder(slide.path).exists()
    ours = json.loads((slide.path / "zarr.json").read_text())
    sd.read_zarr(slide.path).write_consolidated_metadata()
    assert json.loads((slide.path / "zarr.json").read_text()) == ours


def test_values_are_means_over_the_shares(in_memory):
    run(in_memory)
    table, region = in_memory.tables["pixnet_t"], 4  # lies in all four windows
    sums, weights = np.zeros(len(GENES)), 0.0
    for number in range(4):
        rng = np.random.default_rng(number)
        mine, shared = np.arange(N) % 5 == number, np.arange(N) % 5 == 4
        index = np.flatnonzero((mine | shared) & (np.arange(N) % 7 != OFF))
        at = index.tolist().index(region)
        sums += rng.random((len(index), len(GENES)), dtype=np.float32)[at]
        weights += rng.uniform(1, 9, len(index))[at]
    np.testing.assert_allclose(table[str(IDS["numbers"][region])].X[0], sums / weights, rtol=1e-6)


def test_parquet_is_as_geopandas_writes_it(slide, tmp_path):
    import pyarrow.parquet as pq

    run(slide, kind="squares")
    ours = pq.ParquetFile(slide.path / "shapes/pixnet_t_shapes/shapes.parquet")
    frame = gpd.GeoDataFrame(geometry=slide.shapes["pixnet_t_shapes"].geometry)
    frame.to_parquet(tmp_path / "theirs.parquet")
    theirs = pq.ParquetFile(tmp_path / "theirs.parquet")
    assert ours.schema_arrow.equals(theirs.schema_arrow)
    assert json.loads(ours.metadata.metadata[b"geo"]) == json.loads(theirs.metadata.metadata[b"geo"])


@pytest.mark.usefixtures("chunks")
def test_geoarrow_setting_of_spatialdata_is_followed(slide, monkeypatch):
    monkeypatch.setattr(sd.settings, "shapes_geometry_encoding", "geoarrow")
    run(slide, kind="squares")
    made = squares_element(CENTRES, 8.0, {"": get_transformation(slide.images["_full_image"], "")}, angle_rad=0.2)
    kept = np.arange(N) % 7 != OFF
    found = sd.read_zarr(slide.path).shapes["pixnet_t_shapes"]
    assert found.geometry.geom_equals_exact(made.geometry[kept].set_axis(found.index), 1e-9).all()


def test_squidpy_draws_the_streamed_table(slide):
    mpl.use("Agg")
    run(slide)
    axes = sq.pl.spatial_scatter(sd.read_zarr(slide.path).tables["pixnet_t"], color="ERBB2", return_ax=True)
    assert len(axes.collections[0].get_paths()) == N - N // 7
    mpl.pyplot.close("all")


def test_chunks_hold_whole_rows_with_the_codecs_of_anndata(slide, in_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(_stream, "MAX_VALUE_ROWS", 8)
    run(slide)
    run(in_memory)
    in_memory.write(tmp_path / "theirs.zarr")
    ours, theirs = (zarr.open_array(store / "tables/pixnet_t/X") for store in (slide.path, tmp_path / "theirs.zarr"))
    assert ours.chunks == (8, len(GENES))
    assert ours.compressors == theirs.compressors
    assert ours.attrs.asdict() == theirs.attrs.asdict()


def test_no_region_on_the_slide(slide, in_memory):
    for sdata in (slide, in_memory):
        with open_writer(sdata) as writer, pytest.raises(DataError, match="None of the 57 regions"):
            results(sdata, writer)


def test_columns_that_cannot_be_written_in_parts_are_refused(tmp_path):
    group = zarr.open_group(tmp_path / "obs")
    ad.io.write_elem(group, "kind", pd.Categorical(["x"]))
    with pytest.raises(StoreError, match=r"'kind'.*'categorical'.*as numbers"):
        _stream._stretch_column(tmp_path / "obs/kind", 5)


def test_nullable_columns_are_filled_without_a_gap(tmp_path):
    group = zarr.open_group(tmp_path / "obs")
    ad.io.write_elem(group, "n", pd.array([7], dtype="Int64"))
    _stream._stretch_column(tmp_path / "obs/n", 5)[:] = np.arange(5)
    found = ad.io.read_elem(group["n"])
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert not found.isna().any()


def test_a_killed_run_is_taken_up(slide, in_memory):
    run(in_memory)
    with open_writer(slide) as writer:
        put_all(writer, 2)
        folder = writer.rows.folder
    enter(slide, {"other": "images"})  # another call in between leaves the partial table alone
    assert folder.exists()
    (folder / "table.zarr").mkdir()  # the run before was killed while it wrote the table
    (folder / "shapes.zarr").mkdir()
    with open_writer(slide) as writer:
        assert [writer.is_done(window) for window in WINDOWS] == [True, True, False, False]
        put_all(writer)
        made = results(slide, writer)
        writer.commit(made)
    np.testing.assert_array_equal(slide.tables["pixnet_t"].X, in_memory.tables["pixnet_t"].X)
    assert not work_folder(slide.path).exists()


def test_two_runs_at_a_time_are_refused(slide):
    with (
        open_writer(slide),
        pytest.raises(StoreError, match="pixnet_t"),
        open_writer(sd.read_zarr(slide.path), wait_s=0.05),
    ):
        pass


def test_leaving_without_a_result_keeps_the_rows_and_abort_deletes_them(slide, caplog):
    logging.getLogger("pixnet_sd").propagate = True
    put_and_stop = lambda writer: (put_all(writer, 1), 1 / 0)  # noqa: E731
    with caplog.at_level("INFO", "pixnet_sd"), pytest.raises(ZeroDivisionError), open_writer(slide) as writer:
        put_and_stop(writer)
    assert "the same call goes on from there" in caplog.text
    with open_writer(slide) as writer:
        assert writer.rows.resumed
        writer.rows.discard()
    assert not work_folder(slide.path).exists()


@pytest.mark.parametrize("where", ["zarr", "parquet"])
def test_a_disk_that_fills_up_while_the_table_is_written(slide, monkeypatch, user_files, where):
    import pyarrow.parquet as pq

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = user_files(slide.path)
    with open_writer(slide) as writer:
        put_all(writer)
        if where == "zarr":
            monkeypatch.setattr(zarr.Array, "__setitem__", full)
        else:
            monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(StoreError, match=r"Writing the (table|shapes) in .*No space left.*unchanged.*goes on"):
            results(slide, writer)
        monkeypatch.undo()
    assert user_files(slide.path) == before
    assert "pixnet_t" not in sd.read_zarr(slide.path)
    run(slide)
    assert slide.tables["pixnet_t"].n_obs == N - N // 7
    assert not work_folder(slide.path).exists()


def test_too_little_disk_is_refused_before_any_work(slide, monkeypatch):
    usage = shutil.disk_usage(slide.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=estimate_table_bytes(N, 3, 3) // 2))
    with pytest.raises(StoreError, match="free"), open_writer(slide, n_bytes=estimate_table_bytes(N, 3, 3)):
        pass
    assert not work_folder(slide.path).exists()


def test_estimate_is_enough(slide):
    with open_writer(slide) as writer:
        put_all(writer)
        made = results(slide, writer)
        table = made["pixnet_t"]
        values = sum(f.stat().st_size for f in (table.scratch_store / "tables/pixnet_t/X").rglob("*") if f.is_file())
    assert values < 2 * 4 * N * len(GENES) + 1000  # tiny: the metadata alone is 700 bytes
    assert estimate_table_bytes(10**7, 250, 250) == pytest.approx(28e9, rel=0.01)


def test_overwrite(slide):
    run(slide)
    with pytest.raises(StoreError, match="exists already"), open_writer(slide):
        pass
    first = slide.tables["pixnet_t"].X.copy()
    run(slide, aggregation="sum", overwrite=True, fingerprint="g")
    for sdata in (slide, sd.read_zarr(slide.path)):
        assert not np.allclose(sdata.tables["pixnet_t"].X, first)


def test_large_results_stay_on_disk(slide, monkeypatch, caplog):
    run(slide)
    logging.getLogger("pixnet_sd").propagate = True
    monkeypatch.setattr(_read_back, "MAX_READ_BYTES", 100)
    with caplog.at_level("INFO", "pixnet_sd"):
        run(slide, aggregation="sum", overwrite=True, fingerprint="g")
    assert "pixnet_t" not in slide.tables  # nor what was there before
    assert "pixnet_t_shapes" not in slide.shapes
    assert "read_lazy" in caplog.text
    assert "shapes['pixnet_t_shapes']" in caplog.text
    assert sd.read_zarr(slide.path).tables["pixnet_t"].n_obs == N - N // 7


def test_nothing_of_the_users_is_read(slide, monkeypatch):
    """Neither by a commit nor by finishing one that was interrupted: their tables may be larger than memory."""
    read = []
    real_table, real_shapes = ad.io.read_zarr, gpd.read_parquet
    from spatialdata._io import io_shapes, io_table  # where spatialdata keeps its names of these readers

    monkeypatch.setattr(io_table, "read_anndata_zarr", lambda path: (read.append(str(path)), real_table(path))[1])
    monkeypatch.setattr(io_shapes, "read_parquet", lambda path: (read.append(str(path)), real_shapes(path))[1])
    run(slide)
    assert len(read) == 2
    assert all("pixnet_t" in path for path in read)


def test_an_interrupted_move_is_finished_by_the_next_run(slide, monkeypatch):
    from pixnet_sd.store import _transaction as _commit

    monkeypatch.setattr(_commit, "_publish", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StoreError, match="next run"):
        run(slide)
    monkeypatch.undo()
    fresh = sd.read_zarr(slide.path)
    enter(fresh, {"other": "images"})
    assert fresh.tables["pixnet_t"].n_obs == len(fresh.shapes["pixnet_t_shapes"]) == N - N // 7
    assert not work_folder(slide.path).exists()


def test_leftovers_are_swept_and_unfinished_work_stays(slide):
    work = work_folder(slide.path)
    (work / "table-begun").mkdir(parents=True)  # killed before its first file was complete
    (work / "table-begun.lock").touch()
    (work / "view-abc").mkdir()
    with open_writer(slide):
        pass
    enter(slide, {"other": "images"})
    assert {path.name for path in work.iterdir()} == {"table-pixnet_t"}
    with hold_lock(work / "table-alive.lock", wait_s=0, busy=""):
        (work / "table-alive").mkdir()
        enter(slide, {"other": "images"})
        assert (work / "table-alive").exists()
