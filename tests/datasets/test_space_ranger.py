from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import h5py
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import spatialdata_io
import xarray as xr
import zarr
from scipy.spatial import distance_matrix
from spatialdata.models import get_table_keys
from spatialdata.transformations import get_transformation

from pixnet_sd import datasets
from pixnet_sd.errors import DataError, StoreError

# two windows of the image, of the density and two blocks of bins along each side
SLIDE = {"size_um": 560.0, "mpp": 0.5, "n_genes": 36, "seed": 4}
VISIUM = {"size_um": 600.0, "mpp": 1.5, "n_genes": 36, "seed": 1}
SMALL = {"size_um": 150.0, "mpp": 1.0, "n_genes": 36, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return datasets.write_visium_hd(tmp_path_factory.mktemp("hd") / "out", **SLIDE)


@pytest.fixture(scope="module")
def as_read(folder):
    return read(folder, load_nucleus_segmentations=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return datasets.write_visium_hd(tmp_path_factory.mktemp("small") / "out", **SMALL, bin_um=(8, 16), cells=False)


def read(path, **options) -> sd.SpatialData:
    return spatialdata_io.visium_hd(path, load_segmentations_only=False, **options)


def pixels(sdata: sd.SpatialData, name: str) -> np.ndarray:
    image = sdata.images[name]
    return (image["scale0"].image if name.endswith("full_image") else image).to_numpy()


def test_reader_finds_what_sample_gives(as_read):
    in_memory = datasets.sample(**SLIDE, cells=True)
    assert set(as_read.coordinate_systems) == set(in_memory.coordinate_systems)
    read_names, names = ({name for _, name, _ in sdata.gen_elements()} for sdata in (as_read, in_memory))
    assert read_names ^ names == {"nucleus_segmentations", "sample_nucleus_segmentations"}
    for kind, name, expected in in_memory.gen_elements():
        found = as_read[name]
        if kind == "tables":
            pd.testing.assert_frame_equal(found.to_df(), expected.to_df())
            assert get_table_keys(found) == get_table_keys(expected)
            np.testing.assert_array_equal(found.var["spatially_varying"], expected.var["spatially_varying"])
            for column in {"in_tissue", "array_row", "array_col"} & set(expected.obs):
                np.testing.assert_array_equal(found.obs[column], expected.obs[column])
            for key in expected.obsm:
                np.testing.assert_allclose(found.obsm[key], expected.obsm[key])
            continue
        ours, theirs = (get_transformation(element, get_all=True) for element in (expected, found))
        assert set(ours) == set(theirs)
        for system in ours:
            matrices = (every[system].to_affine_matrix(("x", "y"), ("x", "y")) for every in (ours, theirs))
            np.testing.assert_allclose(*matrices)
        if kind == "shapes":
            assert list(found.index) == list(expected.index)
            assert expected.geometry.normalize().geom_equals_exact(found.geometry.normalize(), 1e-9).all()
        else:
            np.testing.assert_array_equal(pixels(as_read, name), pixels(in_memory, name))


def test_positions_are_those_of_all_bins(as_read, folder):
    for um in (2, 8, 16):
        name, side = f"square_{um:03d}um", 528 // um
        every = pd.read_parquet(folder / "binned_outputs" / name / "spatial/tissue_positions.parquet")
        assert every["barcode"].is_unique
        assert every["barcode"].iloc[side - 1] == f"s_{um:03d}um_00000_{side - 1:05d}-1"
        np.testing.assert_array_equal(every["array_row"] * side + every["array_col"], np.arange(side**2))
        assert list(every.loc[every["in_tissue"] == 1, "barcode"]) == list(as_read[name].obs_names)


def test_nuclei_hold_the_bins_that_the_mapping_gives_them(as_read, folder):
    mapping = pd.read_parquet(folder / "barcode_mappings.parquet")
    base = as_read.tables["square_002um"]
    bins = [f"square_{um:03d}um" for um in (2, 8, 16)]
    assert list(mapping.columns) == [*bins, "cell_id", "in_nucleus", "in_cell"]
    assert list(mapping["square_002um"]) == list(base.obs_names)
    assert set(as_read.tables["square_016um"].obs_names) <= set(mapping["square_016um"])
    assert (mapping["cell_id"].notna() == mapping["in_cell"]).all()
    assert mapping.loc[mapping["in_nucleus"], "in_cell"].all()
    for table, flag in (("cell_segmentations", "in_cell"), ("nucleus_segmentations", "in_nucleus")):
        summed = base.to_df()[mapping[flag].to_numpy()].groupby(mapping.loc[mapping[flag], "cell_id"].to_numpy()).sum()
        counts = as_read.tables[table].to_df()
        assert len(counts) == len(summed)
        np.testing.assert_array_equal(counts, summed.loc[counts.index])


def test_feature_slice_says_how_the_lattice_lies_which_is_turned_by_half_a_degree(folder, as_read):
    with h5py.File(folder / "sample_feature_slice.h5") as file:
        metadata = json.loads(file.attrs["metadata_json"])
    matrices = {name: np.array(matrix) for name, matrix in metadata["transform_matrices"].items()}
    table = as_read.tables["square_002um"]
    bins = np.column_stack([table.obs[["array_col", "array_row"]].to_numpy(), np.ones(table.n_obs)])
    centres = bins @ matrices["spot_colrow_to_microscope_colrow"].T
    np.testing.assert_allclose(centres[:, :2], table.obsm["spatial"])
    np.testing.assert_allclose(centres @ matrices["microscope_colrow_to_spot_colrow"].T, bins, atol=1e-6)
    cos, sin = (2 / SLIDE["mpp"] * turned(np.deg2rad(0.5)) for turned in (np.cos, np.sin))
    np.testing.assert_allclose(matrices["spot_colrow_to_microscope_colrow"][:2, :2], [[cos, -sin], [sin, cos]])


@pytest.mark.parametrize("pitch_um", [1.0, 2.0, 7.0])
def test_truth_on_disk_is_that_of_the_sample_whole_or_in_part(small, pitch_um):
    drawn = datasets.sample_truth(**SMALL, pitch_um=pitch_um)
    stored = datasets.visium_hd_truth(small, pitch_um=pitch_um)
    assert stored.dtype == np.float32
    assert stored.attrs == drawn.attrs
    xr.testing.assert_allclose(stored, drawn, rtol=1e-5, atol=1e-9)
    part = datasets.visium_hd_truth(small, genes=["VIM", "ACTB"], pitch_um=pitch_um, window_um=(20, 33, 60, 150))
    assert part.attrs["spatially_varying"] == ["VIM"]
    reach = pitch_um / 2 - 1e-6  # of a pixel's centre that meets the window
    met = {"x": slice(20 - reach, 60 + reach), "y": slice(33 - reach, 150 + reach)}
    xr.testing.assert_allclose(part, drawn.sel(c=["VIM", "ACTB"], **met), rtol=1e-5, atol=1e-9)


def test_truth_that_is_not_there_is_refused(small):
    for name, wrong in (("genes", ["VIM", "NOPE"]), ("window_um", (200, 0, 300, 50)), ("pitch_um", 1e-4)):
        with pytest.raises(DataError, match="NOPE" if name == "genes" else name):
            datasets.visium_hd_truth(small, **{name: wrong})
    with pytest.raises(DataError, match="truth.zarr"):
        datasets.visium_hd_truth(small.parent)


def test_neither_workers_nor_fillers_change_pixels_or_markers(tmp_path, small):
    arguments = SMALL | {"n_genes": 3000, "bin_um": (8,), "cells": False, "n_workers": 1}
    found, expected = map(read, (datasets.write_visium_hd(tmp_path / "out", **arguments), small))
    np.testing.assert_array_equal(*(pixels(sdata, "sample_full_image") for sdata in (found, expected)))
    table, short = found.tables["square_008um"], expected.tables["square_008um"]
    markers = [name for name in short.var_names if not name.startswith("GENE")]
    assert table.shape == (short.n_obs, 3000)
    assert (table[:, markers].X != short[:, markers].X).nnz == 0
    assert table.X.sum() == pytest.approx(short[:, markers].X.sum() / 0.8, rel=0.05)  # a fifth is of fillers


@pytest.mark.parametrize("verb", [datasets.write_visium_hd, datasets.write_visium])
def test_refused_and_failed_writes_leave_everything_as_it_was(tmp_path, monkeypatch, verb, small):
    before = sorted(small.rglob("*"))
    with pytest.raises(StoreError, match=str(small)):
        verb(small)
    assert sorted(small.rglob("*")) == before
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DataError, match="size_um=.*mpp="):
            verb(tmp_path / "new" / "out", size_um=200, mpp=0.5)
    assert list(tmp_path.iterdir()) == []
    fail = Mock(side_effect=OSError("no space"))
    monkeypatch.setattr(zarr, "create_group", fail)
    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="no space"):
        verb(tmp_path / "out", size_um=120, mpp=1)
    assert list(tmp_path.iterdir()) == []


