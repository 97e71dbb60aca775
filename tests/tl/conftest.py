"""One small fitted model and the slide it was fitted on, for all tests of the verbs; every test gets its own copy."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import torch
from tests.grouped import FIT, PREDICT, grouped

import pixnet_sd as ps
from pixnet_sd.engine.train import Trainer
from pixnet_sd.model import Network

FULL, BINS, TABLE = "sample_full_image", "sample_square_008um", "square_008um"

FAST: dict[str, Any] = {
    "encoder": "test_resnet",
    "encoder_weights": None,
    "decoder_width": 16,
    "working_mpp": 1.0,
    "tile_px": 128,
    "batch_size": 4,
    "genes": 6,
    "max_epochs": 2,
    "device": "cpu",
    "show_progress_bar": False,
}
"""Parameters of `fit`, flat, that make it take half a second."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _drawn(tmp_path_factory) -> Path:
    """A slide with an image and counts."""
    store = tmp_path_factory.mktemp("drawn") / "slide.zarr"
    ps.datasets.sample(size_um=200, mpp=1.0, bin_um=(8,)).write(store)
    return store


@pytest.fixture(scope="session")
def _fitted(_drawn: Path, tmp_path_factory) -> tuple[Path, Path]:
    """The slide after `fit`, and the checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    shutil.copytree(_drawn, folder / "slide.zarr")
    sdata = sd.read_zarr(folder / "slide.zarr")
    ps.tl.fit(sdata, checkpoint_dir=folder / "model", validation=0.25, **grouped(FIT, **FAST))
    return folder / "slide.zarr", folder / "model"


@pytest.fixture
def slide(_drawn: Path, tmp_path: Path) -> sd.SpatialData:
    """Backed slide that nothing was done with yet."""
    shutil.copytree(_drawn, tmp_path / "slide.zarr")
    return sd.read_zarr(tmp_path / "slide.zarr")


@pytest.fixture
def fitted(_fitted: tuple[Path, Path], tmp_path: Path) -> sd.SpatialData:
    """Backed slide with a model recorded."""
    shutil.copytree(_fitted[0], tmp_path / "fitted.zarr")
    return sd.read_zarr(tmp_path / "fitted.zarr")


@pytest.fixture(scope="session")
def _counted(_drawn: Path, tmp_path_factory) -> Path:
    """Folder of a slide and of a model of its counts."""
    folder = tmp_path_factory.mktemp("counted")
    shutil.copytree(_drawn, folder / "slide.zarr")
    ps.tl.fit(
        sd.read_zarr(folder / "slide.zarr"),
        checkpoint_dir=folder / "model",
        objective="poisson",
        **grouped(FIT, **FAST),
    )
    return folder


@pytest.fixture
def counted(_counted: Path, tmp_path: Path) -> sd.SpatialData:
    """Backed slide with a model of counts recorded."""
    shutil.copytree(_counted / "slide.zarr", tmp_path / "counted.zarr")
    return sd.read_zarr(tmp_path / "counted.zarr")


@pytest.fixture
def model(_fitted: tuple[Path, Path]) -> ps.PixNet:
    return ps.PixNet.load(_fitted[1])


@pytest.fixture(scope="session")
def checkpoint(_fitted: tuple[Path, Path]) -> Path:
    """Folder of the model; not to be written to."""
    return _fitted[1]


@pytest.fixture(scope="session")
def fast() -> dict[str, Any]:
    return grouped(FIT, **FAST)


@pytest.fixture
def fit() -> Callable[..., ps.PixNet]:
    """`tl.fit`, small, of flat parameters."""
    return lambda sdata, **flat: ps.tl.fit(sdata, **grouped(FIT, **(FAST | flat)))


@pytest.fixture
def no_training(monkeypatch) -> None:
    """Fail when anything is trained."""
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("a network was trained"))


@pytest.fixture
def predict() -> Callable[..., None]:
    """`tl.predict` without a bar, on small tiles, of flat parameters."""
    small = {"tile_px": 256, "device": "cpu", "show_progress_bar": False}
    return lambda sdata, model=None, **flat: ps.tl.predict(sdata, model, **grouped(PREDICT, **(small | flat)))


@pytest.fixture
def forward_passes(monkeypatch) -> list[int]:
    """Grows by one number, the tiles in it, for every forward pass of a network that trains or predicts."""
    passes: list[int] = []
    forward = Network.forward

    def counting(self: Network, image: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():  # not when its reach is measured
            passes.append(len(image))
        return forward(self, image)

    monkeypatch.setattr(Network, "forward", counting)
    return passes


class Darkness(Network):
    """Every channel of D is the mean darkness of the 4 × 4 pixels below."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        dark = torch.nn.functional.avg_pool2d(255 - image.mean(dim=1, keepdim=True), 4)
        return dark.expand(-1, self.head.in_features, -1, -1)


@pytest.fixture
def darkness(model) -> ps.PixNet:
    record = replace(model.record, genes=["DARK"], held_out_pcc=[], weights_sha256="darkness")
    network = Darkness(model.network.encoder, record.decoder, 1, "mean")
    torch.nn.init.constant_(network.head.weight, 1 / network.head.in_features)
    torch.nn.init.zeros_(network.head.bias)
    return ps.PixNet(network, record)


def user_files(store: Path) -> dict[str, str]:
    """Path → hash of every file of the sample's own elements."""
    folders = (f"images/{FULL}", f"shapes/{BINS}", f"tables/{TABLE}")
    files = [path for folder in folders for path in sorted((store / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(name="user_files")
def _user_files() -> Callable[[Path], dict[str, str]]:
    return user_files


def map_values(sdata: sd.SpatialData, key: str = "pixnet_map") -> np.ndarray:
    return sdata.images[key]["scale0"]["image"].values


@pytest.fixture(name="map_values")
def _map_values() -> Callable[..., np.ndarray]:
    return map_values
