"""A table that was streamed to disk is the table that is made in memory, and enters the store like any result."""

from __future__ import annotations

import errno
import json
import logging
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import spatialdata as sd
import zarr
from geopandas.testing import assert_geodataframe_equal
from tests.store.conftest import affines, assert_metadata_is_zarrs_own, assert_same_table, enter, user_files

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import RegionShare, Window
from pixnet_sd.store import (
    Expressed,
    RegionWriter,
    RowInfo,
    Transaction,
    chunks_as_given,
    circles_element,
    consolidate,
    estimate_table_bytes,
    expression,
    hold_lock,
    region_table,
    spatial_library,
    squares_element,
    stretch,
    thumbnail,
    work_folder,
    write_scratch_store,
)
from pixnet_sd.store.gene_map import image_transforms

GENES = ["ERBB2", "MT-CO1", "gène"]
MANY_GENES = [*GENES, *(f"G{k}" for k in range(197))]
N, OFF = 57, 6  # every seventh region has no tissue
WINDOWS = [Window(k, k + 1, 0, 1) for k in range(4)]
TABLE, SHAPES = "tables/pixnet_t", "shapes/pixnet_t_shapes"


def centres(n):
    return np.random.default_rng(3).uniform(20, 280, (n, 2))


def describe(text, n, start, stop, weight):
    rows = np.arange(start, stop)
    ids = np.array([f"célula-{k}" for k in rows], object) if text else rows * 3 + 1
    xy = centres(n)[start:stop]
    return RowInfo(ids, xy, {"area_um2": xy[:, 0], "n_px": rows, "edge": rows % 2 == 0})


def shares(n, genes=GENES):
    """One region of five lies in all windows, the others in one."""
    for number, window in enumerate(WINDOWS):
        rng = np.random.default_rng(number)
        mine, shared = np.arange(n) % 5 == number, np.arange(n) % 5 == 4
        index = np.flatnonzero((mine | shared) & (np.arange(n) % 7 != OFF))
        sums = rng.random((len(index), len(genes)), dtype=np.float32)
        yield RegionShare(window, index, sums, rng.uniform(1, 9, len(index)), mine[index])


def put_all(writer, n_windows=4, genes=GENES):
    for share in list(shares(writer.rows.n_rows, genes))[:n_windows]:
        writer.put(share)


@contextmanager
def open_writer(sdata, *, n=N, genes=GENES):
    with (
        Transaction(sdata, {"pixnet_t": "tables", "pixnet_t_shapes": "shapes"}) as out,
        RegionWriter(out, table_key="pixnet_t", n_regions=n, genes=genes, fingerprint="f") as writer,
    ):
        writer.commit = out.commit
        yield writer


def counted(sums, weight):
    """A layer and a column besides the values."""
    return Expressed(np.log1p(sums), {"expected_counts": sums}, {"expected_total_counts": sums.sum(axis=1)})


def results(sdata, writer, *, genes=GENES, text=False, kind="circles", aggregation="mean"):
    picture = thumbnail(sdata, "_full_image", max_px=100)
    make_table = partial(
        region_table,
        genes=genes,
        region="pixnet_t_shapes",
        var=pd.DataFrame({"held_out_pcc": [0.1, np.nan, 0.2]}, index=GENES),
        uns={"pixnet_sd": {"model_sha256": "abc"}, "spatial": spatial_library("", 16.0, picture)},
    )
    make_shapes, sizes = circles_element, {"radius_px": 8.0}
    if kind == "squares":
        make_shapes, sizes = squares_element, {"side_px": 8.0, "angle_rad": 0.2}
    return writer.results(
        partial(describe, text, writer.rows.n_rows),
        make_table=make_table,
        express=counted if aggregation == "counts" else partial(expression, aggregation=aggregation),
        shapes_key="pixnet_t_shapes",
        make_shapes=partial(make_shapes, transforms=image_transforms(sdata, "_full_image"), **sizes),
    )


def run(sdata, *, n=N, genes=GENES, **options):
    with open_writer(sdata, n=n, genes=genes) as writer:
        put_all(writer, genes=genes)
        writer.commit(results(sdata, writer, genes=genes, **options), provenance={"tables": {"pixnet_t": {}}})


def assert_same(ours, theirs):
    assert_same_table(ours.tables["pixnet_t"], theirs.tables["pixnet_t"])
    assert ours.tables["pixnet_t"].X.dtype == np.float32
    assert all(layer.any() for layer in theirs.tables["pixnet_t"].layers.values())
    shapes, expected = (sdata.shapes["pixnet_t_shapes"] for sdata in (ours, theirs))
    assert_geodataframe_equal(shapes, expected)
    assert affines(shapes) == affines(expected)


