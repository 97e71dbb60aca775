"""The model on disk: the same after a round trip, and never another one unnoticed."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pixnet_sd as ps
from pixnet_sd.errors import CheckpointError
from pixnet_sd.model import DecoderConfig, ModelRecord, Network, PixNet, build_encoder

SHAPE = DecoderConfig(widths=(4, 8, 8, 16), hidden=(4, 8, 8), dropout=0.5)


def make_model(seed: int = 0, *, genes: int = 3) -> PixNet:
    torch.manual_seed(seed)
    network = Network(build_encoder("test_resnet", None), SHAPE, genes, "mean")
    record = ModelRecord(
        genes=[f"GENE{k}" for k in range(genes)],
        target_sum=1e4,
        objective="mse_pcc",
        aggregation="mean",
        working_mpp=0.5,
        encoder="test_resnet",
        encoder_weights=None,
        encoder_sha256="",
        freeze_encoder=False,
        decoder=SHAPE,
        tile_px=128,
        halo_px=160,
        sees_whole_tile=False,
        history=[{"epoch": 1.0, "loss": 2.5}, {"epoch": 2.0, "loss": 1.5}],
    )
    return PixNet(network, record)


@pytest.fixture
def model() -> PixNet:
    return make_model()


@pytest.fixture(scope="module")
def _saved(tmp_path_factory) -> Path:
    return make_model().save(tmp_path_factory.mktemp("model") / "saved")


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A folder with a model, a test's own."""
    return Path(shutil.copytree(_saved, tmp_path / "saved"))


@torch.no_grad()
def gene_map(model: PixNet) -> np.ndarray:
    image = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (1, 3, 64, 96))).float()
    return model.network.gene_map(model.network(image)).numpy()


def test_round_trip(model: PixNet, tmp_path: Path) -> None:
    # statistics that are not those of a fresh network
    model.network.train()
    model.network(torch.rand(2, 3, 64, 64) * 255)
    model.network.eval()
    assert model.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    loaded = PixNet.load(tmp_path / "a" / "b")
    np.testing.assert_array_equal(gene_map(loaded), gene_map(model))
    assert loaded.record == model.record
    assert not loaded.network.training


def test_round_trip_through_pretrained(model: PixNet, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "hub")
    loaded = PixNet.from_pretrained(str(tmp_path / "hub"))
    np.testing.assert_array_equal(gene_map(loaded), gene_map(model))
    assert loaded.record == PixNet.load(tmp_path / "hub").record == model.record
    assert {"checksums.json", "config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "hub").iterdir()
    }
    from_path = PixNet.from_pretrained(tmp_path / "hub")
    assert from_path.genes == model.genes


def test_saving_over_a_model(saved: Path) -> None:
    other = make_model(1, genes=5)
    other.save(saved)
    np.testing.assert_array_equal(gene_map(PixNet.load(saved)), gene_map(other))
    assert sorted(path.name for path in saved.iterdir()) == ["checksums.json", "config.json", "model.safetensors"]


def test_nothing_is_pickled(saved: Path) -> None:
    for path in saved.iterdir():
        assert not zipfile.is_zipfile(path)
        with path.open("rb") as file, pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError)):
            # finds no object in it; a torch file would give one
            pickle.Unpickler(file).load()


def test_what_it_says_of_itself(model: PixNet) -> None:
    assert repr(model) == "PixNet(test_resnet, 3 genes, mean, 0.5 µm/px)"
    assert model.genes == ["GENE0", "GENE1", "GENE2"]
    assert model.history["loss"].tolist() == [2.5, 1.5]
    assert model.history.index.tolist() == [1, 2]
    assert PixNet(model.network, replace(model.record, history=[])).history.empty
    assert ps.PixNet is PixNet


def test_config_of_another_kind(saved: Path) -> None:
    (saved / "config.json").write_text('{"architecture": "resnet18", "num_classes": 0}')
    with pytest.raises(CheckpointError, match="not a checkpoint of this package"):
        PixNet.load(saved)


@pytest.mark.parametrize("given", ["folder", "weights", "config"])
def test_not_a_checkpoint_folder(saved: Path, tmp_path: Path, given: str) -> None:
    if given == "folder":
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"empty' is no pixnet_sd checkpoint: it has no config.json"):
            PixNet.load(tmp_path / "empty")
        with pytest.raises(CheckpointError, match=r"directory=.*typo"):
            PixNet.load(tmp_path / "typo")
    else:
        path = saved / ("model.safetensors" if given == "weights" else "config.json")
        with pytest.raises(CheckpointError, match=r"directory=.*it is a file"):
            PixNet.load(path)


def test_home_folder(saved: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert PixNet.load("~/saved").genes == ["GENE0", "GENE1", "GENE2"]


@pytest.mark.parametrize("name", ["no/such/folder", "./models/typo", "nobody/no-such-model"])
def test_pretrained_that_cannot_be_had(name: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is no folder here, and cannot be fetched from the hub|name_or_path=.*no such folder"
    ):
        PixNet.from_pretrained(name, local_files_only=True)


def test_pretrained_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        PixNet.from_pretrained(str(tmp_path))
