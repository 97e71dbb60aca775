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
from tests.store.putting import own_chunks

COS, SIN = 0.5 * np.cos(np.deg2rad(30)), 0.5 * np.sin(np.deg2rad(30))
ROTATED = Affine([[COS, -SIN, 100.0], [SIN, COS, -40.0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
TRANSFORMS = {"": ROTATED, "mirrored": Sequence([Scale([-2.0, 2.0], axes=("x", "y")), Identity()])}


@pytest.fixture
def in_memory() -> sd.SpatialData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 300, 420), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2], transformations=dict(TRANSFORMS))
    cells = ShapesModel.parse(rng.uniform(0, 300, (6, 2)), geometry=0, radius=5.0, transformations=dict(TRANSFORMS))
    obs = pd.DataFrame({"region": pd.Categorical(["cells"] * 6), "cell": np.arange(6)}, index=list("abcdef"))
    table = ad.AnnData(rng.random((6, 4)).astype(np.float32), obs=obs)
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="cell")
    attrs = {"lab": {"name": "A"}}
    return sd.SpatialData(images={"_full_image": image}, shapes={"cells": cells}, tables={"table": table}, attrs=attrs)


@pytest.fixture(scope="session")
def cached_store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("written") / "slide.zarr"


@pytest.fixture
def written(cached_store, in_memory) -> Path:
    """The slide on disk, written once, for tests that do not change it."""
    if not cached_store.exists():
        with own_chunks():
            in_memory.write(cached_store)
        in_memory.path = None
    return cached_store


@pytest.fixture
def slide(tmp_path, written) -> sd.SpatialData:
    shutil.copytree(written, tmp_path / "slide.zarr")
    return sd.read_zarr(tmp_path / "slide.zarr")


def user_files(store: Path) -> dict[str, str]:
    """Path → hash of every file of the user's own elements."""
    folders = ("images/_full_image", "shapes/cells", "tables/table")
    files = [path for folder in folders for path in sorted((store / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """A folder for the user's secret."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"
