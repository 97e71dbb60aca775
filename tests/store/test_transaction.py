"""Results enter an object complete or not at all; what others have put beside a store is reported, never followed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import geopandas.testing
import numpy as np
import pytest
import spatialdata as sd
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from spatialdata.models import Labels2DModel
from tests.store.conftest import assert_metadata_is_zarrs_own, assert_same_table, commit, contents, enter, user_files

from pixnet_sd.errors import StoreError
from pixnet_sd.store import (
    Expressed,
    RowInfo,
    chunks_as_given,
    circles_element,
    record,
    recover,
    region_table,
    work_folder,
)
from pixnet_sd.store.gene_map import image_transforms

OURS = ["spots", "pixnet_spots", "mask"]


def mask(value: int = 1):
    return Labels2DModel.parse(np.full((32, 32), value, dtype=np.uint8), dims=("y", "x"))


def results(sdata, scale=1):
    centres = np.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    values = np.arange(6, dtype=np.float32).reshape(3, 2) * scale
    circles = circles_element(centres, 4.0 * scale, image_transforms(sdata, "_full_image"))
    table = region_table(Expressed(values), RowInfo(circles.index, centres), ["A", "B"], region="spots")
    return {"spots": circles, "pixnet_spots": table, "mask": mask(scale)}


def assert_holds(sdata, expected):
    for name, element in expected.items():
        if name == "spots":
            geopandas.testing.assert_geodataframe_equal(sdata[name], element)
        elif name == "mask":
            np.testing.assert_array_equal(sdata[name].values, element.values)
        else:
            assert_same_table(sdata[name], element)


class Killed(BaseException):
    pass


class Commits(RuleBasedStateMachine):
    """Runs that write one store: some are killed at any step on the disk, some have an object that is out of date."""

    def __init__(self, written: Path) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.store = shutil.copytree(written, self.home / "slide.zarr")
        self.users = user_files(self.store)
        self.stale = sd.read_zarr(self.store)  # knows of nothing that is written since
        self.sdata = sd.read_zarr(self.store)
        self.now, self.next = {}, {}  # element → value, in the store and after recovery; equal unless a run was killed

    def teardown(self) -> None:
        if self.now == self.next and self.now:
            assert_metadata_is_zarrs_own(sd.read_zarr(self.store))
        shutil.rmtree(self.home)

    def write(self, sdata, names, value, overwrite=True):
        elements = {name: element for name, element in results(sdata, value).items() if name in names}
        notes = {"tables": {name: {"value": value} for name in names}}
        commit(sdata, elements, overwrite=overwrite, provenance=notes)

    def settle(self) -> None:
        """Learn from the notes, which are written last, whether a killed run had come so far to be finished."""
        if self.now != self.next:
            notes = sd.read_zarr(self.store).attrs.get("pixnet_sd", {}).get("tables", {})
            held = {name: note["value"] for name, note in notes.items()}
            assert held in (self.now, self.next)
            self.now = self.next = held

    names = st.sets(st.sampled_from(OURS), min_size=1)
    values = st.integers(1, 200)

    @rule(names=names, value=values, overwrite=st.booleans(), stale=st.booleans())
    def a_run_writes(self, names, value, overwrite, stale):
        sdata = self.stale if stale else self.sdata
        recover(sdata)
        self.settle()
        if not overwrite and names & self.now.keys():
            with pytest.raises(StoreError, match="|".join(names)):
                self.write(sdata, names, value, overwrite)
            return
        self.write(sdata, names, value, overwrite)
        self.now = self.next = self.now | dict.fromkeys(names, value)
        assert_holds(sdata, {name: results(sdata, value)[name] for name in names})

    @precondition(lambda self: self.now == self.next)
    @rule(names=names, value=values, n_steps=st.integers(0, 40))
    def a_run_is_killed(self, names, value, n_steps):
        left = n_steps
        steps = {name: getattr(os, name) for name in ("rename", "replace", "mkdir", "unlink", "rmdir")}

        def step_or_die(name, *args, **kwargs):
            nonlocal left
            if threading.current_thread() is threading.main_thread():
                left -= 1
                if left == -1:
                    raise Killed
                if left < 0:  # what is dead cleans nothing up
                    return None
            return steps[name](*args, **kwargs)

        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in steps:
                    patch.setattr(os, name, partial(step_or_die, name))
                self.write(self.sdata, names, value)
        except Killed:
            work = work_folder(self.store)
            if work.exists():  # the kernel frees the locks of what is dead
                shutil.copytree(work, self.home / "unlocked")
                shutil.rmtree(work)
                (self.home / "unlocked").rename(work)
            self.sdata = sd.read_zarr(self.store)
            self.next = self.now | dict.fromkeys(names, value)
            return
        self.now = self.next = self.now | dict.fromkeys(names, value)

    @rule(stale=st.booleans())
    def the_next_run_recovers(self, stale):
        sdata = self.stale if stale else self.sdata
        enter(sdata, {"other": "images"})
        self.settle()
        assert not work_folder(self.store).exists()

    @invariant()
    def the_store_opens_with_old_or_new_elements(self):
        found = sd.read_zarr(self.store)
        for name in OURS:
            either = {values[name] for values in (self.now, self.next) if name in values}
            if name in found:
                assert either
                matching = 0
                for value in either:
                    with contextlib.suppress(AssertionError):
                        assert_holds(found, {name: results(found, value)[name]})
                        matching += 1
                assert matching
            else:
                assert self.now != self.next or not either  # hidden only while it is replaced
        assert found.attrs["lab"] == {"name": "A"}
        assert user_files(self.store) == self.users


@pytest.mark.filterwarnings("ignore:The table is annotating")
def test_commits_of_any_runs(written):
    options = settings(max_examples=4, stateful_step_count=6, deadline=None)
    run_state_machine_as_test(lambda: Commits(written), settings=options)


@pytest.mark.parametrize("n_steps", [11, 16, 17, 22, 23, 28, 31, 32])  # before and after what counts
def test_a_kill_while_elements_are_moved(written, n_steps):
    runs = Commits(written)
    runs.a_run_writes({"spots", "mask"}, 1, overwrite=False, stale=False)
    runs.a_run_is_killed({"mask"}, 2, n_steps)
    runs.the_store_opens_with_old_or_new_elements()
    runs.the_next_run_recovers(stale=True)
    runs.the_store_opens_with_old_or_new_elements()
    runs.teardown()


@pytest.mark.filterwarnings("ignore:The table is annotating")
def test_round_trip_and_spatialdata_goes_on(slide, in_memory):
    before, expected = user_files(slide.path), results(slide)
    commit(slide, expected, provenance={"tables": {"pixnet_spots": {"radius_um": 8}}})
    for sdata in (slide, sd.read_zarr(slide.path)):
        assert_holds(sdata, expected)
        assert sdata.attrs["pixnet_sd"]["tables"] == {"pixnet_spots": {"radius_um": 8}}
        assert sdata.attrs["pixnet_sd"].keys() == {"tables", "written"}
    assert all(str(slide.path / "labels/mask") in file for file in sd.get_dask_backing_files(slide["mask"]))
    assert json.loads((slide.path / "labels/zarr.json").read_text())["attributes"]["ome"]["labels"] == ["mask"]
    assert_metadata_is_zarrs_own(slide)
    slide.shapes["more"] = in_memory.shapes["cells"]
    slide.write_element("more")
    slide.delete_element_from_disk("spots")
    names = {name for _, name, _ in sd.read_zarr(slide.path).gen_elements()}
    assert names == {"_full_image", "cells", "table", "more", "mask", "pixnet_spots"}
    assert user_files(slide.path) == before


def test_a_store_without_consolidated_metadata_stays_so(in_memory, tmp_path):
    with chunks_as_given():
        in_memory.write(tmp_path / "plain.zarr", consolidate_metadata=False)
    sdata = sd.read_zarr(tmp_path / "plain.zarr")
    commit(sdata, results(sdata))
    assert not sdata.has_consolidated_metadata()
    assert_holds(sd.read_zarr(sdata.path), results(sdata))


def test_in_memory(in_memory):
    for scale in (1, 2):
        commit(in_memory, results(in_memory, scale), overwrite=scale > 1)
        assert_holds(in_memory, results(in_memory, scale))
    with pytest.raises(StoreError, match="spots"):
        commit(in_memory, results(in_memory))


def test_failure_while_preparing_leaves_nothing(slide, monkeypatch):
    files = contents(slide.path)
    monkeypatch.setattr(sd.SpatialData, "write", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left"):
        commit(slide, results(slide))
    assert contents(slide.path) == files
    assert not work_folder(slide.path).exists()
    assert "spots" not in slide


def cut_off(sdata, monkeypatch, elements=None, *, at: str = "mask") -> None:
    """A commit that fails while it moves its results in, and leaves its journal."""
    rename = Path.rename

    def failing(self, target):
        if Path(target).parent.parent == sdata.path and Path(target).name == at:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(StoreError, match="Input/output"):
            commit(sdata, elements or {"mask": mask()})
    assert (work_folder(sdata.path) / "journal.json").is_file()


def test_recovery_leaves_alone_what_the_user_wrote_meanwhile(slide, in_memory, monkeypatch):
    cut_off(slide, monkeypatch, results(slide), at="spots")
    mine = sd.read_zarr(slide.path)
    mine.shapes["spots"] = in_memory.shapes["cells"]
    mine.write_element("spots")
    recover(mine)
    assert_holds(sd.read_zarr(slide.path), results(slide) | {"spots": in_memory.shapes["cells"]})


@pytest.fixture
def thesis(tmp_path) -> Path:
    """A folder of the user that has nothing to do with the store."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("ten years of work")
    return tmp_path / "thesis"


