"""The model on disk and on the hub: the same after a round trip, and never another one unnoticed.

A hub of folders stands in for the Hugging Face hub, and nothing is fetched.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, errors, hub_mixin
from tests.model.models import make_model

from pixnet_sd.errors import CheckpointError
from pixnet_sd.model import PixNet

FILES = {"checksums.json", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def model() -> PixNet:
    """A model with statistics that are not those of a fresh network."""
    model = make_model()
    model.network.train()
    model.network(torch.rand(2, 3, 64, 64) * 255)
    model.network.eval()
    return model


@pytest.fixture
def saved(model: PixNet, tmp_path: Path) -> Path:
    return model.save(tmp_path / "folder" / "saved")


@torch.no_grad()
def gene_map(model: PixNet) -> np.ndarray:
    image = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (1, 3, 64, 96))).float()
    return model.network.gene_map(model.network(image)).numpy()


def test_round_trip(model: PixNet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    for loaded in (PixNet.load(saved), PixNet.load("~/saved"), PixNet.from_pretrained(saved)):
        np.testing.assert_array_equal(gene_map(loaded), gene_map(model))
        assert loaded.record == model.record
        assert not loaded.network.training


def test_what_it_says_of_itself(model: PixNet) -> None:
    assert repr(model) == "PixNet(test_resnet, 3 genes, mean, 0.5 µm/px)"
    assert model.history["loss"].to_dict() == {1: 2.5, 2: 1.5}
    assert PixNet(model.network, replace(model.record, history=[])).history.empty


def test_not_a_checkpoint(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "config.json").write_text('{"architecture": "resnet18", "num_classes": 0}')
    for path in (saved, saved / "model.safetensors", tmp_path, tmp_path / "typo"):
        with pytest.raises(CheckpointError, match=path.name):
            PixNet.load(path)
    monkeypatch.chdir(tmp_path)
    for name in ("no/such/folder", "./models/typo", "nobody/no-such-model", str(tmp_path)):
        with pytest.raises(CheckpointError, match=name):
            PixNet.from_pretrained(name, local_files_only=True)


# The hub


class FolderHub:
    """What of huggingface_hub's client is used, on folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.error: Exception | None = None

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options) -> str:
        assert set(options) == {"revision", "cache_dir", "force_download", "local_files_only", "token"}
        if self.error is not None:
            raise self.error
        cached = self.root / "cache" / repo_id
        cached.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            self.fetched.append(name)
            if (self.root / repo_id / name).exists():
                shutil.copy(self.root / repo_id / name, cached)
        return str(cached)

    def create_repo(self, repo_id: str, **_) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_) -> str:
        shutil.copytree(folder_path, self.root / repo_id)
        return f"hub://{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(hub_mixin, "HfApi", lambda **_: hub)
    monkeypatch.chdir(tmp_path)
    return hub


def http_error(cause: type[Exception], status: int) -> Exception:
    return cause("said the hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_there_and_back(hub: FolderHub, model: PixNet) -> None:
    assert model.push_to_hub("lab/model", license="cc-by-4.0") == "hub://lab/model/commit/1"
    assert {path.name for path in (hub.root / "lab/model").iterdir()} == {*FILES, "README.md"}
    card = ModelCard((hub.root / "lab/model/README.md").read_text(encoding="utf-8"))
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "pixnet_sd")
    assert 'PixNet.from_pretrained("lab/model")' in card.text
    assert PixNet.from_pretrained("lab/model").record == model.record
    hub.fetched.clear()
    model.save_pretrained("lab/model")  # a folder goes before the hub
    assert PixNet.from_pretrained("lab/model").genes == model.genes
    assert not hub.fetched


def test_save_and_push(hub: FolderHub, model: PixNet) -> None:
    saved = model.save_pretrained("saved", repo_id="lab/model", push_to_hub=True, license="mit", private=True)
    assert saved == "hub://lab/model/commit/1"
    assert ModelCard.load(hub.root / "lab/model/README.md").data.license == "mit"
    assert Path("saved/config.json").exists()
    with pytest.raises(TypeError, match="licence"):
        model.push_to_hub("lab/model", licence="mit")


@pytest.mark.parametrize("content", [None, "[1, 2]", "{", '{"architectures": ["ViT"], "network": 1, "record": 2}'])
def test_a_foreign_model_is_refused_before_its_weights_come(hub: FolderHub, content: str | None) -> None:
    foreign = hub.root / "google/vit"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(b"gigabytes")
    if content is not None:
        (foreign / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="'google/vit' on the hub is no model"):
        PixNet.from_pretrained("google/vit")
    assert hub.fetched == ["config.json", "checksums.json"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(errors.GatedRepoError, 403), "let you in"),
        (http_error(errors.RepositoryNotFoundError, 404), "no such model"),
        (http_error(errors.RevisionNotFoundError, 404), "no such revision"),
        (errors.LocalEntryNotFoundError("not in cache"), "not reached"),
        (http_error(errors.HfHubHTTPError, 401), "hf auth login"),
        (http_error(errors.HfHubHTTPError, 403), "may write there"),
        (http_error(errors.HfHubHTTPError, 503), "status 503"),
        (errors.LocalTokenNotFoundError("no token"), "nobody is logged in"),
        (ConnectionResetError("peer"), "not reached"),
        (PermissionError(13, "Permission denied"), "PermissionError: .*Permission denied"),
    ],
)
def test_what_can_go_wrong_on_the_hub(hub: FolderHub, model: PixNet, error: Exception, says: str) -> None:
    hub.error = error
    for call in (PixNet.from_pretrained, model.push_to_hub):
        with pytest.raises(CheckpointError, match=rf"'lab/model'.*: .*{says}"):
            call("lab/model")


def test_saving_over_a_model_keeps_its_card(hub: FolderHub, model: PixNet, caplog: pytest.LogCaptureFixture) -> None:
    model.save_pretrained("saved")
    before = Path("saved/README.md").read_text(encoding="utf-8")
    model.save_pretrained("saved")  # the same weights: the card is still true
    assert not caplog.records
    make_model(1).save_pretrained("saved")
    assert Path("saved/README.md").read_text(encoding="utf-8") == before
    assert "README.md" in caplog.text


def test_a_full_disk_leaves_the_old_model(model: PixNet, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for folder in (saved, saved / "new" / "folder"):
        with pytest.raises(CheckpointError, match="No space left"):
            make_model(1).save_pretrained(folder)
    assert {path.name for path in saved.iterdir()} == FILES
    assert json.loads((saved / "config.json").read_text())["weights_sha256"] == model.record.weights_sha256
    assert PixNet.load(saved).record == model.record
