"""Models to and from the Hugging Face hub: a hub of folders stands in for it, and nothing is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, errors, hub_mixin
from tests.store.test_pixnet import make_model

from pixnet_sd.errors import CheckpointError
from pixnet_sd.model import PixNet
from pixnet_sd.model import _checkpoint as _hub

FILES = {"README.md", "checksums.json", "config.json", "model.safetensors"}


class FolderHub:
    """What of huggingface_hub's client is used, on folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[tuple[str, str]] = []
        self.error: Exception | None = None

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options) -> str:
        assert set(options) == {"revision", "cache_dir", "force_download", "local_files_only", "token"}
        if self.error is not None:
            raise self.error
        cached = self.root / "cache" / repo_id
        cached.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            self.fetched.append((repo_id, name))
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
def hub(tmp_path: Path, monkeypatch) -> FolderHub:
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(hub_mixin, "HfApi", lambda **_: hub)
    monkeypatch.chdir(tmp_path)
    return hub


def http_error(kind: type[Exception], status: int) -> Exception:
    return kind("said the hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_there_and_back(hub: FolderHub):
    model = make_model()
    assert model.push_to_hub("lab/model", license="cc-by-4.0") == "hub://lab/model/commit/1"
    assert {path.name for path in (hub.root / "lab/model").iterdir()} == FILES
    card = ModelCard((hub.root / "lab/model/README.md").read_text(encoding="utf-8"))
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "pixnet_sd"
    assert 'PixNet.from_pretrained("lab/model")' in card.text
    loaded = PixNet.from_pretrained("lab/model")
    assert loaded.record == model.record


def test_a_foreign_model_is_refused_before_its_weights_come(hub: FolderHub):
    foreign = hub.root / "google/vit"
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text(json.dumps({"architectures": ["ViT"], "network": 1, "record": 2}))
    (foreign / "model.safetensors").write_bytes(b"gigabytes")
    with pytest.raises(
        CheckpointError, match=r"'google/vit' on the hub is no model of pixnet_sd: .*its format is None"
    ):
        PixNet.from_pretrained("google/vit")
    assert hub.fetched == [("google/vit", "config.json"), ("google/vit", "checksums.json")]


@pytest.mark.parametrize(
    ("content", "says"), [(None, "it has no config.json"), ("[1, 2]", "its format is None"), ("{", "is damaged")]
)
def test_what_else_may_be_there(hub: FolderHub, content, says):
    (hub.root / "lab/data").mkdir(parents=True)
    if content is not None:
        (hub.root / "lab/data/config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"'lab/data' on the hub is no model of pixnet_sd: .*{says}"):
        PixNet.from_pretrained("lab/data")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(errors.GatedRepoError, 403), "its owner must let you in"),
        (http_error(errors.RepositoryNotFoundError, 404), "there is no such model. Check the name"),
        (http_error(errors.RevisionNotFoundError, 404), "it has no such revision"),
        (errors.LocalEntryNotFoundError("not in cache"), "the hub was not reached.*copy the model's folder here"),
        (http_error(errors.HfHubHTTPError, 503), "the hub answered with status 503"),
        (ConnectionResetError("peer"), "the hub was not reached"),
        (PermissionError(13, "Permission denied"), "PermissionError: .*Permission denied"),
    ],
)
def test_what_can_go_wrong_on_the_way_in(hub: FolderHub, error, says):
    hub.error = error
    with pytest.raises(
        CheckpointError, match=rf"'lab/model' is no folder here, and cannot be fetched from the hub: {says}"
    ):
        PixNet.from_pretrained("lab/model")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(errors.HfHubHTTPError, 401), "the hub does not know you: log in"),
        (http_error(errors.HfHubHTTPError, 403), "you may not: log in"),
        (errors.LocalTokenNotFoundError("no token"), "nobody is logged in"),
        (ConnectionError("offline"), "Check the network"),
    ],
)
def test_what_can_go_wrong_on_the_way_out(hub: FolderHub, error, says):
    hub.error = error
    with pytest.raises(CheckpointError, match=rf"cannot be written to 'lab/model' on the hub: .*{says}"):
        make_model().push_to_hub("lab/model")


def test_an_option_that_nobody_has(hub: FolderHub):
    with pytest.raises(TypeError, match="licence"):
        make_model().push_to_hub("lab/model", licence="mit")


def test_saving_over_a_model_keeps_its_card(hub: FolderHub, caplog):
    folder = Path("saved")
    make_model().save_pretrained(folder)
    mine = folder / "README.md"
    make_model().save_pretrained(folder)  # the same weights: the card is still true
    assert not caplog.records
    before = mine.read_text(encoding="utf-8")
    make_model(1).save_pretrained(folder)
    assert mine.read_text(encoding="utf-8") == before
    assert "was not written for this model" in caplog.text


def test_a_full_disk_leaves_the_old_model(hub: FolderHub, monkeypatch):
    folder = Path("saved")
    old = make_model()
    old.save_pretrained(folder)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixnet_sd.model._checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        make_model(1).save_pretrained(folder)
    assert PixNet.load(folder).record == old.record


def test_save_and_push(hub: FolderHub):
    saved = make_model().save_pretrained("saved", repo_id="lab/model", push_to_hub=True, license="mit", private=True)
    assert saved == "hub://lab/model/commit/1"
    assert ModelCard.load(hub.root / "lab/model/README.md").data.license == "mit"
    assert Path("saved/config.json").exists()


def test_a_folder_goes_before_the_hub(hub: FolderHub):
    make_model().save_pretrained("lab/model")
    assert PixNet.from_pretrained("lab/model").genes == ["GENE0", "GENE1", "GENE2"]
    assert not hub.fetched
