from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import spatialdata as sd
from PIL import Image
from spatialdata.transformations import get_transformation

from pixnet_sd import datasets
from pixnet_sd.errors import DataError

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "her2st"

SPOTS = pd.DataFrame(
    {
        "spot": ["1x1", "1x2", "2x1"],
        "pixel_x": [30.0, 30.5, 90.25],
        "pixel_y": [40.0, 120.0, 41.0],
        "x": [1, 1, 2],
        "y": [1, 2, 1],
    }
)
# another order than the spots, and one spot fewer
COUNTS = pd.DataFrame([[0, 5, 2], [7, 0, 1]], index=["2x1", "1x1"], columns=["ERBB2", "COL1A1", "ACTB"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """One section as it lies on disk: 160 × 200 px."""
    section = tmp_path / "data" / "Z1"
    section.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (200, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(section / "image.jpg", quality=95)
    SPOTS.to_csv(section / "spots.tsv", sep="\t", index=False)
    COUNTS.to_csv(section / "counts.tsv.gz", sep="\t")
    write_meta(section)
    return section


def write_meta(section: Path, **changes: object) -> None:
    meta = {"um_per_px": 0.8, "spot_diameter_um": 20, "image_width": 160, "image_height": 200} | changes
    (section / "meta.json").write_text(json.dumps(meta))


def test_elements(folder):
    (name, sdata), *rest = datasets.her2st(folder.parent).items()
    assert name == "Z1"
    assert not rest
    image = sdata.images["Z1_image"]["scale0"].image
    assert image.shape == (3, 200, 160)
    assert image.dtype == np.uint8
    decoded = np.asarray(Image.open(folder / "image.jpg")).transpose(2, 0, 1)
    np.testing.assert_array_equal(image.to_numpy(), decoded)
    assert sdata.attrs["pixnet_sd"] == {"mpp": {"Z1_image": 0.8}}


def test_spots_are_joined_by_name(folder):
    sdata = datasets.her2st(folder.parent)["Z1"]
    table, spots = sdata.tables["counts"], sdata.shapes["Z1_spots"]
    assert list(table.obs["spot"]) == ["2x1", "1x1"] == list(spots.index)
    assert list(table.obs["array_col"]) == [2, 1]
    assert list(table.obs["array_row"]) == [1, 1]
    np.testing.assert_array_equal(table.obsm["spatial"], [[90.25, 41], [30, 40]])
    np.testing.assert_array_equal(np.stack([spots.geometry.x, spots.geometry.y], 1), table.obsm["spatial"])
    np.testing.assert_allclose(spots["radius"], 20 / 2 / 0.8)
    assert isinstance(table.X, sp.csr_matrix)
    assert table.X.dtype == np.float32
    np.testing.assert_array_equal(table.X.toarray(), COUNTS)
    assert list(table.var_names) == ["ERBB2", "COL1A1", "ACTB"]


def test_spots_without_counts_are_reported(folder, caplog):
    with caplog.at_level(logging.INFO, logger="pixnet_sd"):
        datasets.her2st(folder.parent)
    assert "1 of 3 spots have no counts" in caplog.text


def test_micrometres_are_a_coordinate_system(folder):
    sdata = datasets.her2st(folder.parent)["Z1"]
    assert set(sdata.coordinate_systems) == {"Z1", "Z1_um"}
    for element in (sdata.images["Z1_image"], sdata.shapes["Z1_spots"]):
        matrix = get_transformation(element, "Z1_um").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([0.8, 0.8, 1]))


def test_a_section_folder_may_be_given(folder):
    assert list(datasets.her2st(folder)) == ["Z1"]
    assert list(datasets.her2st(str(folder.parent), sections=["Z1"])) == ["Z1"]


def test_roundtrip_through_a_store(folder, tmp_path):
    sdata = datasets.her2st(folder)["Z1"]
    sdata.write(tmp_path / "z1.zarr")
    back = sd.read_zarr(tmp_path / "z1.zarr")
    assert back.attrs["pixnet_sd"]["mpp"] == {"Z1_image": 0.8}
    np.testing.assert_array_equal(back.tables["counts"].X.toarray(), COUNTS)


@pytest.mark.parametrize("name", ["image.jpg", "counts.tsv.gz", "spots.tsv"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"lacks {name}"):
        datasets.her2st(folder.parent)


def test_missing_section(folder, tmp_path):
    with pytest.raises(DataError, match=r"No section Q9 in .*there are Z1"):
        datasets.her2st(folder.parent, sections=["Q9"])
    with pytest.raises(DataError, match="path="):
        datasets.her2st(tmp_path / "nowhere")
    with pytest.raises(DataError, match="No section in"):
        datasets.her2st(tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image_width": 80}, "is 160 × 200 px, its meta.json says 80 × 200"),
        ({"um_per_px": "half"}, "um_per_px"),
        ({"um_per_px": 0}, "um_per_px"),
    ],
)
def test_meta_that_cannot_be_used(folder, change, found):
    write_meta(folder, **change)
    with pytest.raises(DataError, match=found):
        datasets.her2st(folder)


def test_meta_that_is_not_json(folder):
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        datasets.her2st(folder)


@pytest.mark.parametrize(
    ("spots", "found"),
    [
        (SPOTS.drop(columns="pixel_y"), "lacks the columns pixel_y"),
        (SPOTS.iloc[[0, 0, 2]], "more than once: 1x1"),
        (SPOTS.iloc[:2], "1 of 2 spots have no position .* such as 2x1"),
        (SPOTS.assign(pixel_x=[30.0, 30.5, 1e4]), "outside the image .* such as 2x1"),
        (SPOTS.assign(pixel_x=[30.0, 30.5, np.nan]), "outside the image or have no position"),
    ],
)
def test_spots_that_do_not_fit(folder, spots, found):
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    with pytest.raises(DataError, match=found):
        datasets.her2st(folder)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        (COUNTS.iloc[[0, 0]], "spots more than once: 2x1"),
        (COUNTS * -1, "negative"),
        (COUNTS + 0.5, "raw counts are needed"),
        (COUNTS.assign(ACTB=["two", "one"]), "not numbers"),
    ],
)
def test_counts_that_do_not_fit(folder, counts, found):
    counts.to_csv(folder / "counts.tsv.gz", sep="\t")
    with pytest.raises(DataError, match=found):
        datasets.her2st(folder)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sections are not here")
def test_real_section():
    sdata = datasets.her2st(REAL, sections=["C2"])["C2"]
    table = sdata.tables["counts"]
    assert table.shape == (187, 15706)
    assert np.median(np.asarray(table.X.sum(axis=1))) == 8508
    image = sdata.images["C2_image"]["scale0"].image
    assert image.shape == (3, 9911, 9274)
    assert image.data.chunksize == (3, 1024, 1024)
    np.testing.assert_allclose(sdata.shapes["C2_spots"]["radius"], 50 / 0.6901)
    # spots lie on tissue: darker than the slide's corner
    x, y = np.floor(table.obsm["spatial"][np.argmax(table.X.sum(axis=1))]).astype(int)
    patch = image[:, y - 40 : y + 40, x - 40 : x + 40].to_numpy()
    assert patch.mean() < image[:, :200, :200].to_numpy().mean() - 20
