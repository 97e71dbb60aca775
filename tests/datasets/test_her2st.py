from __future__ import annotations

import json
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
    [("1x1", 30.0, 40.0, 1, 1), ("1x2", 30.5, 120.0, 1, 2), ("2x1", 90.25, 41.0, 2, 1)],
    columns=["spot", "pixel_x", "pixel_y", "x", "y"],
)
# another order than the spots, and one spot fewer
COUNTS = pd.DataFrame([[0, 5, 2], [7, 0, 1]], index=["2x1", "1x1"], columns=["ERBB2", "COL1A1", "ACTB"])
META = {"um_per_px": 0.8, "spot_diameter_um": 20, "image_width": 160, "image_height": 200}


def write(section: Path, *, spots: pd.DataFrame = SPOTS, counts: pd.DataFrame = COUNTS, **meta: object) -> None:
    section.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (200, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(section / "image.jpg", quality=95)
    spots.to_csv(section / "spots.tsv", sep="\t", index=False)
    counts.to_csv(section / "counts.tsv.gz", sep="\t")
    (section / "meta.json").write_text(json.dumps(META | meta))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data" / "Z1")
    return tmp_path / "data" / "Z1"


def test_image_and_spots_also_from_a_store(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="pixnet_sd"):
        ((name, sdata),) = datasets.her2st("~/data").items()
    assert name == "Z1"
    assert len(caplog.messages) == 1  # one spot has no counts
    sdata.write(tmp_path / "z1.zarr")
    sdata = sd.read_zarr(tmp_path / "z1.zarr")
    assert sdata.attrs["pixnet_sd"] == {"mpp": {"Z1_image": 0.8}}
    image = sdata.images["Z1_image"]["scale0"].image.to_numpy()
    jpeg = np.asarray(Image.open(folder / "image.jpg")).transpose(2, 0, 1)
    np.testing.assert_array_equal(image, jpeg, strict=True)
    assert set(sdata.coordinate_systems) == {"Z1", "Z1_um"}
    for element in (sdata.images["Z1_image"], sdata.shapes["Z1_spots"]):
        matrix = get_transformation(element, "Z1_um").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([0.8, 0.8, 1]))
    table, spots = sdata.tables["counts"], sdata.shapes["Z1_spots"]
    assert list(table.obs["spot"]) == ["2x1", "1x1"] == list(spots.index)  # joined by name
    np.testing.assert_array_equal(table.obs[["array_row", "array_col"]], [[1, 2], [1, 1]])
    np.testing.assert_array_equal(table.obsm["spatial"], [[90.25, 41], [30, 40]])
    np.testing.assert_array_equal(spots.get_coordinates(), table.obsm["spatial"])
    np.testing.assert_allclose(spots["radius"], 20 / 2 / 0.8)
    assert isinstance(table.X, sp.csr_matrix)
    np.testing.assert_array_equal(table.X.toarray(), COUNTS.to_numpy(np.float32), strict=True)
    assert list(table.var_names) == list(COUNTS.columns)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_width": 80}, "image.jpg is 160 × 200"),
        *(({"um_per_px": wrong}, "um_per_px") for wrong in ("half", 0, np.nan, np.inf)),
        ({"spots": SPOTS.drop(columns="pixel_y")}, "pixel_y"),
        ({"spots": SPOTS.iloc[[0, 0, 2]]}, "spots.tsv .*1x1"),
        ({"spots": SPOTS.iloc[:2]}, "counts.tsv.gz.* 2x1"),
        *(({"spots": SPOTS.assign(pixel_x=[1, 1, x])}, "spots.tsv: 1 of 3 .*2x1") for x in (1e4, np.nan, "far")),
        ({"counts": COUNTS.iloc[[0, 0]]}, "counts.tsv.gz .*2x1"),
        ({"counts": COUNTS * -1}, "counts.tsv.gz"),
        ({"counts": COUNTS + 0.5}, "counts.tsv.gz"),
        ({"counts": COUNTS.assign(ACTB=["two", "one"])}, "counts.tsv.gz"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, change, named):
    write(tmp_path / "Z1", **change)
    with pytest.raises(DataError, match=named):
        datasets.her2st(tmp_path)


def test_what_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert set(datasets.her2st(".")) == {"Z1"}
    for path, sections, named in (("..", ["Q9"], "Q9"), ("nowhere", None, "path="), (tmp_path, None, "meta.json")):
        with pytest.raises(DataError, match=named):
            datasets.her2st(path, sections=sections)
    for meta in ("{", "[]", "5"):
        (folder / "meta.json").write_text(meta)
        with pytest.raises(DataError, match="meta.json"):
            datasets.her2st(folder)
    (folder / "image.jpg").unlink()
    with pytest.raises(DataError, match="image.jpg"):
        datasets.her2st(folder.parent)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sections are not here")
def test_real_section():
    sdata = datasets.her2st(REAL, sections=["C2"])["C2"]
    table = sdata.tables["counts"]
    assert table.shape == (187, 15706)
    assert np.median(np.asarray(table.X.sum(axis=1))) == 8508
    image = sdata.images["C2_image"]["scale0"].image
    assert image.data.chunksize == (3, 1024, 1024)
    # spots lie on tissue: darker than the slide's corner
    x, y = np.floor(table.obsm["spatial"][np.argmax(table.X.sum(axis=1))]).astype(int)
    patch = image[:, y - 40 : y + 40, x - 40 : x + 40].to_numpy()
    assert patch.mean() < image[:, :200, :200].to_numpy().mean() - 20
