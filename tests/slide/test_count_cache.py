"""When compact counts are used again, and when they are made anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd

from pixnet_sd.errors import StoreError
from pixnet_sd.slide.tables import Measured, measured
from pixnet_sd.slide.tables import _cache as _count_cache
from pixnet_sd.slide.tables._cache import own_counts

GENES = pd.Index(["GENE3", "GENE0"])


@pytest.fixture
def built(monkeypatch) -> list[Any]:
    """Grows by one with every cache that is written."""
    calls: list[Any] = []
    write = _count_cache.write_counts

    def counting(folder, *args, **kwargs):
        calls.append(folder)
        write(folder, *args, **kwargs)

    monkeypatch.setattr(_count_cache, "write_counts", counting)
    return calls


@pytest.fixture(params=["memory", "store"])
def table(request, visium_hd, frame, tmp_path) -> Callable[..., Measured]:
    """A table in memory, or one that is read from a store, with some change made to it."""

    def make(change: Callable[[Any], None] = lambda table: None) -> Measured:
        sdata = visium_hd(bins=(8,))
        change(sdata.tables["square_008um"])
        if request.param == "store":
            sdata.write(tmp_path / "slide.zarr", overwrite=True)
            sdata = sd.read_zarr(tmp_path / "slide.zarr", selection=("images",))
        return measured(sdata, frame())[0]

    return make


def counts_of(found) -> np.ndarray:
    return found.rows(np.arange(found.n))[0].toarray()


def test_made_once(table, built, tmp_path) -> None:
    first, second = (own_counts(table(), GENES, tmp_path / "cache") for _ in range(2))
    assert len(built) == 1
    assert first == second
    expected = table()
    np.testing.assert_array_equal(counts_of(first), expected.rows(np.arange(len(expected))).toarray()[:, [3, 0]])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


def one_count(table) -> None:
    table.X[5, 2] += 1  # of a gene that is not chosen: totals count


def names(table) -> None:
    table.var_names = ["GENE3", "GENE1", "GENE2", "GENE0", "GENE4"]


@pytest.mark.parametrize("change", [one_count, names])
def test_another_table_makes_another(table, built, tmp_path, change) -> None:
    first = own_counts(table(), GENES, tmp_path / "cache")
    second = own_counts(table(change), GENES, tmp_path / "cache")
    assert len(built) == 2
    assert first.folder != second.folder
    assert first.sha256 != second.sha256


def test_other_genes_make_another(table, built, tmp_path) -> None:
    for genes in (GENES, GENES[::-1], GENES[:1]):
        own_counts(table(), genes, tmp_path / "cache")
    assert len(built) == 3


@pytest.mark.parametrize("spoil", ["flip", "foreign", "file"])
def test_damaged_is_made_anew(table, built, tmp_path, spoil: str) -> None:
    first = own_counts(table(), GENES, tmp_path / "cache")
    before = counts_of(first)
    if spoil == "flip":
        content = bytearray((first.folder / "count.bin").read_bytes())
        content[7] ^= 1
        (first.folder / "count.bin").write_bytes(content)
    elif spoil == "foreign":
        (first.folder / "meta.json").write_text("[]")
    else:
        (first.folder / "gene.bin").unlink()
    second = own_counts(table(), GENES, tmp_path / "cache")
    assert len(built) == 2
    np.testing.assert_array_equal(counts_of(second), before)


def test_killed_half_way(table, built, tmp_path, monkeypatch) -> None:
    """What a killed run has left is not taken for a cache, and goes when it is old."""
    monkeypatch.setattr(_count_cache.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(_count_cache, "write_counts", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        own_counts(table(), GENES, tmp_path / "cache")
    monkeypatch.undo()
    (left,) = (tmp_path / "cache").iterdir()
    found = own_counts(table(), GENES, tmp_path / "cache")
    assert found.folder != left
    assert left.exists()
    os.utime(left, (0, 0))
    (found.folder / "meta.json").unlink()
    own_counts(table(), GENES, tmp_path / "cache")
    assert not left.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_disk_that_does_not_take_it(table, tmp_path, monkeypatch, number: int) -> None:
    def full(folder, *args, **kwargs):
        (folder / "count.bin").write_bytes(b"some")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_count_cache, "write_counts", full)
    with pytest.raises(
        StoreError, match=rf"'square_008um'.*cache' \({os.strerror(number)}; .*GB are free.*checkpoint_dir="
    ):
        own_counts(table(), GENES, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
