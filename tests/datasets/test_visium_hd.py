from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import get_table_keys
from spatialdata.transformations import get_transformation

from pixnet_sd import datasets
from pixnet_sd.datasets import _space_ranger as _folder
from pixnet_sd.datasets import _space_ranger as _visium_hd
from pixnet_sd.datasets.drawn import _cells, _slide
from pixnet_sd.datasets.drawn import _expression as _density
from pixnet_sd.datasets.drawn import _tissue as _staining
from pixnet_sd.errors import DataError, StoreError

SMALL = {"size_um": 200.0, "mpp": 0.5, "n_genes": 40, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return datasets.write_visium_hd(tmp_path_factory.mktemp("hd") / "out", **SMALL)


@pytest.fixture(scope="module")
def in_memory():
    return datasets.sample(**SMALL, cells=True)


def read(path, **kwargs) -> sd.SpatialData:
    spatialdata_io = pytest.importorskip("spatialdata_io")
    return spatialdata_io.visium_hd(path, load_segmentations_only=False, **kwargs)


@pytest.fixture(scope="module")
def as_read(folder):
    return read(folder, load_nucleus_segmentations=True)


def pixels(sdata: sd.SpatialData, name: str) -> np.ndarray:
    image = sdata.images[name]
    return (image["scale0"].image if name.endswith("full_image") else image).to_numpy()


def assert_same_table(one, other):
    assert list(one.obs_names) == list(other.obs_names)
    assert list(one.var_names) == list(other.var_names)
    assert (one.X != other.X).nnz == 0
    assert one.X.dtype == other.X.dtype


def test_reader_finds_what_sample_gives(as_read, in_memory):
    assert set(as_read.images) == set(in_memory.images)
    assert set(as_read.coordinate_systems) == set(in_memory.coordinate_systems)
    assert set(as_read.tables) - set(in_memory.tables) == {"nucleus_segmentations"}
    assert set(as_read.shapes) - set(in_memory.shapes) == {"sample_nucleus_segmentations"}
    for name in in_memory.images:
        np.testing.assert_array_equal(pixels(as_read, name), pixels(in_memory, name))
    for name, table in in_memory.tables.items():
        assert_same_table(as_read.tables[name], table)
        assert get_table_keys(as_read.tables[name]) == get_table_keys(table)
        np.testing.assert_array_equal(as_read.tables[name].var["spatially_varying"], table.var["spatially_varying"])


def test_shapes_lie_where_those_of_sample_lie(as_read, in_memory):
    for name, shapes in in_memory.shapes.items():
        assert list(as_read.shapes[name].index) == list(shapes.index)
        ours, theirs = (element.geometry.normalize() for element in (shapes, as_read.shapes[name]))
        assert ours.geom_equals_exact(theirs, 1e-9).all()
        ours, theirs = (get_transformation(element, get_all=True) for element in (shapes, as_read.shapes[name]))
        assert set(ours) == set(theirs)
        for system, transformation in ours.items():
            matrices = (t.to_affine_matrix(("x", "y"), ("x", "y")) for t in (transformation, theirs[system]))
            np.testing.assert_allclose(*matrices)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_positions_of_bins(as_read, in_memory, folder, size):
    ours, theirs = (sdata.tables[f"square_{size:03d}um"] for sdata in (in_memory, as_read))
    np.testing.assert_allclose(theirs.obsm["spatial"], ours.obsm["spatial"])
    for column in ("in_tissue", "array_row", "array_col"):
        np.testing.assert_array_equal(theirs.obs[column], ours.obs[column])
    every = pd.read_parquet(folder / f"binned_outputs/square_{size:03d}um/spatial/tissue_positions.parquet")
    side = 192 // size
    assert len(every) == side**2
    assert every["barcode"].is_unique
    np.testing.assert_array_equal(every["array_row"] * side + every["array_col"], np.arange(side**2))
    assert list(every.loc[every["in_tissue"] == 1, "barcode"]) == list(theirs.obs_names)


def test_barcodes_are_sorted_and_counts_are_whole_numbers(folder):
    with h5py.File(folder / "binned_outputs/square_002um/filtered_feature_bc_matrix.h5") as file:
        matrix = file["matrix"]
        barcodes = matrix["barcodes"][:]
        assert (np.sort(barcodes) == barcodes).all()
        assert matrix["data"].dtype == np.int32
        assert matrix["data"].chunks is not None
        assert tuple(matrix["shape"][:]) == (40, len(barcodes))
        assert matrix["indptr"][-1] == len(matrix["data"]) == len(matrix["indices"])


@pytest.mark.parametrize("size", [8, 16])
def test_large_bins_are_sums_of_small_ones(as_read, size):
    base, table = as_read.tables["square_002um"], as_read.tables[f"square_{size:03d}um"]
    step = size // 2
    parent = base.obs["array_row"] // step * 1000 + base.obs["array_col"] // step
    summed = base.to_df().groupby(parent.to_numpy()).sum()
    np.testing.assert_array_equal(summed.loc[table.obs["array_row"] * 1000 + table.obs["array_col"]], table.to_df())


@pytest.mark.parametrize("bins_as_squares", [True, False])
@pytest.mark.parametrize("annotate_table_by_labels", [True, False])
def test_read_in_every_variant(folder, in_memory, bins_as_squares, annotate_table_by_labels):
    sdata = read(folder, bins_as_squares=bins_as_squares, annotate_table_by_labels=annotate_table_by_labels)
    shapes = sdata.shapes["sample_square_008um"]
    assert ("radius" in shapes) != bins_as_squares
    assert get_table_keys(sdata.tables["square_008um"])[0] == (
        "sample_square_008um_labels" if annotate_table_by_labels else "sample_square_008um"
    )
    assert len(sdata.labels) == 3 * annotate_table_by_labels
    assert (sdata.tables["square_008um"].X != in_memory.tables["square_008um"].X).nnz == 0


def test_empty_dataset_id(tmp_path, in_memory):
    path = datasets.write_visium_hd(tmp_path / "out", **SMALL, bin_um=(8,), dataset_id="", cells=False)
    assert (path / "feature_slice.h5").is_file()
    sdata = read(path)
    assert set(sdata.images) == {"_full_image", "_hires_image", "_lowres_image"}
    assert set(sdata.shapes) == {"_square_008um"}
    assert "" in sdata.coordinate_systems
    assert_same_table(sdata.tables["square_008um"], in_memory.tables["square_008um"])


def test_nuclei_hold_the_bins_that_the_mapping_gives_them(as_read, folder):
    mapping = pd.read_parquet(folder / "barcode_mappings.parquet")
    base = as_read.tables["square_002um"]
    assert list(mapping.columns) == [
        *("square_002um", "square_008um", "square_016um"),
        *("cell_id", "in_nucleus", "in_cell"),
    ]
    assert list(mapping["square_002um"]) == list(base.obs_names)
    assert (mapping["cell_id"].notna() == mapping["in_cell"]).all()
    assert mapping.loc[mapping["in_nucleus"], "in_cell"].all()
    for table, part in (("cell_segmentations", "in_cell"), ("nucleus_segmentations", "in_nucleus")):
        summed = base.to_df()[mapping[part].to_numpy()].groupby(mapping.loc[mapping[part], "cell_id"].to_numpy()).sum()
        found = as_read.tables[table].to_df()
        assert len(found) == len(summed)
        np.testing.assert_array_equal(found, summed.loc[found.index])


def test_feature_slice_says_how_the_lattice_lies(folder, as_read):
    with h5py.File(folder / "sample_feature_slice.h5") as file:
        metadata = json.loads(file.attrs["metadata_json"])
    matrices = {name: np.array(matrix) for name, matrix in metadata["transform_matrices"].items()}
    table = as_read.tables["square_002um"]
    bins = np.column_stack([table.obs[["array_col", "array_row"]].to_numpy(), np.ones(table.n_obs)])
    centres = bins @ matrices["spot_colrow_to_microscope_colrow"].T
    np.testing.assert_allclose(centres[:, :2], table.obsm["spatial"])
    np.testing.assert_allclose(centres @ matrices["microscope_colrow_to_spot_colrow"].T, bins, atol=1e-6)
    assert json.loads(metadata["hd_layout_json"])["file_format"] == "1.0"


def everything(path) -> dict[str, np.ndarray | pd.DataFrame]:
    """Counts, positions and pixels of a folder."""
    sdata = read(path)
    found = {name: table.to_df() for name, table in sdata.tables.items()}
    return found | {name: pixels(sdata, name) for name in sdata.images}


def test_what_is_written_does_not_depend_on_workers(folder, tmp_path):
    again = everything(datasets.write_visium_hd(tmp_path / "out", **SMALL, n_workers=1))
    for name, values in everything(folder).items():
        np.testing.assert_array_equal(again[name], values)


def test_image_does_not_depend_on_windows(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(_staining, "WINDOW_PX", 112)
    monkeypatch.setattr(_folder, "WINDOW_PX", 112)
    again = read(datasets.write_visium_hd(tmp_path / "out", **SMALL, bin_um=(16,), cells=False))
    whole = read(folder, bin_size=16)
    np.testing.assert_array_equal(pixels(again, "sample_full_image"), pixels(whole, "sample_full_image"))


def test_a_slide_of_many_blocks_is_one_slide(monkeypatch, tmp_path):
    """Small slides are one block: smaller blocks stand for a large slide."""
    monkeypatch.setattr(_slide, "BLOCK", 32)
    monkeypatch.setattr(_cells, "BLOCK", 32)
    sdata, written = datasets.sample(**SMALL, cells=True), read(datasets.write_visium_hd(tmp_path / "out", **SMALL))
    for name, table in sdata.tables.items():
        assert_same_table(written.tables[name], table)
    blocks = datasets.sample_truth_bins(8, **SMALL)
    monkeypatch.undo()
    pd.testing.assert_frame_equal(blocks, datasets.sample_truth_bins(8, **SMALL), rtol=1e-6)
    # another stream in each block: the same expectations, other draws
    one_block = datasets.sample(**SMALL).tables["square_008um"]
    assert (one_block.X != sdata.tables["square_008um"].X).nnz > 0
    assert list(one_block.obs_names) == list(sdata.tables["square_008um"].obs_names)


def test_density_does_not_depend_on_windows(monkeypatch):
    whole = datasets.sample_truth(**SMALL, pitch_um=1.0)
    monkeypatch.setattr(_density, "DENSITY_WINDOW", 56)
    np.testing.assert_allclose(datasets.sample_truth(**SMALL, pitch_um=1.0), whole, atol=2e-3)


def test_a_long_panel(tmp_path, in_memory):
    path = datasets.write_visium_hd(tmp_path / "out", **SMALL | {"n_genes": 3000}, bin_um=(8,), cells=False)
    table, short = read(path).tables["square_008um"], in_memory.tables["square_008um"]
    assert table.shape == (short.n_obs, 3000)
    markers = [name for name in short.var_names if not name.startswith("GENE")]
    assert (table[:, markers].X != short[:, markers].X).nnz == 0
    assert table.X.sum() == pytest.approx(short[:, markers].X.sum() / 0.8, rel=0.05)


def test_a_folder_is_not_overwritten(folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(StoreError, match="exists already"):
        datasets.write_visium_hd(folder, **SMALL)
    assert sorted(folder.rglob("*")) == before


def test_a_failure_leaves_nothing(monkeypatch, tmp_path):
    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr(_visium_hd, "write_truth", fail)
    with pytest.raises(OSError, match="no space"):
        datasets.write_visium_hd(tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [datasets.write_visium_hd, datasets.write_visium])
def test_what_the_disk_does_not_hold_is_refused_at_once(tmp_path, monkeypatch, verb):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match="size_um=.*mpp=.*disk"):
        verb(tmp_path / "new" / "out", **{name: SMALL[name] for name in ("size_um", "mpp")})
    assert list(tmp_path.iterdir()) == []
