from __future__ import annotations

import numpy as np
import pytest

from pixnet_sd.datasets.drawn import Source, draw_counts, library_size
from pixnet_sd.datasets.drawn._expression import LIBRARY_FIELD_SIGMA, LIBRARY_PLACE_SIGMA, gene_panel
from pixnet_sd.datasets.drawn._tissue import Tissue


def library(side: int) -> np.ndarray:
    """Library sizes of a square of bins, over many periods of the field."""
    row, col = np.indices((side, side))
    return library_size(Tissue(1000, 0), row.ravel(), col.ravel(), 10.0 * col.ravel(), 10.0 * row.ravel())


def test_library_sizes_are_log_normal_with_mean_one():
    found = library(600)
    assert found.mean() == pytest.approx(1, abs=0.06)
    assert np.log(found).std() == pytest.approx(np.hypot(LIBRARY_FIELD_SIGMA, LIBRARY_PLACE_SIGMA), rel=0.05)


def test_library_sizes_are_smooth_but_for_each_bin():
    log = np.log(library(600)).reshape(60, 10, 60, 10)
    within, between = (log - log.mean(axis=(1, 3), keepdims=True)).std(), log.mean(axis=(1, 3)).std()
    assert within == pytest.approx(LIBRARY_PLACE_SIGMA, rel=0.1)
    assert between == pytest.approx(LIBRARY_FIELD_SIGMA, rel=0.25)


def test_counts_are_poisson_of_every_gene():
    panel = gene_panel(60)
    caught = np.tile(np.random.default_rng(0).random(len(Source)) / 20, (20000, 1))
    counts = draw_counts(caught, panel, (0, 7)).toarray()
    expected = caught[0] @ panel.profile
    assert (np.abs(counts.mean(axis=0) - expected) / np.sqrt(expected / len(counts))).max() < 4.5
    seen = np.flatnonzero(expected > 0.05)
    assert len(seen) > 10
    np.testing.assert_allclose(counts.var(axis=0)[seen], expected[seen], rtol=0.1)
    # genes of one place do not know of one another
    correlation = np.corrcoef(counts[:, seen].T) - np.eye(len(seen))
    assert np.abs(correlation).max() < 0.04


def test_genes_beyond_the_markers_change_no_marker():
    caught = np.full((500, len(Source)), 0.05)
    few, many, long = (draw_counts(caught, gene_panel(n), (0, 7)) for n in (5, 34, 3000))
    assert (few != many[:, :5]).nnz == 0
    assert (many != long[:, :34]).nnz == 0
    assert long.shape == (500, 3000)
    assert long[:, 34:].sum() == pytest.approx(caught.sum(axis=0) @ gene_panel(3000).fillers.sum(axis=1), rel=0.05)


def test_streams_differ():
    caught = np.full((50, len(Source)), 0.05)
    one, two = (draw_counts(caught, gene_panel(40), (0, 7, block)) for block in (0, 1))
    assert (one != two).nnz > 0