def refused(sdata, thesis: Path, names: str) -> None:
    """Every way in is closed, with an error that says what to look at; nothing has changed."""
    before = contents(sdata.path)
    for way_in in (lambda: enter(sdata, {"other": "images"}), lambda: recover(sdata)):
        with pytest.raises(StoreError, match=names):
            way_in()
    assert contents(sdata.path) == before
    assert contents(thesis) == {"chapter": b"ten years of work"}


MOVE = {"name": "../../thesis", "kind": "images", "place": "commit/new.zarr", "replaces": False}
FORGED = {"moves": [MOVE], "nodes": {}, "groups": {}, "notes": {}}
JOURNALS = ["", '{"journal": {', "[1]", "\0\0\0", "{}", '{"journal": [], "signature": null}', json.dumps(FORGED)]


def test_planted_or_damaged_journal(slide, thesis):
    enter(slide, {})  # the user has a secret
    work_folder(slide.path).mkdir()
    for text in (*JOURNALS, json.dumps({"journal": FORGED, "signature": "0" * 64})):
        (work_folder(slide.path) / "journal.json").write_text(text)
        refused(slide, thesis, r"journal\.json")


def test_changed_journal(slide, thesis, monkeypatch, tmp_path):
    cut_off(slide, monkeypatch)
    path = work_folder(slide.path) / "journal.json"
    genuine = path.read_text()
    for change in ("name", "kind", "place", "notes"):
        journal = json.loads(genuine)["journal"]
        (journal["notes"] if change == "notes" else journal["moves"][0])[change] = "../../thesis"
        path.write_text(json.dumps(json.loads(genuine) | {"journal": journal}))
        refused(slide, thesis, r"journal\.json")
        path.write_text(genuine)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of another"))
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
def test_planted_among_unfinished_work(slide, thesis, name):
    path = work_folder(slide.path) / name
    path.parent.mkdir(parents=True)
    path.symlink_to(thesis if "." not in name else thesis / "chapter")
    refused(slide, thesis, path.name)
    path.unlink()
    os.mkfifo(path)
    refused(slide, thesis, path.name)


