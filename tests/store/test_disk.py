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
from pixnet_sd.store._disk import check_free_disk, check_writable


def test_memory_has_no_store(in_memory):
    assert local_store(in_memory) is None


def test_archives_and_remote_stores_are_refused(slide, tmp_path):
    slide.path = tmp_path / "elsewhere.zarr.zip"
    slide.path.touch()
    with pytest.raises(StoreError, match="not a local folder"):
        local_store(slide)


def test_old_format_is_refused(slide, tmp_path):
    zarr.create_group(tmp_path / "old.zarr", zarr_format=2)
    slide.path = tmp_path / "old.zarr"
    with pytest.raises(StoreError, match=r"Zarr v3.*sdata.write"):
        local_store(slide)


def test_disk_too_small_says_needed_and_free(slide, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10 * 10**9))
    check_free_disk(slide.path, int(9.5e9))
    with pytest.raises(StoreError, match=r"10\.29 GB, but only 10\.00 GB"):
        enter(slide, {"pixnet_map": "images"}, n_bytes=int(9.8e9))


def test_read_only_file_system(slide, monkeypatch):
    real = tempfile.TemporaryFile

    def refuse(*args, dir, **kwargs):
        if Path(dir) == Path(slide.path) / "tables":
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match=r"read-only.*tables.*Read-only file system"):
        enter(slide, {"x": "images"})


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
@pytest.mark.parametrize("locked", ["store", "parent"])
def test_real_permissions(slide, locked):
    """As an ordinary user, also when the tests run as root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        store = Path(name) / "s.zarr"
        shutil.copytree(slide.path, store)
        for folder in (store, *(p for p in store.rglob("*") if p.is_dir())):
            folder.chmod(0o777)
        target = store if locked == "store" else Path(name)
        root = os.geteuid() == 0
        target.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=r"read-only|cannot be written"):
                check_writable(store)
        finally:
            if root:
                os.seteuid(0)
            target.chmod(0o777)
        check_writable(store)


def test_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    path = tmp_path / "work" / "lock"
    with hold_lock(path, wait_s=1, busy="busy"), pytest.raises(StoreError, match="another run"):
        hold_lock(path, wait_s=0.05, busy="another run").__enter__()
    with hold_lock(path, wait_s=0.05, busy="busy"):
        assert path.exists()
    assert not path.parent.exists()
