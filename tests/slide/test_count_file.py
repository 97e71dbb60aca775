"""Compact counts on disk."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from pixnet_sd.errors import StoreError
from pixnet_sd.slide.tables import _cache as _count_file
from pixnet_sd.slide.tables._cache import open_counts, write_counts

COUNTS = hnp.arrays(
    np.int64,
    st.tuples(st.integers(1, 20), st.integers(1, 6)),
    elements=st.sampled_from([0, 0, 0, 1, 3, 255, 256, 65_536, 2**24]),
)


def write(folder: Path, x: np.ndarray, cuts=()) -> None:
    parts = np.split(np.arange(len(x)), sorted(cuts))
    blocks = [(sparse.csr_matrix(x[part]), x[part].sum(axis=1) + 1.0) for part in parts]
    write_counts(folder, blocks, x.shape[1], key="k", kind="counts", largest=1.0)


@given(COUNTS, st.lists(st.integers(0, 20), max_size=4), st.data())
def test_any_rows_come_back(x: np.ndarray, cuts: list[int], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder), x, cuts)
        found = open_counts(Path(folder), key="k")
        assert (found.n, found.n_genes) == x.shape
        index = np.array(data.draw(st.lists(st.integers(0, len(x) - 1), max_size=30)), np.int64)
        counts, total = found.rows(index)
        np.testing.assert_array_equal(counts.toarray(), x[index])
        np.testing.assert_array_equal(total, x[index].sum(axis=1) + 1)
        np.testing.assert_array_equal(found.totals(), x.sum(axis=1) + 1)


@pytest.mark.parametrize(
    ("largest", "kind"), [(255, "|u1"), (256, "<u2"), (65_536, "<u4"), (2**33, "<f4"), (0.5, "<f4")]
)
@pytest.mark.parametrize("cuts", [(), (2,)])
def test_the_smallest_type_that_holds_all(tmp_path, largest: float, kind: str, cuts) -> None:
    x = np.array([[1, 0], [2, 7], [0, largest], [3, 0]])
    write(tmp_path, x, cuts)
    found = open_counts(tmp_path)
    assert found.count.str == kind
    assert found.gene.str == "|u1"
    np.testing.assert_array_equal(found.rows(np.arange(4))[0].toarray(), x)


def test_many_genes(tmp_path) -> None:
    x = sparse.csr_matrix(([1, 2], ([0, 1], [299, 70])), shape=(2, 300)).toarray()
    write(tmp_path, x)
    assert open_counts(tmp_path).gene == np.dtype("<u2")
    np.testing.assert_array_equal(open_counts(tmp_path).rows(np.array([1, 0]))[0].toarray(), x[::-1])


def test_blocks_are_all_rows_or_those_asked_for(tmp_path, monkeypatch) -> None:
    x = np.random.default_rng(0).poisson(1, (11, 3))
    write(tmp_path, x)
    monkeypatch.setattr(_count_file, "_BLOCK_ROWS", 4)
    found = open_counts(tmp_path)
    for index in (None, np.array([9, 1, 2, 3, 0])):
        rows = np.concatenate([counts.toarray() for counts, _ in found.blocks(index)])
        np.testing.assert_array_equal(rows, x if index is None else x[index])


def test_read_from_threads(tmp_path) -> None:
    x = np.random.default_rng(0).poisson(1, (500, 5))
    write(tmp_path, x)
    found, rng = open_counts(tmp_path), np.random.default_rng(1)
    wanted = [np.sort(rng.choice(500, 200, replace=False)) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for index, (counts, _) in zip(wanted, pool.map(found.rows, wanted), strict=True):
            np.testing.assert_array_equal(counts.toarray(), x[index])


def test_same_counts_same_hash(tmp_path) -> None:
    x = np.random.default_rng(0).poisson(1, (10, 5))
    hashes = []
    for name, cuts in (("a", ()), ("b", (3, 4))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, x, cuts)
        hashes.append(open_counts(tmp_path / name).sha256)
    assert hashes[0] == hashes[1]
    x[0, 0] += 1
    (tmp_path / "c").mkdir()
    write(tmp_path / "c", x)
    assert open_counts(tmp_path / "c").sha256 != hashes[0]


@pytest.mark.parametrize("name", ["total", "indptr", "gene", "count"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_seen(tmp_path, name: str, how: str) -> None:
    write(tmp_path, np.random.default_rng(0).poisson(1, (10, 5)))
    path = tmp_path / f"{name}.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if how == "flip" else content[:-1])
    if how == "gone":
        path.unlink()
    assert open_counts(tmp_path) is None


@pytest.mark.parametrize("change", [{"format": "other"}, {"key": "l"}, {"gene": 3}, {"sha256": "0"}, None])
def test_foreign_content(tmp_path, change) -> None:
    write(tmp_path, np.ones((2, 2)))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text("{" if change is None else json.dumps(meta | change))
    assert open_counts(tmp_path, key="k") is None
    assert open_counts(tmp_path / "nowhere") is None


def test_cut_short_while_in_use(tmp_path) -> None:
    write(tmp_path, np.ones((5, 2)))
    found = open_counts(tmp_path)
    (tmp_path / "count.bin").write_bytes(b"")
    with pytest.raises(StoreError, match="cut short while in use"):
        found.rows(np.arange(5))
