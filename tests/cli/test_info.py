"""What `info` says of checkpoints and of stores that lack something."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel

import pixnet_sd as ps
from pixnet_sd.cli._info import describe
from pixnet_sd.errors import StoreError


@pytest.fixture(scope="module")
def checkpoint(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    ps.tl.fit(
        sd.read_zarr(drawn),
        genes=["ACTB", "COL1A1", "MKI67"],
        max_epochs=1,
        validation=0.25,
        objective="poisson",
        device="cpu",
        model_params={"encoder": "test_resnet", "encoder_weights": None, "decoder_width": 16, "working_mpp": 1.0},
        train_params={"tile_px": 128},
        checkpoint_dir=folder,
        record_model=False,
        show_progress_bar=False,
    )
    assert "pixnet_sd" not in sd.read_zarr(drawn).attrs
    return folder


def test_checkpoint(checkpoint):
    lines = describe(checkpoint).splitlines()
    assert lines[0] == f"{checkpoint}: pixnet_sd checkpoint"
    assert "  genes: 3: ACTB, COL1A1, MKI67" in lines
    assert "  objective: poisson, aggregation: sum, target_sum: 10000" in lines
    assert "  encoder: test_resnet, random weights" in lines
    assert "  training slides: 1" in lines
    pcc = np.array([p for p in ps.PixNet.load(checkpoint).record.held_out_pcc if p is not None])
    assert any(line.startswith("  held-out PCC: ") and line.endswith(f"mean {pcc.mean():.3f}") for line in lines)


def test_estimate_for_a_model(drawn, checkpoint):
    text = describe(drawn, model=checkpoint)
    assert "gene map of this model: 50 x 50 px of 4 µm, 4 channels" in text


def test_a_slide_without_a_resolution(tmp_path):
    pixels = np.full((3, 64, 64), 200, np.uint8)
    sd.SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))}).write(tmp_path / "he.zarr")
    text = describe(tmp_path / "he.zarr")
    assert "slide image: cannot be told. Micrometres per pixel of image 'he' are unknown" in text
    assert "Give --mpp (see" in text
    assert "tables: none" in text
    assert "resolution: 0.5 µm per pixel, from the argument --mpp" in describe(tmp_path / "he.zarr", mpp=0.5)


def test_a_model_that_is_gone(drawn, tmp_path):
    store = shutil.copytree(drawn, tmp_path / "slide.zarr")
    sdata = sd.read_zarr(store)
    sdata.attrs["pixnet_sd"] = {"model": "/gone"}
    sdata.write_attrs()
    assert "model: /gone (not there)" in describe(store)


def test_something_else(tmp_path):
    with pytest.raises(
        StoreError, match=r"neither a SpatialData store .* Give the folder .*, or the folder of a model"
    ):
        describe(tmp_path)
    with pytest.raises(StoreError, match=r"nothing at .* Give the folder .*, or the folder of a model"):
        describe(tmp_path / "nowhere")
