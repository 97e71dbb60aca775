"""Scores by gene, by size, and region by region; and the curves of a training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from scipy import sparse
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity
from tests.model.models import make_record
from tests.slide.conftest import make_table

import pixnet_sd as ps
from pixnet_sd.errors import DataError, PixNetError

KEYS = {"table_key": "counts", "predicted_key": "predicted"}


def scores(*pcc: float) -> pd.DataFrame:
    return pd.DataFrame({"pcc": pcc}, index=[f"GENE{k}" for k in range(len(pcc))])


def with_predictions(n: int) -> sd.SpatialData:
    """Spots with counts, and predictions of them in reverse order."""
    rng = np.random.default_rng(0)
    shapes = ShapesModel.parse(rng.random((n, 2)) * 90, geometry=0, radius=2.0, transformations={"s": Identity()})
    tables = {"counts": make_table("spots", np.arange(n)), "predicted": make_table("spots", np.arange(n)[::-1])}
    tables["predicted"].X = rng.random((n, 5), dtype=np.float32)
    tables["predicted"].uns["pixnet_sd"] = {"target_sum": 100.0}
    return sd.SpatialData(shapes={"spots": shapes}, tables=tables)


def test_genes_are_ranked() -> None:
    ax = ps.pl.evaluation(scores(0.2, 0.9, np.nan, -0.1, 0.5), n_labels=1, show=False)
    curve, median, _ = ax.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 0.9], [2, 0.5], [3, 0.2], [4, -0.1]])
    assert set(median.get_ydata()) == {0.35}
    (names,) = ax.texts
    assert names.get_text() == "best\nGENE1  0.90\n\nworst\nGENE3  -0.10"


def test_sizes_side_by_side() -> None:
    ((ranked, boxes),) = ps.pl.evaluation({"8 µm": scores(0.1, 0.3), "16 µm": scores(0.2, 0.6, 0.7)}, show=False)
    legend = [text.get_text() for text in ranked.get_legend().get_texts()]
    assert legend == ["8 µm: median 0.20", "16 µm: median 0.60"]
    assert [label.get_text() for label in boxes.get_xticklabels()] == ["8 µm", "16 µm"]
    assert [sorted(points.get_offsets()[:, 1]) for points in boxes.collections] == [[0.1, 0.3], [0.2, 0.6, 0.7]]
    level = [line.get_ydata()[0] for line in boxes.lines if len(set(line.get_ydata())) == 1]
    assert {0.2, 0.6} <= set(np.round(level, 6))


@pytest.mark.parametrize("n", [50, 2500])
def test_measured_against_predicted(n: int) -> None:
    """Each region a point; each in one hexagon where they are many."""
    sdata = with_predictions(n)
    ((_, ax),) = ps.pl.evaluation(scores(0.1, 0.3), gene="GENE1", sdata=sdata, **KEYS, show=False)
    counts, predicted = sdata.tables["counts"].X.toarray(), sdata.tables["predicted"].X[::-1, 1]
    measured = np.log1p(100 * counts[:, 1] / np.maximum(counts.sum(axis=1), 1))
    if n > 2000:
        assert ax.collections[0].get_array().sum() == n
    else:
        found = ax.collections[0].get_offsets()
        np.testing.assert_allclose(found, np.stack([measured, predicted], axis=1), rtol=1e-5)
    assert ax.get_title() == f"GENE1, PCC {np.corrcoef(measured, predicted)[0, 1]:.2f}"
    assert ax.lines[0].get_slope() == 1


def test_reliability() -> None:
    """Of counts drawn from what is predicted the curve is the diagonal; logarithms have none."""
    sdata, rng = with_predictions(2000), np.random.default_rng(0)
    with pytest.raises(DataError, match="nb_pcc"):
        ps.pl.reliability(sdata, **KEYS)
    table, measured = sdata.tables["predicted"], sdata.tables["counts"]
    share, total = rng.dirichlet(np.ones(5), 2000), rng.integers(20, 300, (2000, 1))
    table.X = np.log1p(100 * share).astype(np.float32)
    table.obs["area_um2"], table.var["dispersion_12um2"] = 12.0, 1e-4
    counts = np.array([rng.multinomial(n[0], p) for n, p in zip(total, share, strict=True)])
    measured.X = sparse.csr_matrix(counts[::-1])
    ax = ps.pl.reliability(sdata, **KEYS, show=False)
    nominal, found = ax.lines[0].get_xydata().T
    assert nominal[[0, -1]].tolist() == [0.1, 0.99]
    np.testing.assert_allclose(found, nominal, atol=0.12)  # of shares of a fixed sum, which vary less than each alone


def test_bad_evaluations() -> None:
    with pytest.raises(PixNetError, match="predicted_key="):
        ps.pl.evaluation(scores(0.1), gene="GENE1")
    with pytest.raises(DataError, match="GENE9"):
        ps.pl.evaluation(scores(0.1), gene="GENE9", sdata=with_predictions(50), **KEYS)
    with pytest.raises(PixNetError, match="evaluation="):
        ps.pl.evaluation(scores(np.nan))
    assert not plt.get_fignums()


ROWS = [
    {"epoch": float(k), "loss": 3.0 / k, "val_pcc": 0.1 * k if k < 4 else 0.2, "val_mse": 1.0 / k, "lr": 1e-3}
    for k in range(1, 6)
]


def trained(rows: list[dict[str, float]], **training: int) -> ps.PixNet:
    """A model that is nothing but its record."""
    return ps.PixNet(torch.nn.Identity(), make_record(history=rows, training=training))


def test_curves_and_the_kept_epoch() -> None:
    (axes,) = ps.pl.history(trained(ROWS, best_epoch=3), show=False)
    for ax, key in zip(axes, ("loss", "val_pcc", "val_mse"), strict=True):
        curve, line, point = ax.lines
        np.testing.assert_allclose(curve.get_xydata(), [(row["epoch"], row[key]) for row in ROWS])
        assert set(line.get_xdata()) == {3}
        assert point.get_xydata().tolist() == [[3, ROWS[2][key]]]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["kept: epoch 3"]
    alone = ps.pl.history(trained([{"epoch": 1.0, "loss": 3.0}]), show=False)
    assert len(alone.lines) == 1  # without held-out regions
    assert ps.pl.history(trained(ROWS), keys="lr", ax=alone) is alone
    assert alone.get_ylabel() == "learning rate"
    for rows, keys in ((ROWS, "val_loss"), ([], None)):
        with pytest.raises(PixNetError, match="keys="):
            ps.pl.history(trained(rows), keys=keys, show=False)