@pytest.mark.parametrize(
    ("n", "text", "kind", "aggregation", "encoding"),
    [
        (N, False, "circles", "mean", "WKB"),
        (N, True, "squares", "sum", "WKB"),
        (N, True, "squares", "counts", "geoarrow"),
        (70_000, False, "circles", "mean", "geoarrow"),  # several chunks, batches and groups of rows
    ],
)
def test_streamed_equals_made_in_memory(slide, in_memory, monkeypatch, n, text, kind, aggregation, encoding):
    monkeypatch.setattr(sd.settings, "shapes_geometry_encoding", encoding)
    before, genes = user_files(slide.path), GENES if n == N else MANY_GENES
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*shard")  # chunks are ours to choose
        run(slide, n=n, genes=genes, text=text, kind=kind, aggregation=aggregation)
    run(in_memory, n=n, genes=genes, text=text, kind=kind, aggregation=aggregation)
    stores = slide.path, slide.path.with_name("theirs.zarr")
    with chunks_as_given():
        in_memory.write(stores[1])
    again, theirs = map(sd.read_zarr, stores)
    table = theirs.tables["pixnet_t"]
    for values in (table.X, *table.layers.values()):  # all regions, in order, NaN without tissue
        np.testing.assert_array_equal(np.isnan(values).all(axis=1), np.arange(n) % 7 == OFF)
    assert_same(slide, theirs)
    assert_same(again, theirs)
    ours, expected = (zarr.open_array(store / TABLE / "X") for store in stores)
    assert ours.chunks == (min(ours.shape[0], 2**20 // len(genes), 2**16), len(genes))
    assert (ours.shards, ours.compressors, ours.attrs.asdict()) == (None, expected.compressors, expected.attrs.asdict())
    ours, expected = (pq.ParquetFile(store / SHAPES / "shapes.parquet") for store in stores)
    assert ours.schema_arrow.equals(expected.schema_arrow)
    assert json.loads(ours.metadata.metadata[b"geo"]) == json.loads(expected.metadata.metadata[b"geo"])
    assert user_files(slide.path) == before
    assert not work_folder(slide.path).exists()
    assert_metadata_is_zarrs_own(again)


def test_leaving_without_a_result_keeps_what_was_put(slide):
    with pytest.raises(KeyboardInterrupt), open_writer(slide):
        raise KeyboardInterrupt
    assert not work_folder(slide.path).exists()
    with open_writer(slide) as writer:
        put_all(writer, 1)
    with pytest.raises(DataError), open_writer(slide) as writer:
        writer.put(next(shares(N))._replace(window=WINDOWS[1], sums=np.empty((0, 9), np.float32)))
    with open_writer(slide) as writer:
        assert [writer.is_done(window) for window in WINDOWS] == [True, False, False, False]


@pytest.mark.parametrize("method", [(zarr.Array, "__setitem__"), (pq.ParquetWriter, "write_table")])
def test_a_disk_that_fills_up_while_the_table_is_written(slide, monkeypatch, method):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = user_files(slide.path)
    with open_writer(slide) as writer:
        put_all(writer)
        monkeypatch.setattr(*method, full)
        with pytest.raises(StoreError, match="No space left"):
            results(slide, writer)
        monkeypatch.undo()
    assert user_files(slide.path) == before
    assert "pixnet_t" not in sd.read_zarr(slide.path)
    with open_writer(slide) as writer:
        assert all(writer.is_done(window) for window in WINDOWS)
        writer.commit(results(slide, writer))
    assert slide.tables["pixnet_t"].n_obs == N
    assert not work_folder(slide.path).exists()


def test_estimate_is_enough(slide):
    with open_writer(slide) as writer:
        put_all(writer)
        assert writer.rows.stored_bytes < 2 * (4 * len(GENES) + 16) * N + 1000
        table = results(slide, writer)["pixnet_t"].scratch_store / TABLE
        stored = sum(file.stat().st_size for file in (table / "X").rglob("*") if file.is_file())
    assert stored < 2 * 4 * N * len(GENES) + 1000  # tiny: the metadata alone is 700 bytes
    assert estimate_table_bytes(10**7, 250, 250) == pytest.approx(28e9, rel=0.01)


def test_a_table_that_is_large_in_memory_stays_on_disk(slide, caplog):
    run(slide)
    logging.getLogger("pixnet_sd").propagate = True
    one = region_table(Expressed(np.ones((1, 1), np.float32)), RowInfo([1], np.ones((1, 2))), ["A"], region="cells")
    with Transaction(slide, {"pixnet_t": "tables"}, overwrite=True) as out, caplog.at_level("INFO", "pixnet_sd"):
        folder = out.folder("table-pixnet_t")
        (staged,) = write_scratch_store(folder / "table.zarr", {"pixnet_t": one})
        stretch(staged.scratch_store / TABLE / "X", (2**20, 300), (2**16, 300))  # all zero: no file
        consolidate(staged.scratch_store)
        out.commit({"pixnet_t": staged})
    assert "pixnet_t" not in slide.tables  # nor what was there before
    assert "read_lazy" in caplog.text


def test_nothing_of_the_users_is_read(slide):
    """By a commit: their tables may be larger than memory."""
    for path in ("tables/table/X/zarr.json", "shapes/cells/shapes.parquet"):
        (slide.path / path).write_text("cannot be read")
    run(slide)
    assert slide.tables["pixnet_t"].n_obs == N


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
