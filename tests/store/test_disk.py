"""The folder behind an object: whether it can be written to, under which names, who else is at it, and its notes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import spatialdata as sd
import zarr
from tests.store.conftest import enter, user_files

from pixnet_sd.errors import StoreError
from pixnet_sd.store import Transaction, hold_lock, local_store, record, recorded, work_folder


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, partial(zarr.create_group, zarr_format=2), os.path.exists])
def test_stores_that_cannot_be_written_to(in_memory, tmp_path, make):
    """An archive, a folder, an old format, and none at all."""
    assert local_store(in_memory) is None
    in_memory.path = tmp_path / "elsewhere.zarr"
    make(in_memory.path)
    with pytest.raises(StoreError, match=r"elsewhere\.zarr"):
        local_store(in_memory)


def test_too_little_disk_or_too_few_files(slide, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10 * 10**9))
    enter(slide, {"pixnet_map": "images"}, n_bytes=int(9.5e9))
    with pytest.raises(StoreError, match=r"10\.29 GB.*10\.00 GB"):
        enter(slide, {"pixnet_map": "images"}, n_bytes=int(9.8e9))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=1000, f_favail=5))
    with pytest.raises(StoreError, match="6 files"), Transaction(slide, {}) as out:
        out.check_room(0, 6)
    assert not work_folder(slide.path).exists()


@pytest.mark.parametrize("locked", ["", "s.zarr", "s.zarr/tables"])
def test_folders_that_cannot_be_written(slide, locked, monkeypatch):
    """As an ordinary user, also when the tests run as root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setenv("XDG_STATE_HOME", f"{name}/state")
        slide.path = shutil.copytree(slide.path, Path(name) / "s.zarr")
        for folder in (Path(name), slide.path, *(path for path in slide.path.rglob("*") if path.is_dir())):
            folder.chmod(0o777)
        target, user = Path(name) / locked, os.geteuid()
        target.chmod(0o555)
        os.seteuid(user or 65534)
        try:
            with pytest.raises(StoreError, match=rf"{target} cannot be written \(Permission denied"):
                enter(slide, {"x": "images"})
        finally:
            os.seteuid(user)
            target.chmod(0o777)
        enter(slide, {"x": "images"})


def test_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    path = tmp_path / "work" / "lock"
    with hold_lock(path, wait_s=1, busy="busy"), pytest.raises(StoreError, match="another run"):
        hold_lock(path, wait_s=0.05, busy="another run").__enter__()
    with hold_lock(path, wait_s=0.05, busy="busy"):
        assert path.exists()
    assert not path.parent.exists()


def test_names(in_memory):
    enter(in_memory, {"pixnet_map": "images", "pixnet.cells-8um": "tables", "gène²": "labels"})
    enter(in_memory, {"_full_image": "images"}, overwrite=True)
    for name in ("a b", "", "..", "__x", "a/b", "gène*", "a\n"):
        with pytest.raises(StoreError, match="name of an element"):
            enter(in_memory, {name: "images"})
    for names, overwrite in (
        ({"_full_image": "images"}, False),
        ({"cells": "tables"}, True),  # of another type
        ({"CELLS": "shapes"}, True),  # the same file on some systems
        ({"new": "shapes", "NEW": "tables"}, False),
    ):
        with pytest.raises(StoreError, match="|".join(names)):
            enter(in_memory, names, overwrite=overwrite)


def test_names_only_on_disk_or_only_in_memory_are_taken(slide, in_memory):
    del slide.shapes["cells"]
    slide.shapes["drawn"] = in_memory.shapes["cells"]
    for name, kind in (("cells", "shapes"), ("drawn", "tables")):
        with pytest.raises(StoreError, match=name):
            enter(slide, {name: kind})


def test_notes_survive_the_round_trip_and_nothing_else_of_the_users_is_written(slide):
    before, other = user_files(slide.path), sd.read_zarr(slide.path)
    work = work_folder(slide.path)
    (work / ".pixnet_sd-0123.partial").mkdir(parents=True)  # the draft of a run that was killed
    slide.attrs["unsavable"] = object()
    slide.attrs["pixnet_sd"] = {"mpp": {"mine": 0.5}}
    record(slide, "mpp", "_full_image", np.float32(0.25))
    record(slide, "maps", "a", {"genes": np.array(["x"]), "path": Path("/m"), "pcc": float("nan"), "t": (1, 2)})
    record(other, "maps", "b", {})
    record(slide, "model", None, Path("/m"))
    again = sd.read_zarr(slide.path)
    for sdata in (slide, again):
        assert recorded(sdata, "mpp") == {"mine": 0.5, "_full_image": 0.25}
        assert recorded(sdata, "maps") == {"a": {"genes": ["x"], "path": "/m", "pcc": None, "t": [1, 2]}, "b": {}}
        assert recorded(sdata, "model") == "/m"
        assert recorded(sdata, "tables", "c") is None
    assert again.attrs.keys() >= {"lab"}
    assert again.has_consolidated_metadata()
    assert "unsavable" not in json.loads((slide.path / "zarr.json").read_text())["attributes"]
    assert user_files(slide.path) == before
    assert not work.exists()


def test_notes_in_memory_and_what_cannot_be_noted(in_memory):
    record(in_memory, "mpp", "_full_image", 0.5)
    with pytest.raises(StoreError, match="it is not JSON"):
        record(in_memory, "maps", "a", object())
    assert in_memory.attrs["pixnet_sd"] == {"mpp": {"_full_image": 0.5}}
    in_memory.attrs["pixnet_sd"] = "mine"
    with pytest.raises(StoreError, match="keeps a dict there"):
        record(in_memory, "maps", "a", 1)
