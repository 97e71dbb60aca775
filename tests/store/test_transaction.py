"""Results enter an object complete or not at all; what others have put beside a store is reported, never followed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import geopandas.testing
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import Labels2DModel

from pixnet_sd.errors import StoreError
from pixnet_sd.store import Expressed, RowInfo, Transaction, circles_element, record, recover, region_table, work_folder
from pixnet_sd.store.gene_map import image_transforms


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


def results(sdata, scale=1.0):
    centres = np.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    values = np.arange(6, dtype=np.float32).reshape(3, 2) * scale
    circles = circles_element(centres, 4.0 * scale, image_transforms(sdata, "_full_image"))
    table = region_table(Expressed(values), RowInfo(circles.index, centres), ["A", "B"], region="spots")
    return {"spots": circles, "pixnet_spots": table, "mask": mask(int(scale))}


def mask(value: int = 1):
    return Labels2DModel.parse(np.full((32, 32), value, dtype=np.uint8), dims=("y", "x"))


NAMES = {"spots": "shapes", "pixnet_spots": "tables", "mask": "labels"}


def commit(sdata, elements, *, overwrite=False, **options):
    with Transaction(sdata, {name: NAMES[name] for name in elements}, overwrite=overwrite) as out:
        out.commit(elements, **options)


def enter(sdata):
    with Transaction(sdata, {"other": "images"}):
        pass


def assert_holds(sdata, expected):
    for name, element in expected.items():
        if name == "spots":
            geopandas.testing.assert_geodataframe_equal(sdata[name], element)
        elif name == "mask":
            np.testing.assert_array_equal(sdata[name].values, element.values)
        else:
            np.testing.assert_array_equal(sdata[name].X, element.X)
            pd.testing.assert_frame_equal(sdata[name].obs, element.obs)
            assert sdata[name].uns["spatialdata_attrs"] == element.uns["spatialdata_attrs"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(slide, user_files):
    before, expected = user_files(slide.path), results(slide)
    commit(slide, expected, provenance={"tables": {"pixnet_spots": {"radius_um": 8}}})
    again = sd.read_zarr(slide.path)
    for sdata in (slide, again):
        assert_holds(sdata, expected)
        assert sdata.attrs["pixnet_sd"]["tables"] == {"pixnet_spots": {"radius_um": 8}}
        assert sdata.attrs["pixnet_sd"].keys() == {"tables", "written"}
    assert all(str(slide.path / "labels/mask") in file for file in sd.get_dask_backing_files(slide["mask"]))
    with pytest.raises(StoreError, match="spots"):
        commit(slide, results(slide, 2.0))
    commit(slide, results(slide, 2.0), overwrite=True)
    for sdata in (slide, sd.read_zarr(slide.path)):
        assert_holds(sdata, results(slide, 2.0))
    assert user_files(slide.path) == before
    assert not work_folder(slide.path).exists()
    assert json.loads((slide.path / "labels/zarr.json").read_text())["attributes"]["ome"]["labels"] == ["mask"]
    ours = json.loads((slide.path / "zarr.json").read_text())
    again.write_consolidated_metadata()
    assert json.loads((slide.path / "zarr.json").read_text()) == ours


def test_spatialdata_can_go_on_with_the_store(slide, in_memory):
    commit(slide, results(slide))
    slide.shapes["more"] = in_memory.shapes["cells"]
    slide.write_element("more")
    slide.delete_element_from_disk("spots")
    again = sd.read_zarr(slide.path)
    assert {"more", "mask", "pixnet_spots"} <= {name for _, name, _ in again.gen_elements()}
    assert "spots" not in again


def test_a_store_without_consolidated_metadata_stays_so(in_memory, tmp_path):
    in_memory.write(tmp_path / "plain.zarr", consolidate_metadata=False)
    sdata = sd.read_zarr(tmp_path / "plain.zarr")
    commit(sdata, results(sdata))
    assert not sdata.has_consolidated_metadata()
    assert_holds(sd.read_zarr(sdata.path), results(sdata))


def test_in_memory(in_memory):
    for scale in (1.0, 2.0):
        commit(in_memory, results(in_memory, scale), overwrite=scale > 1)
        assert_holds(in_memory, results(in_memory, scale))
    with pytest.raises(StoreError, match="spots"):
        commit(in_memory, results(in_memory))


def test_failure_while_preparing_leaves_nothing(slide, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    files = contents(slide.path)
    monkeypatch.setattr(sd.SpatialData, "write", full)
    with pytest.raises(StoreError, match="No space left"):
        commit(slide, results(slide))
    assert contents(slide.path) == files
    assert not work_folder(slide.path).exists()
    assert "spots" not in slide


def cut_off(sdata, monkeypatch, elements=None, *, at: str = "mask", **options) -> None:
    """A commit that fails while it moves its results in, and leaves its journal."""
    rename = Path.rename

    def failing(self, target):
        if Path(target).parent.parent == sdata.path and Path(target).name == at:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(StoreError, match="Input/output"):
            commit(sdata, elements or {"mask": mask()}, **options)
    assert (work_folder(sdata.path) / "journal.json").is_file()


@pytest.mark.parametrize("at", ["spots", "pixnet_spots", "mask"])
def test_failure_while_moving_is_finished_by_the_next_run(slide, monkeypatch, at):
    commit(slide, results(slide))
    cut_off(slide, monkeypatch, results(slide, 2.0), at=at, overwrite=True)
    halfway = sd.read_zarr(slide.path)  # the store opens, without what is being replaced
    assert not {"spots", "mask", "pixnet_spots"} & {name for _, name, _ in halfway.gen_elements()}
    enter(halfway)
    for sdata in (halfway, sd.read_zarr(slide.path)):
        assert_holds(sdata, results(slide, 2.0))
    assert not work_folder(slide.path).exists()


def test_recovery_leaves_alone_what_the_user_wrote_meanwhile(slide, in_memory, monkeypatch):
    cut_off(slide, monkeypatch, results(slide), at="spots")
    mine = sd.read_zarr(slide.path)
    mine.shapes["spots"] = in_memory.shapes["cells"]
    mine.write_element("spots")
    enter(mine)
    again = sd.read_zarr(slide.path)
    assert_holds(again, results(slide) | {"spots": in_memory.shapes["cells"]})


def test_leftovers_of_a_run_killed_before_its_journal_are_swept(slide, monkeypatch):
    work = work_folder(slide.path)
    (work / "commit" / "new.zarr" / "labels").mkdir(parents=True)
    (work / "old" / "images").mkdir(parents=True)
    (work / "map-x").mkdir()
    (work / ".pixnet_sd-abc.partial").mkdir()
    enter(slide)
    assert not work.exists()


def refused(sdata, thesis: Path, names: str) -> None:
    """Every way in is closed, with an error that says what to look at; nothing has changed."""
    before = contents(sdata.path)
    for way_in in (lambda: enter(sdata), lambda: recover(sdata)):
        with pytest.raises(StoreError, match=names):
            way_in()
    assert contents(sdata.path) == before
    assert contents(thesis) == {"chapter": b"ten years of work"}


MOVE = {"name": "../../thesis", "kind": "images", "place": "commit/new.zarr", "replaces": False}
FORGED = {"moves": [MOVE], "nodes": {}, "groups": {}, "notes": {}}
JOURNALS = ["", '{"journal": {', "[1]", "\0\0\0", "{}", '{"journal": [], "signature": null}', json.dumps(FORGED)]


@pytest.mark.parametrize("text", [*JOURNALS, json.dumps({"journal": FORGED, "signature": "0" * 64})])
def test_planted_or_damaged_journal(slide, thesis, text):
    enter(slide)  # the user has a secret
    work_folder(slide.path).mkdir()
    (work_folder(slide.path) / "journal.json").write_text(text)
    refused(slide, thesis, r"journal\.json")


@pytest.mark.parametrize("change", ["name", "kind", "place", "notes", "another user"])
def test_changed_journal(slide, thesis, monkeypatch, tmp_path, change):
    cut_off(slide, monkeypatch)
    path = work_folder(slide.path) / "journal.json"
    journal = json.loads(path.read_text())
    if change == "another user":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of another"))
    elif change == "notes":
        journal["journal"]["notes"]["model"] = "/somewhere/else"
    else:
        journal["journal"]["moves"][0][change] = "../../thesis"
    path.write_text(json.dumps(journal))
    refused(slide, thesis, r"journal\.json")


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_store_elsewhere(slide, thesis, monkeypatch, tmp_path, how):
    """A copy, with its journal, may be anything by now; a store that was moved is finished, as the original is."""
    cut_off(slide, monkeypatch)
    home, work = tmp_path / "elsewhere", work_folder(slide.path)
    home.mkdir()
    for folder in (slide.path, work):
        (shutil.copytree if how == "copied" else Path.rename)(folder, home / folder.name)
    there = sd.read_zarr(home / slide.path.name)
    if how == "copied":
        refused(there, thesis, r"journal\.json")
        there = slide
    recover(there)
    assert_holds(sd.read_zarr(there.path), {"mask": mask()})


@pytest.mark.parametrize("name", ["lock", "journal.json", "commit", "map-x", "map-x/map.zarr", "table-x/sums.f32"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_planted_among_unfinished_work(slide, thesis, name, kind):
    path = work_folder(slide.path) / name
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(thesis if "." not in name else thesis / "chapter")
    else:
        os.mkfifo(path)
    refused(slide, thesis, path.name)


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "of another user"])
def test_planted_in_place_of_the_work_folder(slide, thesis, kind):
    work = work_folder(slide.path)
    if kind == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        work.mkdir()
        os.chown(work, 12345, 12345)
    elif kind == "file":
        work.write_text("")
    else:
        work.symlink_to(thesis if kind == "link" else thesis / "new")
    refused(slide, thesis, r"\.slide\.zarr\.pixnet_sd")
    with pytest.raises(StoreError):
        record(slide, "model", None, "m")


def test_links_on_the_way_of_a_genuine_journal(slide, thesis, monkeypatch):
    """The journal is right, but the folders that it moves are swapped for links."""
    cut_off(slide, monkeypatch)
    scratch = work_folder(slide.path) / "commit" / "new.zarr" / "labels"
    shutil.rmtree(scratch)
    scratch.symlink_to(thesis)
    refused(slide, thesis, "labels")


def test_links_in_the_store(slide, thesis):
    """An element that is a link is replaced, not followed; an element folder that is one is refused."""
    commit(slide, {"mask": mask()})
    shutil.rmtree(slide.path / "labels/mask")
    (slide.path / "labels/mask").symlink_to(thesis)
    commit(slide, {"mask": mask(2)}, overwrite=True)
    assert_holds(sd.read_zarr(slide.path), {"mask": mask(2)})
    shutil.rmtree(slide.path / "labels")
    (slide.path / "labels").symlink_to(thesis)
    with pytest.raises(StoreError, match="labels"):
        enter(slide)
    assert contents(thesis) == {"chapter": b"ten years of work"}


def secret_of(state: Path) -> Path:
    (key,) = (path for path in state.rglob("*") if path.is_file())
    return key


def test_secret(slide, state):
    commit(slide, {"mask": mask()})
    key = secret_of(state)
    assert (stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(key.parent.stat().st_mode)) == (0o600, 0o700)
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
        enter(slide)
        key = secret_of(state)
        if trouble == "open to others":
            key.chmod(0o644)
        elif trouble == "short":
            key.write_bytes(b"abc")
        else:
            key.rename(tmp_path / "key")
            key.symlink_to(tmp_path / "key")
    cut_off(slide, monkeypatch)
    recover(slide)
    assert_holds(sd.read_zarr(slide.path), {"mask": mask()})
    assert list(tmp_path.glob("pixnet_sd-*/*"))
