from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import spatialdata as sd
import tifffile
import xarray as xr
import zarr
from spatialdata.transformations import get_transformation
from spatialdata_io import visium_hd

from pixnet_sd.datasets import write_visium_hd
from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.io import changed_files, convert_visium_hd
from pixnet_sd.store import hold_lock

CHUNK_PX = 64
BINS, OTHER_BINS = "binned_outputs/square_008um", "binned_outputs/square_016um"
COUNTS = "filtered_feature_bc_matrix.h5"
POSITIONS = "spatial/tissue_positions.parquet"
SCALES = "spatial/scalefactors_json.json"
OUTLINES = "segmented_outputs/cell_segmentations.geojson"


def convert(folder, store, **options) -> sd.SpatialData:
    convert_visium_hd(folder, store, chunk_px=CHUNK_PX, show_progress_bar=False, **options)
    return sd.read_zarr(store)


def read(folder, store, **options) -> sd.SpatialData:
    visium_hd(folder, load_segmentations_only=False, **options).write(store)
    return sd.read_zarr(store)


def assert_same(found: sd.SpatialData, expected: sd.SpatialData) -> None:
    """Names, coordinate systems and all that elements hold; `spatialdata.testing` fails under strict markers."""
    assert set(found.coordinate_systems) == set(expected.coordinate_systems)
    found_names, names = ({(kind, name) for kind, name, _ in sdata.gen_elements()} for sdata in (found, expected))
    assert found_names == names
    for kind, name, theirs in expected.gen_elements():
        ours = found[name]
        if kind == "tables":
            for array in ("data", "indices", "indptr"):
                np.testing.assert_array_equal(getattr(ours.X, array), getattr(theirs.X, array), strict=True)
            pd.testing.assert_frame_equal(ours.obs, theirs.obs)
            pd.testing.assert_frame_equal(ours.var, theirs.var)
            np.testing.assert_equal(dict(ours.obsm), dict(theirs.obsm))
            assert ours.uns == theirs.uns
            continue
        assert get_transformation(ours, get_all=True) == get_transformation(theirs, get_all=True)
        if kind == "shapes":
            pd.testing.assert_frame_equal(ours.to_wkb(), theirs.to_wkb())
        elif isinstance(theirs, xr.DataTree):
            xr.testing.assert_identical(*(tree.map_over_datasets(xr.Dataset.drop_attrs) for tree in (ours, theirs)))
        else:
            xr.testing.assert_equal(ours, theirs)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small Space Ranger folder with cells; not to be changed."""
    path = tmp_path_factory.mktemp("drawn") / "outs"
    return write_visium_hd(path, size_um=110.0, mpp=0.5, n_genes=8, dataset_id="s", n_workers=1)


@pytest.fixture
def folder(drawn, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(drawn, tmp_path / "outs")


def test_the_store_is_what_the_reader_gives(drawn, tmp_path):
    expected, found = read(drawn, tmp_path / "reader.zarr"), convert(drawn, tmp_path / "ours.zarr")
    assert len(list(expected.gen_elements())) == 11
    assert_same(found, expected)
    assert set(found.attrs.pop("pixnet_sd")) == {"converted_from"}
    assert found.attrs == expected.attrs
    assert all(table.X.sum() > 0 for table in found.tables.values())
    store = Path(found.path)
    group = zarr.open_group(store / "images" / "s_full_image", mode="r")
    assert [group[f"s{level}"].shape[1:] for level in range(5)] == [(side, side) for side in (220, 110, 55, 27, 13)]
    assert group["s0"].chunks == group["s1"].chunks == (3, CHUNK_PX, CHUNK_PX)
    assert sorted(path.name for path in store.parent.iterdir()) == ["ours.zarr", "reader.zarr"]


def test_given_id_image_positions_in_another_order_and_cells_without_outline(folder, tmp_path, caplog, monkeypatch):
    (folder / "s_feature_slice.h5").rename(folder / "feature_slice.h5")
    (folder / "s_tissue_image.tif").rename(tmp_path / "elsewhere.tif")
    monkeypatch.setenv("HOME", str(tmp_path))
    outlines = folder / OUTLINES
    features = json.loads(outlines.read_text())
    del features["features"][::3]
    features["features"].reverse()
    outlines.write_text(json.dumps(features, indent=1))
    path = folder / BINS / POSITIONS
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    options = {"bin_size": [16, 8], "fullres_image_file": tmp_path / "elsewhere.tif"}
    expected = read(folder, tmp_path / "reader.zarr", dataset_id="x", **options)
    with caplog.at_level("INFO", logger="pixnet_sd"):
        found = convert(folder, tmp_path / "ours.zarr", bin_um=[16, 8], dataset_id="x", image="~/elsewhere.tif")
    assert any(path.name in message for message in caplog.messages)  # joined by hash
    assert_same(found, expected)
    assert changed_files(folder, tmp_path / "ours.zarr") == []


@pytest.mark.parametrize(
    ("file", "becomes", "named"),
    [
        ("s_feature_slice.h5", None, "feature_slice.h5"),
        ("s_tissue_image.tif", None, "`image=`"),
        (f"{BINS}/{COUNTS}", None, COUNTS),
        (f"{BINS}/{COUNTS}", "no", COUNTS),
        (f"{BINS}/{COUNTS}", f"{OTHER_BINS}/{COUNTS}", f"{COUNTS}.*{POSITIONS}"),
        (f"{BINS}/{POSITIONS}", None, POSITIONS),
        (f"{BINS}/{POSITIONS}", "no", POSITIONS),
        (f"{BINS}/{POSITIONS}", "barcode_mappings.parquet", f"{POSITIONS}.*cell_id"),
        (f"{BINS}/{SCALES}", None, SCALES),
        (f"{BINS}/{SCALES}", "[]", f"{SCALES}.*bin_size_um"),
        (f"{BINS}/{SCALES}", f"{OTHER_BINS}/{SCALES}", SCALES),
        (OUTLINES, "", OUTLINES),
        (OUTLINES, "{}", OUTLINES),
        (OUTLINES, '{"features": []}', "cell_segmentations.geojson"),
        (OUTLINES, '{"features": [{"geometry": 1}]}', OUTLINES),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, file, becomes, named):
    """A file is missing, holds something else, or what another file of the folder holds."""
    if becomes is None:
        (folder / file).unlink()
    elif (folder / becomes).is_file():
        shutil.copy(folder / becomes, folder / file)
    else:
        (folder / file).write_text(becomes)
    with pytest.raises(DataError, match=named):
        convert(folder, tmp_path / "out.zarr", bin_um=[8, 16])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outs"]


def test_runs_that_cannot_go_on_are_refused_before_any_work(drawn, tmp_path, monkeypatch):
    store = tmp_path / "out.zarr"
    tifffile.imwrite(tmp_path / "half.tif", np.zeros((110, 110, 3), np.uint8), photometric="rgb")
    for name, wrong in (("bin_um", 4), ("image", tmp_path / "half.tif"), ("image", tmp_path / "none.tif")):
        with pytest.raises(DataError, match=name):
            convert(drawn, store, **{name: wrong})
    (tmp_path / "half.tif").unlink()
    lock = tmp_path / ".out.zarr.pixnet_sd" / "convert.lock"
    with hold_lock(lock, wait_s=0, busy=""), pytest.raises(StoreError, match="out.zarr"):
        convert(drawn, store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(StoreError, match="`bin_um=`"):
            convert(drawn, store)
    assert not list(tmp_path.iterdir())
    store.mkdir()
    with pytest.raises(StoreError, match="out.zarr"):
        convert(drawn, store)
    assert list(tmp_path.rglob("*")) == [store]


def test_an_interrupted_run_leaves_no_store_and_the_next_works_without_id_and_cells(folder, tmp_path, monkeypatch):
    for path in list(folder.glob("s_*")):
        path.rename(folder / path.name.removeprefix("s_"))
    shutil.rmtree(folder / "segmented_outputs")
    work = tmp_path / ".out.zarr.pixnet_sd" / "convert"
    work.mkdir(parents=True)
    (work / "leftover").touch()  # of a run that was killed
    with monkeypatch.context() as patch:
        patch.setattr(sd.SpatialData, "write_element", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(StoreError, match="No space left on device"):
            convert(folder, tmp_path / "out.zarr", bin_um=16)
    assert list(tmp_path.iterdir()) == [folder]
    assert set(convert(folder, tmp_path / "out.zarr", bin_um=16).shapes) == {"_square_016um"}
