"""Folders as Space Ranger leaves them, read by spatialdata-io in every variant, through `fit` and `predict`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
from tests.tl.conftest import BINS

import pixnet_sd as ps

io = pytest.importorskip("spatialdata_io")

DRAWN = {"size_um": 160.0, "mpp": 1.0, "n_genes": 12}
CIRCLES, LABELS = {"bins_as_squares": False}, {"annotate_table_by_labels": True}
VARIANTS = {
    "circles": ("sample", CIRCLES, "sample_square_008um"),
    "labels": ("sample", LABELS, "sample_square_008um_labels"),
    "no id, circles, labels": ("", CIRCLES | LABELS, "_square_008um_labels"),
}
"""Name in front of the files, how the folder is read, and what its 8 µm bins are called then."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One slide, with its name in front of its files and without."""
    root = tmp_path_factory.mktemp("space_ranger")
    return {name: ps.datasets.write_visium_hd(root / f"id_{name}", dataset_id=name, **DRAWN) for name in ("sample", "")}


def read(folder: Path, store: Path, **options: Any) -> sd.SpatialData:
    """As a user reads a folder, writes it and opens it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io.visium_hd(folder, load_segmentations_only=False, **options).write(store)
        return sd.read_zarr(store)


@pytest.fixture(scope="module")
def plain(folders, fit, predict, tmp_path_factory) -> sd.SpatialData:
    """The plainest variant, with a model and a prediction for its bins."""
    root = tmp_path_factory.mktemp("plain")
    sdata = read(folders["sample"], root / "slide.zarr")
    predict(sdata, fit(sdata, checkpoint_dir=root / "model"), shapes_key=BINS, write=None)
    return sdata


@pytest.fixture(scope="module")
def expected(plain) -> tuple[str, np.ndarray]:
    """Hash of the model's weights, and the prediction."""
    table = plain.tables[f"pixnet_{BINS}"]
    return table.uns["pixnet_sd"]["model_sha256"], by_id(table)


def by_id(table: Any) -> np.ndarray:
    """Predictions in the order of the measured table's rows."""
    return table.X[np.argsort(table.obs["instance_id"].to_numpy())]


@pytest.mark.parametrize(("dataset_id", "options", "bins"), VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_the_same_slide(folders, fit, predict, expected, dataset_id, options, bins, tmp_path):
    """The same bins of 2, 8 and 16 µm with the same counts train the same model, and are predicted the same."""
    sdata = read(folders[dataset_id], tmp_path / "slide.zarr", **options)
    model = fit(sdata, checkpoint_dir=tmp_path / "model")
    (used,) = model.record.slides.values()
    assert set(used["tables"]) == {"square_002um", "square_008um", "square_016um"}
    predict(sdata, shapes_key=bins, write=None)
    table, measured = sdata.tables[f"pixnet_{bins}"], sdata.tables["square_008um"]
    assert sorted(table.obs["instance_id"]) == sorted(measured.obs[measured.uns["spatialdata_attrs"]["instance_key"]])
    assert model.record.weights_sha256 == expected[0]
    np.testing.assert_allclose(by_id(table), expected[1], atol=1e-5)
    scores = ps.tl.evaluate(sdata, table_key="square_008um", predicted_key=f"pixnet_{bins}")
    assert scores.attrs["n_regions"] == measured.n_obs


def test_segmented_cells(plain, fit, predict, tmp_path):
    cells = "sample_cell_segmentations"
    predict(plain, shapes_key=cells, write=None)
    assert list(plain.tables[f"pixnet_{cells}"].obs["instance_id"]) == list(plain.shapes[cells].index)
    scores = ps.tl.evaluate(plain, table_key="cell_segmentations", predicted_key=f"pixnet_{cells}")
    assert scores.attrs["n_regions"] > 20
    other = fit(plain, checkpoint_dir=tmp_path / "cells", table_key="cell_segmentations", record_model=False)
    assert np.isfinite(other.history["loss"]).all()


def test_visium_spots(fit, predict, tmp_path):
    folder = ps.datasets.write_visium(tmp_path / "outs", size_um=900.0, mpp=1.0, n_genes=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io.visium(folder, fullres_image_file="sample_tissue_image.tif").write(tmp_path / "slide.zarr")
    sdata = sd.read_zarr(tmp_path / "slide.zarr")
    model = fit(sdata, checkpoint_dir=tmp_path / "model", tile_px=256, image_key="sample_full_image")
    (used,) = model.record.slides.values()
    assert used["mpp"] == pytest.approx(1.0, rel=1e-3)
    (spots,) = used["tables"].values()
    predict(sdata, shapes_key=spots, write=None, image_key="sample_full_image")
    assert len(sdata.tables[f"pixnet_{spots}"]) == len(sdata.shapes[spots])


def test_the_short_way_in(folders, fit, predict, expected, tmp_path):
    """Converted in streams and opened without its tables and bins, it is the same slide once more."""
    ps.io.convert_visium_hd(folders["sample"], tmp_path / "slide.zarr", show_progress_bar=False)
    sdata = sd.read_zarr(tmp_path / "slide.zarr", selection=("images", "labels"))
    model = fit(sdata, checkpoint_dir=tmp_path / "model")
    assert model.record.weights_sha256 == expected[0]
    predict(sdata, shapes_key=BINS, write=None)
    np.testing.assert_allclose(by_id(sdata.tables[f"pixnet_{BINS}"]), expected[1], atol=1e-5)
