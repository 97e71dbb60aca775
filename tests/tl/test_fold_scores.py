"""Scores of a fold on disk: they come back, or are made anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pixnet_sd.tl._cross_validate import read_scores, write_scores
from pixnet_sd.tl._evaluate import moments


@pytest.fixture
def scores() -> dict[tuple[str, str], pd.DataFrame]:
    rng = np.random.default_rng(0)
    values = rng.random((2, 9, 3)).astype(np.float32)
    values[0, :, 1] = np.nan
    return {("slide", "table"): moments(*values, pd.Index(["A", "B", "µ"]))}


def test_scores_come_back(scores, tmp_path: Path) -> None:
    write_scores(tmp_path, {"weights": "a"}, scores)
    found = read_scores(tmp_path, {"weights": "a"})
    assert found is not None
    pd.testing.assert_frame_equal(found["slide", "table"], scores["slide", "table"], check_exact=True)
    assert read_scores(tmp_path, {"weights": "b"}) is None


def test_scores_that_were_damaged_are_not_taken(scores, tmp_path: Path) -> None:
    write_scores(tmp_path, {"weights": "a"}, scores)
    path = tmp_path / "scores.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 150):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found = read_scores(tmp_path, {"weights": "a"})
        if found is not None:  # 1E-5 is the same as 1e-5
            pd.testing.assert_frame_equal(found["slide", "table"], scores["slide", "table"], check_exact=True)
    for text in (b"", whole[:-2], b"[" * 10_000, b"{}", json.dumps({"identity": {"weights": "a"}}).encode()):
        path.write_bytes(text)
        assert read_scores(tmp_path, {"weights": "a"}) is None


def test_scores_are_written_through_no_link(scores, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    for name in ("scores.json", "scores.json.partial"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_scores(tmp_path, {}, scores)
    assert (tmp_path / "mine").read_text() == "years of work"
    assert read_scores(tmp_path, {}) is not None
