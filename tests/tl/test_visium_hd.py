"""Folders as Space Ranger leaves them, read by spatialdata-io in every variant, through `fit` and `predict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd

import pixnet_sd as ps
from pixnet_sd.datasets.drawn import _slide
from pixnet_sd.geometry import Lattice
from pixnet_sd.slide import open_slide
from pixnet_sd.slide.elements import regions_of
from pixnet_sd.store import squares_element
from pixnet_sd.store.gene_map import image_transforms

io = pytest.importorskip("spatialdata_io")

DRAWN: dict[str, Any] = {"size_um": 160.0, "mpp": 1.0, "n_genes": 12}
READ: dict[str, Any] = {"load_segmentations_only": False}


@dataclass(frozen=True)
class Variant:
    """How a folder is read, and what its 8 µm bins are called then."""

    dataset_id: str = "sample"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def bins(self) -> str:
        suffix = "_labels" if dict(self.options).get("annotate_table_by_labels") else ""
        return f"{self.dataset_id}_square_008um{suffix}"


PLAIN = Variant()
VARIANTS = {
    "circles": Variant(options=(("bins_as_squares", False),)),
    "labels": Variant(options=(("annotate_table_by_labels", True),)),
    "no id": Variant(""),
    "no id, circles, labels": Variant("", (("bins_as_squares", False), ("annotate_table_by_labels", True))),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One slide, with its name in front of its files and without."""
    root = tmp_path_factory.mktemp("space_ranger")
    return {name: ps.datasets.write_visium_hd(root / f"id_{name}", dataset_id=name, **DRAWN) for name in ("sample", "")}


def read(folders: dict[str, Path], variant: Variant, store: Path) -> sd.SpatialData:
    """As a user reads a folder, writes it and opens it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io.visium_hd(folders[variant.dataset_id], **READ, **dict(variant.options)).write(store)
        return sd.read_zarr(store)


@pytest.fixture(scope="module")
def expected(folders, fast, tmp_path_factory) -> tuple[str, np.ndarray]:
    """Model and prediction of the plainest variant."""
    root = tmp_path_factory.mktemp("expected")
    sdata = read(folders, PLAIN, root / "slide.zarr")
    model = ps.tl.fit(sdata, checkpoint_dir=root / "model", **fast)
    ps.tl.predict(sdata, shapes_key=PLAIN.bins, write=None, device="cpu", show_progress_bar=False)
    return model.record.weights_sha256, by_id(sdata.tables[f"pixnet_{PLAIN.bins}"])


def by_id(table: Any) -> np.ndarray:
    """Predictions in the order of the measured table's rows."""
    return table.X[np.argsort(table.obs["instance_id"].to_numpy())]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_the_same_slide(folders, fit, predict, expected, variant, tmp_path):
    """The same bins of 2, 8 and 16 µm with the same counts train the same model, and are predicted the same."""
    sdata = read(folders, variant, tmp_path / "slide.zarr")
    model = fit(sdata, checkpoint_dir=tmp_path / "model")
    (used,) = model.record.slides.values()
    assert set(used["tables"]) == {"square_002um", "square_008um", "square_016um"}
    predict(sdata, shapes_key=variant.bins, write=None)
    table = sdata.tables[f"pixnet_{variant.bins}"]
    measured = sdata.tables["square_008um"]
    assert sorted(table.obs["instance_id"]) == sorted(measured.obs[measured.uns["spatialdata_attrs"]["instance_key"]])
    assert model.record.weights_sha256 == expected[0]
    np.testing.assert_allclose(by_id(table), expected[1], atol=1e-5)
    scores = ps.tl.evaluate(sdata, table_key="square_008um", predicted_key=f"pixnet_{variant.bins}")
    assert scores.attrs["n_regions"] == measured.n_obs


def test_segmented_cells(folders, fit, predict, tmp_path):
    sdata = read(folders, PLAIN, tmp_path / "slide.zarr")
    fit(sdata, checkpoint_dir=tmp_path / "model", table_key="square_008um")
    cells = "sample_cell_segmentations"
    predict(sdata, shapes_key=cells, write=None)
    table = sdata.tables[f"pixnet_{cells}"]
    assert list(table.obs["instance_id"]) == list(sdata.shapes[cells].index)
    scores = ps.tl.evaluate(sdata, table_key="cell_segmentations", predicted_key=f"pixnet_{cells}")
    assert scores.attrs["n_regions"] > 20
    other = fit(sdata, checkpoint_dir=tmp_path / "cells", table_key="cell_segmentations")
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