def test_visium(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = datasets.write_visium("~/out", **VISIUM)
    assert folder == tmp_path / "out"
    spots = pd.read_csv(folder / "spatial" / "tissue_positions.csv")
    assert ((spots["array_row"] + spots["array_col"]) % 2 == 0).all()
    xy = spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy() * 1.5
    apart = np.sort(distance_matrix(xy, xy), axis=1)[:, 1:]
    np.testing.assert_allclose(apart[:, 0], 100)
    assert (np.abs(apart - 100) < 1e-6).sum(axis=1).max() == 6
    assert 0 < spots["in_tissue"].mean() < 1
    assert spots["barcode"].is_unique
    assert spots["barcode"].str.fullmatch("[ACGT]{16}-1").all()

    sdata = spatialdata_io.visium(folder, fullres_image_file="sample_tissue_image.tif")
    assert set(sdata.images) == {"sample_full_image", "sample_hires_image", "sample_lowres_image"}
    sample = datasets.sample(**VISIUM, bin_um=(16,))
    np.testing.assert_array_equal(pixels(sdata, "sample_full_image"), pixels(sample, "sample_full_image"))
    circles, table = sdata.shapes["sample"], sdata.tables["table"]
    np.testing.assert_allclose(circles["radius"], 27.5 / 1.5)
    np.testing.assert_allclose(table.obsm["spatial"], circles.get_coordinates())
    assert table.var["spatially_varying"].dtype == bool
    truth = datasets.sample_truth(**VISIUM, pitch_um=1.0)
    x, y = np.meshgrid(truth["x"], truth["y"])
    inside = [np.hypot(x - cx, y - cy) <= 27.5 for cx, cy in table.obsm["spatial"] * 1.5]
    lies_there = np.stack([truth.to_numpy()[:, mask].sum(axis=1) for mask in inside])
    total, expected = np.asarray(table.X.sum(axis=1)).ravel(), lies_there.sum(axis=1)
    assert total.sum() == pytest.approx(expected.sum(), rel=0.25)
    # library sizes: totals vary far more than Poisson draws of hundreds would, shares of genes do not
    assert 0.2 < np.log(total / expected).std() < 0.8
    error = (table.X.toarray() / total[:, None] - lies_there / expected[:, None]) * np.sqrt(total)[:, None]
    assert np.sqrt((error**2).sum(axis=1).mean()) == pytest.approx(1, abs=0.1)
