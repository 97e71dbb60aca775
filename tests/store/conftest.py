"""A small slide on disk: a rotated, scaled and shifted image with two coordinate systems, shapes and a table."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence

ANGLE = np.deg2rad(30)
ROTATED = Affine(
    [
        [0.5 * np.cos(ANGLE), -0.5 * np.sin(ANGLE), 100.0],
        [0.5 * np.sin(ANGLE), 0.5 * np.cos(ANGLE), -40.0],
        [0, 0, 1],
    ],
    input_axes=("x", "y"),
    output_axes=("x", "y"),
)
TRANSFORMS = {"": ROTATED, "mirrored": Sequence([Scale([-2.0, 2.0], axes=("x", "y")), Identity()])}


def make_slide() -> sd.SpatialData:
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
    return make_slide()


@pytest.fixture(scope="session")
def _written(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("written") / "slide.zarr"
    make_slide().write(store)
    return store


@pytest.fixture
def slide(tmp_path: Path, _written: Path) -> sd.SpatialData:
    shutil.copytree(_written, tmp_path / "slide.zarr")
    return sd.read_zarr(tmp_path / "slide.zarr")


def user_files(store: Path) -> dict[str, str]:
    """Path → hash of every file of the user's own elements."""
    folders = ("images/_full_image", "shapes/cells", "tables/table")
    files = [path for folder in folders for path in sorted((store / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(name="user_files")
def _user_files():
    return user_files