@pytest.mark.parametrize("what", ["link", "dangling", "file", "of another user"])
def test_planted_in_place_of_the_work_folder(slide, thesis, what):
    work = work_folder(slide.path)
    if what == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        work.mkdir()
        os.chown(work, 12345, 12345)
    elif what == "file":
        work.write_text("")
    else:
        work.symlink_to(thesis if what == "link" else thesis / "new")
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
        enter(slide, {"other": "images"})
    assert contents(thesis) == {"chapter": b"ten years of work"}


@pytest.mark.parametrize("trouble", [None, "no home", "open to others", "link", "short"])
def test_secret_is_kept_where_nobody_else_can_write(slide, state, monkeypatch, tmp_path, trouble):
    """Where the home will not do, the folder for temporary files does; what others may have written is not believed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if trouble == "no home":
        state.write_text("not a folder")
    else:
        enter(slide, {})
        (key,) = (path for path in state.rglob("*") if path.is_file())
        assert (stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(key.parent.stat().st_mode)) == (0o600, 0o700)
        if trouble == "open to others":
            key.chmod(0o644)
        elif trouble == "short":
            key.write_bytes(b"abc")
        elif trouble == "link":
            key.rename(tmp_path / "key")
            key.symlink_to(tmp_path / "key")
    cut_off(slide, monkeypatch)
    recover(slide)
    assert_holds(sd.read_zarr(slide.path), {"mask": mask()})
    assert bool(list(tmp_path.glob("pixnet_sd-*/*"))) == (trouble is not None)
