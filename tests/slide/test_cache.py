"""Compact counts on disk: rows come back, damage is seen, and a copy is made once as long as its table stays."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from pixnet_sd.errors import StoreError
from pixnet_sd.slide.tables import (
    CountFile,
    Look,
    Measured,
    find_pooling,
    measured,
    open_counts,
    targets_of,
    write_counts,
)

COUNTS = hnp.arrays(
    np.int64,
    st.tuples(st.integers(1, 20), st.integers(1, 6)),
    elements=st.sampled_from([0, 0, 0, 1, 3, 255, 256, 65_536, 2**24]),
)
GENES = ["GENE3", "GENE0"]


def write(folder: Path, x: np.ndarray, cuts=()) -> CountFile:
    folder.mkdir(exist_ok=True)
    blocks = [sparse.csr_matrix(x[rows]) for rows in np.split(np.arange(len(x)), sorted(cuts))]
    return write_counts(folder, [(b, np.asarray(b.sum(axis=1)).ravel() + 1.0) for b in blocks], x.shape[1], "k", Look())


@given(COUNTS, st.lists(st.integers(0, 20), max_size=4), st.data())
@settings(max_examples=25, deadline=None)
def test_any_rows_come_back(x: np.ndarray, cuts: list[int], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        written = write(Path(folder), x, cuts)
        counts = open_counts(Path(folder), "k")
        assert counts == written
        assert (counts.n, counts.n_genes) == x.shape
        assert counts.count == np.min_scalar_type(x.max())  # the smallest that holds all
        assert write(Path(folder) / "uncut", x).sha256 == counts.sha256  # however it was cut
        index = np.array(data.draw(st.lists(st.integers(0, len(x) - 1), max_size=30)), np.int64)
        rows, total = counts.rows(index)
        np.testing.assert_array_equal(rows.toarray(), x[index])
        np.testing.assert_array_equal(total, x[index].sum(axis=1) + 1)
        np.testing.assert_array_equal(counts.totals(), x.sum(axis=1) + 1)
        for chosen in (index, None):
            blocks = [block.toarray() for block, _ in counts.blocks(chosen, n_rows=4)]
            np.testing.assert_array_equal(np.concatenate([x[:0], *blocks]), x if chosen is None else x[index])


@pytest.mark.parametrize(("largest", "kind"), [(256, "<u2"), (65_536, "<u4"), (2**33, "<f4"), (0.5, "<f4")])
def test_counts_get_wider_while_they_are_written(tmp_path, largest: float, kind: str) -> None:
    counts = write(tmp_path, np.array([[1, 2], [0, largest]]), [1])
    assert counts.count.str == kind
    np.testing.assert_array_equal(counts.rows(np.arange(2))[0].toarray(), [[1, 2], [0, largest]])


@pytest.mark.parametrize("name", ["total.bin", "indptr.bin", "gene.bin", "count.bin", "meta.json"])
def test_damage_and_content_of_others_are_seen(tmp_path, name: str) -> None:
    counts = write(tmp_path, np.random.default_rng(0).poisson(1, (10, 5)))
    assert open_counts(tmp_path, "l") is None
    path = tmp_path / name
    content = path.read_bytes()
    damaged = [content[:20] + bytes([content[20] ^ 1]) + content[21:], content[:-1]]
    if name == "meta.json":
        meta = json.loads(content)
        damaged += [b"[]", *(json.dumps(meta | {key: 3}).encode() for key in meta)]
    for each in damaged:
        path.write_bytes(each)
        assert open_counts(tmp_path, "k") is None, each
    path.unlink()
    assert open_counts(tmp_path, "k") is None
    if name != "meta.json":
        path.touch()  # cut short while in use
        with pytest.raises(StoreError):
            counts.rows(np.arange(5))


def counts_of(table: Measured, cache: Path, genes=GENES) -> CountFile:
    (targets,) = targets_of({"": [table]}, genes, 1e4, cache, "nb_pcc", memory_bytes=0)[""]
    return targets.values.counts


def one_count(table) -> None:
    table.X[5, 2] += 1  # of a gene that is not chosen: totals count


@pytest.mark.parametrize("stored", [False, True])
def test_made_once_for_a_table_and_genes(opened, tmp_path, monkeypatch, stored: bool) -> None:
    """Sizes and dates tell that arrays are those that were hashed, for they may be large; they do not of a copy."""
    digest, hashed = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (hashed.append(file.name), digest(file, kind))[1])
    table, cache = opened(is_stored=stored), tmp_path / "cache"
    first = counts_of(table, cache)
    assert counts_of(table, cache) == first
    assert len(hashed) == 4
    rows, _ = first.rows(np.arange(first.n))
    np.testing.assert_array_equal(rows.toarray(), table.counts.to_csr().toarray()[:, [3, 0]])
    assert [path.name for path in cache.iterdir()] == [first.folder.name]
    shutil.copytree(first.folder, tmp_path / "copy")
    for _ in range(2):  # hashed once more, in the copy
        assert open_counts(tmp_path / "copy", table.content_key(GENES)).sha256 == first.sha256
    assert len(hashed) == 2 * 4
    others = [counts_of(table, cache, genes) for genes in (GENES[::-1], GENES[:1])]
    others.append(counts_of(opened(one_count, stored), cache))
    assert len({each.folder for each in [first, *others]}) == 4
    assert first.sha256 not in {each.sha256 for each in others}


def test_damaged_or_killed_half_way_is_made_anew(opened, tmp_path) -> None:
    """What a killed run has left is not taken for a cache, and goes when it is old."""
    table, cache = opened(), tmp_path / "cache"
    whole = counts_of(table, cache)
    for name in ("count.bin", "meta.json"):
        (whole.folder / name).write_bytes(b"[]")
        assert counts_of(table, cache).sha256 == whole.sha256
    left = whole.folder.rename(cache / f"{whole.folder.name}.partial-0")
    assert counts_of(table, cache).folder == whole.folder
    assert left.exists()
    os.utime(left, (0, 0))
    shutil.rmtree(whole.folder)
    counts_of(table, cache)
    assert list(cache.iterdir()) == [whole.folder]


@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_disk_that_does_not_take_it(opened, tmp_path, fault: str) -> None:
    table, cache = opened(), tmp_path / "some" / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "no folder":
        (tmp_path / "some").write_text("a file")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"'square_008um'.*cache'.*checkpoint_dir="):
            counts_of(table, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not cache.exists()


FINE, COARSE, COARSEST = "square_004um", "square_008um", "square_016um"
SUM, NO_SUM = "is the sum of the bins of", "is not pooled from"
POOLED = {
    "squares": ({}, None, SUM),
    "circles": ({"circles": True}, None, SUM),
    "labels": ({"labels": True}, None, SUM),
    "another count": ({}, lambda table: table.X.__setitem__((0, 0), 500), NO_SUM),
    "elsewhere": ({}, lambda table: setattr(table, "obs", table.obs.assign(array_row=table.obs.array_row + 1)), NO_SUM),
    "no lattice": ({}, lambda table: table.obs.pop("array_row"), NO_SUM),
    "genes": ({}, lambda table: setattr(table, "var_names", [*table.var_names[:-2], "other", "GENE4"]), NO_SUM),
}


@pytest.mark.parametrize(("arguments", "spoil", "how"), POOLED.values(), ids=POOLED)
def test_pooled_as_read(visium_hd, frame, tmp_path, caplog, arguments, spoil, how: str) -> None:
    """Of bins of 4, 8 and 16 µm, of which those of 8 µm may be no sums of the finer ones; the others always are."""
    caplog.set_level("INFO", "pixnet_sd")
    sdata = visium_hd(bins=(4, 8, 16), keep=lambda row, col: (row + col) // 3 != 0, **arguments)
    obs = sdata.tables[FINE].obs
    for key, factor in ((COARSE, 2), (COARSEST, 4)):
        parents = pd.MultiIndex.from_frame(sdata.tables[key].obs[["array_row", "array_col"]])
        parent = parents.get_indexer(pd.MultiIndex.from_frame(obs[["array_row", "array_col"]] // factor))
        is_child = np.float32(parent == np.arange(len(parents))[:, None])
        sdata.tables[key].X = sparse.csr_matrix(is_child) @ sdata.tables[FINE].X
    if spoil:
        spoil(sdata.tables[COARSE])
    tables = {"": measured(sdata, frame)}
    dense, pooled = (targets_of(tables, ["GENE4", "GENE1"], 1e4, tmp_path, memory_bytes=n)[""] for n in (1e9, 0))
    for one, other in zip(dense, pooled, strict=True):
        np.testing.assert_array_equal(other.values[np.arange(len(one.regions))], one.values)
        np.testing.assert_array_equal(other.regions.centre_xy, one.regions.centre_xy)
    assert f"Table {COARSE!r} {how} {FINE!r}" in caplog.text
    assert f"Table {COARSEST!r} {SUM} {FINE!r}" in caplog.text
    fine, coarsest = pooled[0].values.counts, pooled[2].values.counts
    for n_bins in (1, 60):  # at a time
        sums = find_pooling(tables[""][0], tables[""][2]).sums(fine, n_bins)
        counts, total = (list(each) for each in zip(*sums, strict=True))
        np.testing.assert_array_equal(np.concatenate(total), coarsest.totals())
        rows = coarsest.rows(np.arange(coarsest.n))[0].toarray()
        np.testing.assert_array_equal(sparse.vstack(counts).toarray(), rows)