@pytest.fixture(scope="module")
def folder_and_store(folders, tmp_path_factory) -> tuple[Path, Path]:
    """A folder, and the store that streams made of it."""
    store = tmp_path_factory.mktemp("converted") / "slide.zarr"
    ps.io.convert_visium_hd(folders["sample"], store, show_progress_bar=False)
    return folders["sample"], store


def test_the_short_way_in(folder_and_store, fit, predict, expected, tmp_path):
    """Converted in streams and opened without its tables and bins, it is the same slide once more."""
    sdata = sd.read_zarr(folder_and_store[1], selection=("images", "labels"))
    model = fit(sdata, checkpoint_dir=tmp_path / "model")
    assert model.record.weights_sha256 == expected[0]
    predict(sdata, shapes_key="sample_square_008um", write=None)
    np.testing.assert_allclose(by_id(sdata.tables["pixnet_sample_square_008um"]), expected[1], atol=1e-5)


@pytest.fixture
def turn(monkeypatch) -> Callable[..., sd.SpatialData]:
    """Draws slides whose lattice is turned by four degrees."""
    monkeypatch.setattr(_slide, "_ANGLE", float(np.deg2rad(4)))
    return lambda size_um, bin_um: ps.datasets.sample(**DRAWN | {"size_um": size_um}, bin_um=(bin_um,))


def test_bins_are_the_turned_squares(turn, darkness, predict):
    """Prediction for the bins of the lattice, in closed form, equals that for their polygons."""
    turned = turn(200.0, 2)
    slide = open_slide(turned, working_mpp=darkness.record.working_mpp)
    bins, _ = regions_of(
        turned,
        "sample_square_002um",
        coordinate_system=slide.coordinate_system,
        from_system=slide.working_from_system,
    )
    assert isinstance(bins, Lattice)
    assert not bins.is_aligned
    transforms = image_transforms(turned, slide.image_key)
    turned.shapes["polygons"] = squares_element(bins.centre_xy, bins.pitch, transforms, angle_rad=np.deg2rad(4))
    predict(turned, darkness, shapes_key="polygons", write=None)
    predict(turned, darkness, shapes_key="sample_square_002um", write=None)
    lattice, polygons = (turned.tables[f"pixnet_{key}"].X for key in ("sample_square_002um", "polygons"))
    np.testing.assert_allclose(lattice, polygons, atol=1e-5 * np.ptp(polygons))


def test_ignoring_the_rotation_loses_the_truth(turn, darkness, predict):
    """Nuclei are dark and express: darkness per bin follows the truth, unless bins are taken for unturned ones."""
    turned = turn(400.0, 8)
    predict(turned, darkness, shapes_key="sample_square_008um", write=None)
    slide = open_slide(turned, working_mpp=darkness.record.working_mpp)
    bins, ids = regions_of(
        turned,
        "sample_square_008um",
        coordinate_system=slide.coordinate_system,
        from_system=slide.working_from_system,
    )
    middle = bins.centre_xy.mean(axis=0) - bins.pitch * np.array([bins.col.mean() + 0.5, bins.row.mean() + 0.5])
    unturned = np.array([[bins.pitch, 0, middle[0]], [0, bins.pitch, middle[1]], [0, 0, 1]])
    wrong = Lattice(bins.row, bins.col, unturned)
    transforms = image_transforms(turned, slide.image_key)
    turned.shapes["unturned"] = squares_element(wrong.centre_xy, wrong.pitch, transforms, index=list(ids))
    predict(turned, darkness, shapes_key="unturned", write=None)
    truth = ps.datasets.sample_truth_bins(8, **DRAWN | {"size_um": 400.0}, library_size=False).sum(axis=1).to_numpy()
    right, ignored = (
        np.corrcoef(by_id(turned.tables[f"pixnet_{key}"])[:, 0], truth)[0, 1]
        for key in ("sample_square_008um", "unturned")
    )
    assert right > 0.5
    assert ignored < right - 0.1
