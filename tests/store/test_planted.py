"""What an archive or another user may have put beside a store: it is reported, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Labels2DModel

from pixnet_sd.errors import StoreError
from pixnet_sd.store import check_target, commit, record, recover
from pixnet_sd.store.gene_map import GeneMapWriter


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    """A folder for the user's secret."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def thesis(tmp_path) -> Path:
    """A folder of the user that has nothing to do with the store."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("ten years of work")
    return tmp_path / "thesis"


def work_of(sdata) -> Path:
    return sdata.path.parent / f".{sdata.path.name}.pixnet_sd"


def mask(value: int = 1):
    return Labels2DModel.parse(np.full((32, 32), value, dtype=np.uint8), dims=("y", "x"))


def cut_off(sdata, monkeypatch, *, at: str = "mask", **options) -> None:
    """A commit that fails while it moves its result in, and leaves its journal."""
    rename = Path.rename

    def failing(self, target):
        if Path(target).parent.parent == sdata.path and Path(target).name == at:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(StoreError, match="next run"):
            commit(sdata, {at: mask()}, **options)
    assert (work_of(sdata) / "journal.json").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(sdata, thesis: Path, names: str) -> None:
    """Every way in is closed, with an error that says what to look at; nothing has changed."""
    before = contents(sdata.path)
    for enter in (lambda: check_target(sdata, {"other": "images"}), lambda: commit(sdata, {"other": mask()})):
        with pytest.raises(StoreError, match=names):
            enter()
    assert contents(sdata.path) == before
    assert contents(thesis) == {"chapter": b"ten years of work"}


OLD = {"moves": [], "nodes": {}, "groups": {}, "notes": {}, "cleanup": ["../thesis", "../../thesis"]}
MOVE = {"name": "x", "kind": "images", "source": "../thesis", "replaces": False}
PLANTED = {
    "cleanup elsewhere": OLD,
    "move from elsewhere": OLD | {"cleanup": [], "moves": [MOVE]},
    "move to elsewhere": OLD | {"cleanup": [], "moves": [MOVE | {"name": "../../thesis", "source": "commit/x"}]},
    "signed by nobody": {"journal": OLD, "signature": "0" * 64},
    "of other types": {"journal": [], "signature": None},
    "empty": {},
}


@pytest.mark.parametrize("journal", PLANTED.values(), ids=PLANTED)
def test_planted_journal(slide, thesis, journal):
    check_target(slide, {"other": "images"})  # the user has a secret
    work_of(slide).mkdir()
    (work_of(slide) / "journal.json").write_text(json.dumps(journal))
    refused(slide, thesis, r"\.slide\.zarr\.pixnet_sd")
    with pytest.raises(StoreError):
        recover(slide)


@pytest.mark.parametrize("text", ["", '{"journal": {', "[1]", "\0\0\0"], ids=["empty", "cut", "list", "zeros"])
def test_damaged_journal(slide, thesis, text):
    work_of(slide).mkdir()
    (work_of(slide) / "journal.json").write_text(text)
    refused(slide, thesis, r"journal\.json")


@pytest.mark.parametrize("change", ["name", "kind", "place", "notes"])
def test_changed_journal(slide, thesis, monkeypatch, change):
    cut_off(slide, monkeypatch)
    path = work_of(slide) / "journal.json"
    journal = json.loads(path.read_text())
    if change == "notes":
        journal["journal"]["notes"]["model"] = "/somewhere/else"
    else:
        journal["journal"]["moves"][0][change] = "../../thesis"
    path.write_text(json.dumps(journal))
    refused(slide, thesis, r"journal\.json")


def test_journal_of_another_store(slide, thesis, monkeypatch, tmp_path):
    """A copy, with its journal, may be anything by now; the store itself is finished."""
    cut_off(slide, monkeypatch)
    copy = tmp_path / "elsewhere" / "slide.zarr"
    shutil.copytree(slide.path, copy)
    shutil.copytree(work_of(slide), copy.parent / work_of(slide).name)
    refused(sd.read_zarr(copy), thesis, r"journal\.json")
    recover(slide)
    assert "mask" in sd.read_zarr(slide.path)
    assert not work_of(slide).exists()


def test_journal_of_another_user(slide, thesis, monkeypatch, tmp_path):
    cut_off(slide, monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of another"))
    refused(slide, thesis, r"journal\.json")


def test_a_moved_store_is_finished(slide, monkeypatch, tmp_path):
    cut_off(slide, monkeypatch)
    home = tmp_path / "elsewhere"
    home.mkdir()
    slide.path.rename(home / "slide.zarr")
    work_of(slide).rename(home / work_of(slide).name)
    moved = sd.read_zarr(home / "slide.zarr")
    recover(moved)
    assert (moved.labels["mask"].values == 1).all()


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


INSIDE = [
    "lock",
    "journal.json",
    "commit",
    "old",
    "map-x",
    "table-x",
    "map-x/map.zarr",
    "table-x/sums.f32",
    "a.json.tmp",
]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_planted_among_unfinished_work(slide, thesis, name, kind):
    path = work_of(slide) / name
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(thesis if "." not in name else thesis / "chapter")
    else:
        os.mkfifo(path)
    refused(slide, thesis, path.name)


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_planted_in_place_of_the_work_folder(slide, thesis, kind):
    if kind == "file":
        work_of(slide).write_text("")
    else:
        work_of(slide).symlink_to(thesis if kind == "link" else thesis / "new")
    refused(slide, thesis, r"\.slide\.zarr\.pixnet_sd is a")
    with pytest.raises(StoreError):
        record(slide, "model", None, "m")


def test_links_on_the_way_of_a_genuine_journal(slide, thesis, monkeypatch):
    """The journal is right, but the folders that it moves are swapped for links."""
    cut_off(slide, monkeypatch)
    scratch = work_of(slide) / "commit" / "new.zarr" / "labels"
    shutil.rmtree(scratch)
    scratch.symlink_to(thesis)
    refused(slide, thesis, "labels is a link")


@pytest.mark.parametrize("where", ["labels", "labels/mask"])
def test_links_in_the_store(slide, thesis, where):
    """An element folder that is a link is refused; an element that is one is replaced, not followed."""
    if where == "labels":
        link(slide.path / where, thesis)
        refused(slide, thesis, "labels is a link")
        return
    commit(slide, {"mask": mask()})
    shutil.rmtree(slide.path / where)
    link(slide.path / where, thesis)
    commit(slide, {"mask": mask(2)}, overwrite=True)
    assert contents(thesis) == {"chapter": b"ten years of work"}
    assert (sd.read_zarr(slide.path).labels["mask"].values == 2).all()


def test_log_with_anything_in_it(slide):
    def opened():
        return GeneMapWriter.open(
            slide, key="m", genes=["A"], shape=(64, 64), pitch_image_px=4.0, image_key="_full_image", fingerprint="f"
        )

    writer = opened()
    (block,) = writer.blocks
    writer.write(block, np.ones((1, 64, 64), np.float32))
    writer.close()
    with (work_of(slide) / "map-m" / "done.log").open("ab") as file:
        file.write(b"\na b c .\n1 2 .\n-1 0 5 .\n\xff\x00 . . .\n")
    with opened() as writer:
        assert writer.resumed
        assert writer.pending == []


def test_work_of_another_user(slide, thesis):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    work_of(slide).mkdir()
    os.chown(work_of(slide), 12345, 12345)
    refused(slide, thesis, "12345")


def test_secret(slide, state, monkeypatch, tmp_path):
    commit(slide, {"mask": mask()})
    (key,) = (path for path in state.rglob("*") if path.is_file())
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    first = key.read_bytes()
    commit(slide, {"mask": mask(2)}, overwrite=True)
    assert key.read_bytes() == first


@pytest.mark.parametrize("trouble", ["no home", "open to others", "link", "short"])
def test_secret_that_cannot_be_kept_at_home(slide, state, monkeypatch, tmp_path, trouble):
    """The folder for temporary files does; what others may have written is never believed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if trouble == "no home":
        state.write_text("not a folder")
    else:
        check_target(slide, {"other": "images"})
        (key,) = (path for path in state.rglob("*") if path.is_file())
        if trouble == "open to others":
            key.chmod(0o644)
        elif trouble == "short":
            key.write_bytes(b"abc")
        else:
            key.rename(tmp_path / "key")
            key.symlink_to(tmp_path / "key")
    cut_off(slide, monkeypatch)
    recover(slide)
    assert "mask" in sd.read_zarr(slide.path)
    assert list(tmp_path.glob("pixnet_sd-*/*"))
