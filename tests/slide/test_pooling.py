"""Coarse bins as sums of fine ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from pixnet_sd.slide import open_slide
from pixnet_sd.slide.tables import _cache as _pooling
from pixnet_sd.slide.tables import _targets, measured, targets_of

GENES = ["GENE4", "GENE1"]
FINE, COARSE, COARSEST = "square_004um", "square_008um", "square_016um"


@pytest.fixture
def slide(visium_hd):
    """Bins of 4, 8 and 16 µm, without some, the coarser ones the sums of the finest."""

    def make(**arguments):
        sdata = visium_hd(bins=(4, 8, 16), keep=lambda row, col: (row + col) // 3 != 0, **arguments)
        obs = sdata.tables[FINE].obs
        for key, factor in ((COARSE, 2), (COARSEST, 4)):
            parents = sdata.tables[key].obs
            places = {place: n for n, place in enumerate(zip(parents["array_row"], parents["array_col"], strict=True))}
            parent = [
                places.get((r // factor, c // factor), -1)
                for r, c in zip(obs["array_row"], obs["array_col"], strict=True)
            ]
            has = np.array(parent) >= 0
            ones = (np.ones(has.sum(), np.float32), (np.array(parent)[has], np.flatnonzero(has)))
            sums = sparse.csr_matrix(ones, shape=(len(parents), len(obs))) @ sdata.tables[FINE].X
            sdata.tables[key].X = sums.tocsr()
        return sdata

    return make


def targets(sdata, cache) -> list:
    tables = measured(sdata, open_slide(sdata, working_mpp=1.0))
    return targets_of({"": tables}, GENES, 1e4, cache)[""]


@pytest.mark.filterwarnings("ignore:.*no counts at all")
@pytest.mark.parametrize("block", [1, 60, 10**6])
@pytest.mark.parametrize("arguments", [{}, {"circles": True}, {"labels": True}])
def test_pooled_as_read(slide, tmp_path, monkeypatch, caplog, block, arguments) -> None:
    sdata = slide(**arguments)
    dense = targets(sdata, tmp_path)
    monkeypatch.setattr(_targets, "_DENSE_BYTES", 0)
    monkeypatch.setattr(_pooling, "_BLOCK_BINS", block)
    caplog.set_level("INFO", "pixnet_sd")
    for one, other in zip(dense, targets(sdata, tmp_path), strict=True):
        np.testing.assert_array_equal(other.values[np.arange(len(one.regions))], one.values)
        np.testing.assert_array_equal(other.regions.centre_xy, one.regions.centre_xy)
    assert f"Table {COARSE!r} is the sum of the bins of {FINE!r}" in caplog.text
    assert f"Table {COARSEST!r} is the sum of the bins of {FINE!r}" in caplog.text


def one_count(sdata) -> None:
    sdata.tables[COARSE].X[0, 0] += 1


def other_genes(sdata) -> None:
    sdata.tables[COARSE].var_names = [*sdata.tables[COARSE].var_names[:-2], "other", "GENE4"]


def no_indices(sdata) -> None:
    del sdata.tables[COARSE].obs["array_row"]


def shifted(sdata) -> None:
    sdata.tables[COARSE].obs["array_row"] += 1


@pytest.mark.filterwarnings("ignore:.*no counts at all")
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (one_count, "their counts are not sums"),
        (other_genes, "their genes differ"),
        (no_indices, "they are not both bins on a lattice"),
        (shifted, "their lattices do not share axes and origin"),
    ],
)
def test_what_is_no_sum_is_read(slide, tmp_path, monkeypatch, caplog, spoil, why: str) -> None:
    sdata = slide()
    spoil(sdata)
    dense = targets(sdata, tmp_path)
    monkeypatch.setattr(_targets, "_DENSE_BYTES", 0)
    caplog.set_level("INFO", "pixnet_sd")
    for one, other in zip(dense, targets(sdata, tmp_path), strict=True):
        np.testing.assert_array_equal(other.values[np.arange(len(one.regions))], one.values)
    assert f"Table {COARSE!r} is not pooled from {FINE!r}: {why}" in caplog.text
    assert f"Table {COARSEST!r} is the sum of the bins of {FINE!r}" in caplog.text
