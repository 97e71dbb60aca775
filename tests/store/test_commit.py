from __future__ import annotations

import json

import geopandas.testing
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import xarray as xr
from anndata import AnnData
from spatialdata.models import Labels2DModel
from spatialdata.transformations import get_transformation

from pixnet_sd.errors import StoreError
from pixnet_sd.store import _transaction as _commit
from pixnet_sd.store import (
    check_target,
    circles_element,
    commit,
    region_table,
    work_folder,
    write_scratch_store,
)
from pixnet_sd.store.gene_map import image_transforms


def results(sdata, scale=1.0):
    centres = np.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    values = np.arange(6, dtype=np.float32).reshape(3, 2) * scale
    circles = circles_element(centres, 4.0 * scale, image_transforms(sdata, "_full_image"))
    table = region_table(values, ["A", "B"], circles.index, region="spots", centres_px=centres, spot_diameter_px=8.0)
    mask = Labels2DModel.parse(np.full((32, 32), int(scale), dtype=np.uint8), dims=("y", "x"))
    return {"spots": circles, "pixnet_spots": table, "mask": mask}


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, AnnData):
        np.testing.assert_array_equal(found.X, expected.X)
        pd.testing.assert_frame_equal(found.obs, expected.obs)
        pd.testing.assert_frame_equal(found.var, expected.var)
        np.testing.assert_array_equal(found.obsm["spatial"], expected.obsm["spatial"])
        assert found.uns["spatialdata_attrs"] == expected.uns["spatialdata_attrs"]
        return
    if isinstance(expected, xr.DataArray):
        np.testing.assert_array_equal(found.values, expected.values)
    else:
        geopandas.testing.assert_geodataframe_equal(found, expected)
    matrices = [
        {name: t.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for name, t in transforms.items()}
        for transforms in (get_transformation(found, get_all=True), get_transformation(expected, get_all=True))
    ]
    assert matrices[0] == matrices[1]


def assert_holds(sdata, expected):
    for name, element in expected.items():
        assert_same(sdata[name], element)


def test_round_trip(slide, user_files):
    before = user_files(slide.path)
    expected = results(slide)
    commit(slide, expected, provenance={"tables": {"pixnet_spots": {"radius_um": 8}}})
    again = sd.read_zarr(slide.path)
    for sdata in (slide, again):
        assert_holds(sdata, expected)
        assert sdata.attrs["pixnet_sd"]["tables"] == {"pixnet_spots": {"radius_um": 8}}
        assert sdata.attrs["pixnet_sd"].keys() == {"tables", "written"}
    assert user_files(slide.path) == before
    assert not work_folder(slide.path).exists()
    assert json.loads((slide.path / "labels/zarr.json").read_text())["attributes"]["ome"]["labels"] == ["mask"]
    ours = json.loads((slide.path / "zarr.json").read_text())
    again.write_consolidated_metadata()
    assert json.loads((slide.path / "zarr.json").read_text()) == ours


def test_rasters_come_back_lazily(slide):
    commit(slide, results(slide))
    files = sd.get_dask_backing_files(slide.labels["mask"])
    assert files
    assert all(file.startswith(str(slide.path / "labels" / "mask")) for file in files)


def test_spatialdata_can_go_on_with_the_store(slide, in_memory):
    commit(slide, results(slide))
    slide.shapes["more"] = in_memory.shapes["cells"]
    slide.write_element("more")
    slide.delete_element_from_disk("spots")
    again = sd.read_zarr(slide.path)
    assert {"more", "mask", "pixnet_spots"} <= {name for _, name, _ in again.gen_elements()}
    assert "spots" not in again


def test_overwrite_replaces_only_what_is_named(slide, user_files):
    before = user_files(slide.path)
    commit(slide, results(slide))
    with pytest.raises(StoreError, match="exists already"):
        commit(slide, results(slide, 2.0))
    commit(slide, results(slide, 2.0), overwrite=True)
    for sdata in (slide, sd.read_zarr(slide.path)):
        assert_holds(sdata, results(slide, 2.0))
    assert user_files(slide.path) == before
    assert not work_folder(slide.path).exists()


def test_in_memory(in_memory):
    expected = results(in_memory)
    commit(in_memory, expected, provenance={"tables": {"pixnet_spots": {}}})
    assert in_memory.path is None
    assert_holds(in_memory, expected)
    with pytest.raises(StoreError, match="exists already"):
        commit(in_memory, expected)
    commit(in_memory, results(in_memory, 2.0), overwrite=True)
    assert_holds(in_memory, results(in_memory, 2.0))


def test_failure_while_preparing_leaves_nothing(slide, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    files = sorted(slide.path.rglob("*"))
    monkeypatch.setattr(sd.SpatialData, "write", full)
    with pytest.raises(StoreError, match=r"No space left.*unchanged"):
        commit(slide, results(slide))
    assert sorted(slide.path.rglob("*")) == files
    assert not work_folder(slide.path).exists()
    assert "spots" not in slide


def test_failure_while_moving_is_finished_by_the_next_run(slide, monkeypatch):
    commit(slide, results(slide))
    real, calls = _commit._place, []

    def fail_once(store, work, move):
        calls.append(move)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(store, work, move)

    monkeypatch.setattr(_commit, "_place", fail_once)
    with pytest.raises(StoreError, match=r"still opens.*next run"):
        commit(slide, results(slide, 2.0), overwrite=True)
    halfway = sd.read_zarr(slide.path)
    assert not {"spots", "mask", "pixnet_spots"} & {name for _, name, _ in halfway.gen_elements()}
    check_target(halfway, {"other": "images"})
    for sdata in (halfway, sd.read_zarr(slide.path)):
        assert_holds(sdata, results(slide, 2.0))
    assert not work_folder(slide.path).exists()


def test_recovery_leaves_alone_what_the_user_wrote_meanwhile(slide, in_memory, monkeypatch):
    monkeypatch.setattr(_commit, "_place", lambda *args: (_ for _ in ()).throw(OSError(5, "x")))
    with pytest.raises(StoreError):
        commit(slide, results(slide))
    monkeypatch.undo()
    mine = sd.read_zarr(slide.path)
    mine.shapes["spots"] = in_memory.shapes["cells"]
    mine.write_element("spots")
    check_target(mine, {"other": "images"})
    again = sd.read_zarr(slide.path)
    assert_same(again.shapes["spots"], in_memory.shapes["cells"])
    assert_holds(again, {name: element for name, element in results(slide).items() if name != "spots"})


def test_leftovers_of_a_run_killed_before_its_journal_are_swept(slide):
    work = work_folder(slide.path)
    (work / "commit").mkdir(parents=True)
    write_scratch_store(work / "commit" / "new.zarr", results(slide))
    (work / "old" / "images").mkdir(parents=True)
    (work / ".pixnet_sd-abc.partial").mkdir()
    check_target(slide, {"other": "images"})
    assert not work.exists()
    assert "spots" not in sd.read_zarr(slide.path)
