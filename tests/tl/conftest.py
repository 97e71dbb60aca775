"""One small fitted model and the slide it was fitted on, for all tests of the verbs; every test gets its own copy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import torch

import pixnet_sd as ps
from pixnet_sd.engine.train import Run, Trainer
from pixnet_sd.model import Network

FULL, BINS, TABLE = "sample_full_image", "sample_square_008um", "square_008um"
FAST: dict[str, Any] = {
    "objective": "mse_pcc",  # with its linear head, as what is kept and read back is checked to the last digit
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
FIT = {"model_params": ps.ModelParams, "train_params": ps.TrainParams}
PREDICT = {"predict_params": ps.PredictParams}


def grouped(groups: dict[str, type], **flat: Any) -> dict[str, Any]:
    """Put parameters given flat, as tests like them, into the groups that the verbs take."""
    for name, group in groups.items():
        if own := {f.name: flat.pop(f.name) for f in fields(group) if f.name in flat}:
            flat[name] = own | flat.get(name, {})
    return flat


def in_memory(sdata: sd.SpatialData) -> sd.SpatialData:
    """The same object without a store: of a backed one, what is only in memory is refused."""
    elements = {name: element for _, name, element in sdata.gen_elements()}
    return sd.SpatialData.init_from_elements(elements, attrs=sdata.attrs)


def names(sdata: sd.SpatialData) -> set[str]:
    return {name for _, name, _ in sdata.gen_elements()}


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def user_files(store: Path) -> dict[str, bytes]:
    """Every file of elements that are not the package's own."""
    return {name: held for name, held in content(store).items() if re.match("[^/]+/(?!pixnet_)[^/]+/", name)}


def map_values(sdata: sd.SpatialData, key: str = "pixnet_map") -> np.ndarray:
    return sdata.images[key]["scale0"]["image"].values


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


def _trained(drawn: Path, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The slide after `fit`, and the checkpoint."""
    sdata = sd.read_zarr(shutil.copytree(drawn, folder / "slide.zarr"))
    ps.tl.fit(sdata, checkpoint_dir=folder / "model", **(grouped(FIT, **FAST) | options))
    return folder / "slide.zarr", folder / "model"


@pytest.fixture(scope="session")
def _fitted(_drawn: Path, tmp_path_factory) -> tuple[Path, Path]:
    return _trained(_drawn, tmp_path_factory.mktemp("fitted"), validation=0.25)


@pytest.fixture(scope="session")
def _counted(_drawn: Path, tmp_path_factory) -> tuple[Path, Path]:
    return _trained(_drawn, tmp_path_factory.mktemp("counted"), objective="nb_pcc")


@pytest.fixture
def slide(_drawn: Path, tmp_path: Path) -> sd.SpatialData:
    """Backed slide that nothing was done with yet."""
    return sd.read_zarr(shutil.copytree(_drawn, tmp_path / "slide.zarr"))


@pytest.fixture
def fitted(_fitted: tuple[Path, Path], tmp_path: Path) -> sd.SpatialData:
    """Backed slide with a model recorded."""
    return sd.read_zarr(shutil.copytree(_fitted[0], tmp_path / "fitted.zarr"))


@pytest.fixture
def counted(_counted: tuple[Path, Path], tmp_path: Path) -> sd.SpatialData:
    """Backed slide with a model of counts recorded."""
    return sd.read_zarr(shutil.copytree(_counted[0], tmp_path / "counted.zarr"))


@pytest.fixture
def model(_fitted: tuple[Path, Path]) -> ps.PixNet:
    return ps.PixNet.load(_fitted[1])


@pytest.fixture(scope="session")
def checkpoint(_fitted: tuple[Path, Path]) -> Path:
    """Folder of the model; not to be written to."""
    return _fitted[1]


@pytest.fixture(scope="session")
def fit() -> Callable[..., ps.PixNet]:
    """`tl.fit`, small, of flat parameters."""
    return lambda sdata, **flat: ps.tl.fit(sdata, **grouped(FIT, **(FAST | flat)))


@pytest.fixture(scope="session")
def predict() -> Callable[..., None]:
    """`tl.predict` without a bar, on small tiles, of flat parameters."""
    small = {"tile_px": 256, "device": "cpu", "show_progress_bar": False}
    return lambda sdata, model=None, **flat: ps.tl.predict(sdata, model, **grouped(PREDICT, **(small | flat)))


@pytest.fixture
def no_training(monkeypatch) -> None:
    """Fail when anything is trained."""
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("a network was trained"))


@pytest.fixture
def run_of(fit, tmp_path, monkeypatch) -> Callable[..., Run]:
    """Makes the run that `fit` makes, and starts it not."""
    runs: list[Run] = []

    def look(trainer: Trainer) -> None:
        runs.append(trainer.run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "start", look)

    def make(sdata: Any, folder: str = "cache", **arguments: Any) -> Run:
        with pytest.raises(KeyboardInterrupt):
            fit(sdata, checkpoint_dir=tmp_path / folder / "model", **({"validation": 0.25} | arguments))
        return runs.pop()

    return make


@pytest.fixture
def each_pass(monkeypatch) -> Callable[[Callable[[torch.Tensor], Any]], None]:
    """Takes what is to be done before every forward pass of a network that trains or predicts."""

    def arrange(act: Callable[[torch.Tensor], Any]) -> None:
        forward = Network.forward

        def acting(self: Network, image: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() or torch.is_inference_mode_enabled():  # not when its reach is measured
                act(image)
            return forward(self, image)

        monkeypatch.setattr(Network, "forward", acting)

    return arrange


@pytest.fixture
def forward_passes(each_pass) -> list[int]:
    """Grows by one number, the tiles in it, for every forward pass."""
    passes: list[int] = []
    each_pass(lambda image: passes.append(len(image)))
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
