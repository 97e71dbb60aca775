from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import spatialdata as sd
import zarr
from spatialdata_io import visium_hd
from tests.io.compare import assert_same

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.io import _convert as _build
from pixnet_sd.io import _convert as _scratch
from pixnet_sd.io import convert_visium_hd
from pixnet_sd.slide import open_slide
from pixnet_sd.slide.tables import measured
from pixnet_sd.store import hold_lock

CHUNK_PX = 64


def convert(folder: Path, store: Path, **kwargs: Any) -> sd.SpatialData:
    convert_visium_hd(folder, store, chunk_px=CHUNK_PX, show_progress_bar=False, **kwargs)
    return sd.read_zarr(store)


def read(folder: Path, store: Path, **kwargs: Any) -> sd.SpatialData:
    visium_hd(folder, load_segmentations_only=False, **kwargs).write(store)
    return sd.read_zarr(store)


@pytest.fixture(scope="module")
def both(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[sd.SpatialData, sd.SpatialData]:
    """The same folder, through the reader and through ours."""
    stores = tmp_path_factory.mktemp("stores")
    return read(drawn, stores / "reader.zarr"), convert(drawn, stores / "ours.zarr")


def test_the_store_is_what_the_reader_gives(both: tuple[sd.SpatialData, sd.SpatialData]) -> None:
    expected, found = both
    assert len(list(expected.gen_elements())) == 11
    assert_same(found, expected)
    noted = found.attrs.pop("pixnet_sd")
    assert found.attrs == expected.attrs
    assert set(noted) == {"converted_from"}
    assert all(table.X.sum() > 0 for table in found.tables.values())


def test_squares_are_the_readers_to_the_last_bit(both: tuple[sd.SpatialData, sd.SpatialData]) -> None:
    expected, found = both
    for name in ("s_square_002um", "s_square_016um"):
        assert found.shapes[name].to_wkb().equals(expected.shapes[name].to_wkb())
        assert found.shapes[name].index.name == expected.shapes[name].index.name == "location_id"


def test_every_level_of_the_image_is_chunked(both: tuple[sd.SpatialData, sd.SpatialData]) -> None:
    found = both[1]
    group = zarr.open_group(Path(found.path) / "images" / "s_full_image", mode="r")
    assert [group[f"s{level}"].shape[1:] for level in range(5)] == [
        (220, 220),
        (110, 110),
        (55, 55),
        (27, 27),
        (13, 13),
    ]
    assert group["s0"].chunks == group["s1"].chunks == (3, CHUNK_PX, CHUNK_PX)


def test_nothing_but_the_store_is_left(both: tuple[sd.SpatialData, sd.SpatialData]) -> None:
    assert sorted(path.name for path in Path(both[1].path).parent.iterdir()) == ["ours.zarr", "reader.zarr"]


def test_folder_without_id_or_cells_and_positions_in_another_order(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in list(folder.glob("s_*")):
        path.rename(folder / path.name.removeprefix("s_"))
    shutil.rmtree(folder / "segmented_outputs")
    path = folder / "binned_outputs" / "square_008um" / "spatial" / "tissue_positions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    expected = read(folder, tmp_path / "reader.zarr", bin_size=[16, 8])
    with caplog.at_level("INFO", logger="pixnet_sd"):
        found = convert(folder, tmp_path / "ours.zarr", bin_um=[16, 8])
    assert set(found.shapes) == {"_square_008um", "_square_016um"}
    assert "not in the order" in caplog.text
    assert_same(found, expected)


def test_given_id_and_image_and_cells_without_outline(folder: Path, tmp_path: Path) -> None:
    (folder / "s_feature_slice.h5").rename(folder / "feature_slice.h5")
    image = (folder / "s_tissue_image.tif").rename(tmp_path / "elsewhere.tif")
    path = folder / "segmented_outputs" / "cell_segmentations.geojson"
    features = json.loads(path.read_text())
    n_cells = len(features["features"])
    del features["features"][::3]
    features["features"].reverse()
    path.write_text(json.dumps(features, indent=1))
    expected = read(folder, tmp_path / "reader.zarr", bin_size=16, dataset_id="x", fullres_image_file=image)
    found = convert(folder, tmp_path / "ours.zarr", bin_um=16, dataset_id="x", image=image)
    assert len(found.shapes["x_cell_segmentations"]) == n_cells - -(-n_cells // 3)
    assert_same(found, expected)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _swap(name: str) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        first, second = (folder / "binned_outputs" / f"square_{um}um" / name for um in ("008", "016"))
        first.rename(folder / "x")
        second.rename(first)
        (folder / "x").rename(second)

    return swap


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


COUNTS = "filtered_feature_bc_matrix.h5"
POSITIONS = "spatial/tissue_positions.parquet"
SCALES = "spatial/scalefactors_json.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("s_feature_slice.h5"), "0 feature slice files"),
        (_remove("s_tissue_image.tif"), "0 full-resolution images"),
        (_remove(f"binned_outputs/square_008um/{COUNTS}"), "filtered_feature_bc_matrix.h5 is missing"),
        (_remove(f"binned_outputs/square_008um/{POSITIONS}"), "tissue_positions.parquet is missing"),
        (_remove(f"binned_outputs/square_008um/{SCALES}"), "cannot be read"),
        (_swap(COUNTS), "is not in .* different bin sizes"),
        (_swap(POSITIONS), "is not in .* different bin sizes"),
        (_swap(SCALES), "different bin sizes were swapped"),
        (_write(f"binned_outputs/square_008um/{COUNTS}", "no"), "cannot be opened as HDF5"),
        (_write(f"binned_outputs/square_008um/{POSITIONS}", "no"), "cannot be opened as parquet"),
        (_write("s_tissue_image.tif", "no"), "cannot be read"),
        (_write("segmented_outputs/cell_segmentations.geojson", '{"features": [{}]}'), "not a GeoJSON collection"),
        (_write("segmented_outputs/cell_segmentations.geojson", '{"features": []}'), "None of the"),
    ],
)
def test_damaged_folders_are_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        convert(folder, tmp_path / "out.zarr", bin_um=[8, 16])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outs"]


def test_missing_bin_size_is_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Bins of 4 µm .* has 2, 8, 16 µm"):
        convert(drawn, tmp_path / "out.zarr", bin_um=4)


def test_image_of_another_size_is_refused(drawn: Path, tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "half.tif", np.zeros((110, 110, 3), np.uint8), photometric="rgb")
    with pytest.raises(DataError, match="Space Ranger was run on one of 220 × 220"):
        convert(drawn, tmp_path / "out.zarr", image=tmp_path / "half.tif")


def test_existing_target_is_refused_and_kept(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "mine").touch()
    with pytest.raises(StoreError, match="exists already"):
        convert(drawn, tmp_path / "out.zarr")
    assert (tmp_path / "out.zarr" / "mine").exists()


def test_too_little_disk_is_refused_before_any_work(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scratch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="may take up to"):
        convert(drawn, tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once_are_refused(drawn: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".out.zarr.pixnet_sd" / "convert.lock"
    with hold_lock(lock, wait_s=0, busy=""), pytest.raises(StoreError, match="Another run is writing"):
        convert(drawn, tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_no_store_and_the_next_one_works(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise OSError(28, "No space left on device")

    work = tmp_path / ".out.zarr.pixnet_sd" / "convert"
    work.mkdir(parents=True)
    (work / "leftover").touch()  # of a run that was killed
    with monkeypatch.context() as patch:
        patch.setattr(_build, "fill_bins", stop)
        with pytest.raises(StoreError, match="No space left on device.*Nothing was kept"):
            convert(drawn, tmp_path / "out.zarr", bin_um=16)
    assert not list(tmp_path.iterdir())
    assert "square_016um" in convert(drawn, tmp_path / "out.zarr", bin_um=16).tables


def test_antibodies_stay_in_the_store_and_out_of_the_training(folder: Path, tmp_path: Path) -> None:
    import h5py

    shutil.rmtree(folder / "segmented_outputs")
    with h5py.File(folder / "binned_outputs/square_016um/filtered_feature_bc_matrix.h5", "r+") as file:
        features = file["matrix/features"]
        kinds = [*features["feature_type"][:-2], b"Antibody Capture", b"Antibody Capture"]
        del features["feature_type"]
        features["feature_type"] = np.array(kinds, dtype="S")
    store = convert(folder, tmp_path / "ours.zarr", bin_um=16)
    (table,) = measured(store, open_slide(store, image_key="s_full_image", mpp=0.5))
    assert store.tables["square_016um"].n_vars == 8
    assert table.counts.n_genes == len(table.var_names) == 6
