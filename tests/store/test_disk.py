"""The folder behind an object: whether it can be written to, under which names, and who else is at it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import zarr
from tests.store.putting import enter

from pixnet_sd.errors import StoreError
from pixnet_sd.store import hold_lock, local_store


def test_memory_has_no_store(in_memory):
    assert local_store(in_memory) is None


@pytest.mark.parametrize("what", ["archive", "old format", "away", "no store"])
def test_stores_that_cannot_be_written_to(slide, tmp_path, what):
    slide.path = tmp_path / "elsewhere.zarr"
    if what == "archive":
        slide.path.touch()
    elif what == "old format":
        zarr.create_group(slide.path, zarr_format=2)
    elif what == "no store":
        slide.path.mkdir()
    with pytest.raises(StoreError, match=r"elsewhere\.zarr"):
        local_store(slide)


def test_disk_too_small_says_needed_and_free(slide, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10 * 10**9))
    enter(slide, {"pixnet_map": "images"}, n_bytes=int(9.5e9))
    with pytest.raises(StoreError, match=r"10\.29 GB.*10\.00 GB"):
        enter(slide, {"pixnet_map": "images"}, n_bytes=int(9.8e9))


def test_read_only_file_system(slide, monkeypatch):
    real = tempfile.TemporaryFile

    def refuse(*args, dir, **kwargs):
        if Path(dir) == Path(slide.path) / "tables":
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match=r"tables.*Read-only file system"):
        enter(slide, {"x": "images"})


@pytest.mark.parametrize("locked", ["store", "parent"])
def test_real_permissions(slide, locked, monkeypatch):
    """As an ordinary user, also when the tests run as root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        monkeypatch.setenv("XDG_STATE_HOME", f"{name}/state")
        store = Path(name) / "s.zarr"
        shutil.copytree(slide.path, store)
        for folder in (store, *(p for p in store.rglob("*") if p.is_dir())):
            folder.chmod(0o777)
        slide.path = store
        target = store if locked == "store" else Path(name)
        root = os.geteuid() == 0
        target.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=target.name):
                enter(slide, {"x": "images"})
        finally:
            if root:
                os.seteuid(0)
            target.chmod(0o777)
        enter(slide, {"x": "images"})


def test_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    path = tmp_path / "work" / "lock"
    with hold_lock(path, wait_s=1, busy="busy"), pytest.raises(StoreError, match="another run"):
        hold_lock(path, wait_s=0.05, busy="another run").__enter__()
    with hold_lock(path, wait_s=0.05, busy="busy"):
        assert path.exists()
    assert not path.parent.exists()


def test_free_names_pass(slide):
    enter(slide, {"pixnet_map": "images", "pixnet.cells-8um": "tables"})
    enter(slide, {"_full_image": "images"}, overwrite=True)


@pytest.mark.parametrize("name", ["a b", "", "..", "__x", "a/b", "gène*"])
def test_names_that_spatialdata_refuses(slide, name):
    with pytest.raises(StoreError, match="name of an element"):
        enter(slide, {name: "images"})


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ({"_full_image": "images"}, {}),
        ({"cells": "tables"}, {"overwrite": True}),  # of another type
        ({"CELLS": "shapes"}, {"overwrite": True}),  # the same file on some systems
        ({"new": "shapes", "NEW": "tables"}, {}),
    ],
)
def test_taken_names(slide, names, options):
    with pytest.raises(StoreError, match="|".join(names)):
        enter(slide, names, **options)


def test_names_only_on_disk_or_only_in_memory_are_taken(slide, in_memory):
    del slide.shapes["cells"]
    slide.shapes["drawn"] = in_memory.shapes["cells"]
    for name, kind in (("cells", "shapes"), ("drawn", "tables")):
        with pytest.raises(StoreError, match=name):
            enter(slide, {name: kind})
