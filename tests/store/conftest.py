"""A small slide, in memory and on disk: an image turned, scaled and shifted, in two coordinate systems, with cells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, get_transformation

from pixnet_sd.store import Transaction, chunks_as_given

COS, SIN = 0.5 * np.cos(np.deg2rad(30)), 0.5 * np.sin(np.deg2rad(30))
ROTATED = Affine([[COS, -SIN, 100.0], [SIN, COS, -40.0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
TRANSFORMS = {"": ROTATED, "mirrored": Sequence([Scale([-2.0, 2.0], axes=("x", "y")), Identity()])}


def small_slide() -> sd.SpatialData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 300, 420), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2], transformations=dict(TRANSFORMS))
    cells = ShapesModel.parse(rng.uniform(0, 300, (6, 2)), geometry=0, radius=5.0, transformations=dict(TRANSFORMS))
    obs = pd.DataFrame({"region": pd.Categorical(["cells"] * 6), "cell": np.arange(6)}, index=list("abcdef"))
    table = ad.AnnData(rng.random((6, 4)).astype(np.float32), obs=obs)
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="cell")
    attrs = {"lab": {"name": "A"}}
    return sd.SpatialData(images={"_full_image": image}, shapes={"cells": cells}, tables={"table": table}, attrs=attrs)


@pytest.fixture
def in_memory() -> sd.SpatialData:
    return small_slide()


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """The slide on disk, for tests that do not change it."""
    store = tmp_path_factory.mktemp("written") / "slide.zarr"
    with chunks_as_given():
        small_slide().write(store)
    return store


@pytest.fixture
def slide(tmp_path, written) -> sd.SpatialData:
    return sd.read_zarr(shutil.copytree(written, tmp_path / "slide.zarr"))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """A folder for the user's secret."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def enter(sdata: sd.SpatialData, names: Mapping[str, str], *, n_bytes: int = 0, **options: Any) -> None:
    """Check whether results could be written, and put nothing in."""
    with Transaction(sdata, names, **options) as out:
        out.check_room(n_bytes, 0)


def commit(sdata: sd.SpatialData, elements: Mapping[str, Any], *, overwrite: bool = False, **options: Any) -> None:
    """Put elements in."""
    with Transaction(sdata, {}, overwrite=overwrite) as out:
        out.commit(elements, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def user_files(store: Path) -> dict[str, dict[str, bytes]]:
    """Contents of the user's own elements."""
    return {folder: contents(store / folder) for folder in ("images/_full_image", "shapes/cells", "tables/table")}


def affines(element: Any) -> dict[str, list[list[float]]]:
    """Coordinate system → matrix of an element."""
    transforms = get_transformation(element, get_all=True).items()
    return {system: each.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for system, each in transforms}


def assert_same_table(found: ad.AnnData, expected: ad.AnnData) -> None:
    np.testing.assert_array_equal(found.X, expected.X, strict=True)
    np.testing.assert_array_equal(found.obsm["spatial"], expected.obsm["spatial"], strict=True)
    pd.testing.assert_frame_equal(found.obs, expected.obs, check_exact=True)
    pd.testing.assert_frame_equal(found.var, expected.var, check_exact=True)
    np.testing.assert_equal(dict(found.layers), dict(expected.layers))
    np.testing.assert_equal(dict(found.uns), dict(expected.uns))


def assert_metadata_is_zarrs_own(sdata: sd.SpatialData) -> None:
    ours = json.loads((sdata.path / "zarr.json").read_text())
    sdata.write_consolidated_metadata()
    assert json.loads((sdata.path / "zarr.json").read_text()) == ours
