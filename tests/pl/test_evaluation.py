"""Scores by gene, by size, and region by region."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity
from tests.slide.conftest import make_table

import pixnet_sd as ps
from pixnet_sd.errors import DataError, PixNetError

N = 50
KEYS = {"table_key": "counts", "predicted_key": "predicted"}


def scores(*pcc: float) -> pd.DataFrame:
    return pd.DataFrame({"pcc": pcc}, index=[f"GENE{k}" for k in range(len(pcc))])


@pytest.fixture
def sdata() -> sd.SpatialData:
    shapes = ShapesModel.parse(
        np.random.default_rng(0).random((N, 2)) * 90, geometry=0, radius=2.0, transformations={"s": Identity()}
    )
    tables = {"counts": make_table("spots", np.arange(N)), "predicted": make_table("spots", np.arange(N)[::-1])}
    tables["predicted"].X = np.random.default_rng(1).random((N, 5), dtype=np.float32)
    tables["predicted"].uns["pixnet_sd"] = {"target_sum": 100.0}
    return sd.SpatialData(shapes={"spots": shapes}, tables=tables)


def test_genes_are_ranked():
    ax = ps.pl.evaluation(scores(0.2, 0.9, np.nan, -0.1, 0.5), n_labels=1, show=False)
    curve, median, _ = ax.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 0.9], [2, 0.5], [3, 0.2], [4, -0.1]])
    assert set(median.get_ydata()) == {0.35}
    (names,) = ax.texts
    assert names.get_text() == "best\nGENE1  0.90\n\nworst\nGENE3  -0.10"


def test_sizes_side_by_side():
    axes = ps.pl.evaluation({"8 µm": scores(0.1, 0.3), "16 µm": scores(0.2, 0.6, 0.7)}, show=False)
    assert axes.shape == (1, 2)
    legend = [text.get_text() for text in axes[0, 0].get_legend().get_texts()]
    assert legend == ["8 µm: median 0.20", "16 µm: median 0.60"]
    assert [label.get_text() for label in axes[0, 1].get_xticklabels()] == ["8 µm", "16 µm"]
    points = [set(np.round(p.get_offsets()[:, 1], 6)) for p in axes[0, 1].collections]
    assert points == [{0.1, 0.3}, {0.2, 0.6, 0.7}]
    level = [line.get_ydata()[0] for line in axes[0, 1].lines if len(set(line.get_ydata())) == 1]
    assert {0.2, 0.6} <= set(np.round(level, 6))


@pytest.mark.parametrize("many", [False, True])
def test_measured_against_predicted(sdata, monkeypatch, many):
    if many:
        monkeypatch.setattr("pixnet_sd.pl._scores._MANY", N - 1)
    axes = ps.pl.evaluation(scores(0.1, 0.3), gene="GENE1", sdata=sdata, **KEYS, show=False)
    counts, predicted = sdata.tables["counts"].X.toarray(), sdata.tables["predicted"].X[::-1, 1]
    measured = np.log1p(100 * counts[:, 1] / counts.sum(axis=1))
    drawn = axes[0, 1].collections[0]
    if many:
        assert drawn.get_array().sum() == N  # each in one hexagon
    else:
        np.testing.assert_allclose(drawn.get_offsets(), np.stack([measured, predicted], axis=1), rtol=1e-5)
    r = np.corrcoef(measured, predicted)[0, 1]
    assert axes[0, 1].get_title() == f"GENE1, PCC {r:.2f}"
    assert axes[0, 1].lines[0].get_slope() == 1


def test_bad_input(sdata):
    with pytest.raises(PixNetError, match="needs sdata=, table_key= and predicted_key="):
        ps.pl.evaluation(scores(0.1), gene="GENE1")
    with pytest.raises(DataError, match="GENE9"):
        ps.pl.evaluation(scores(0.1), gene="GENE9", sdata=sdata, **KEYS)
    with pytest.raises(PixNetError, match="do not vary"):
        ps.pl.evaluation(scores(np.nan))
