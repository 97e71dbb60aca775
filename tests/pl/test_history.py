"""Curves of a training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import pixnet_sd as ps
from pixnet_sd.errors import PixNetError
from pixnet_sd.model import DecoderConfig, ModelRecord

ROWS = [
    {"epoch": float(k), "loss": 3.0 / k, "val_pcc": 0.1 * k if k < 4 else 0.2, "val_mse": 1.0 / k, "lr": 1e-3}
    for k in range(1, 6)
]


@pytest.fixture
def model():
    """A model that is nothing but its record."""

    def make(rows, best=3):
        record = ModelRecord(
            *([], 1e4, "mse_pcc", "mean", 0.5, "resnet18", None, "", False),
            DecoderConfig(None, (8, 8, 8)),
            *(512, 64, False),
            history=rows,
            training={} if best is None else {"best_epoch": best},
        )
        return ps.PixNet(torch.nn.Identity(), record)

    return make


def test_curves_and_the_kept_epoch(model):
    axes = ps.pl.history(model(ROWS), show=False)
    assert axes.shape == (1, 3)
    for ax, key in zip(axes.flat, ("loss", "val_pcc", "val_mse"), strict=True):
        curve, line, point = ax.lines
        np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3, 4, 5])
        np.testing.assert_allclose(curve.get_ydata(), [row[key] for row in ROWS])
        assert set(line.get_xdata()) == {3}
        assert point.get_xydata().tolist() == [[3, ROWS[2][key]]]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["kept: epoch 3"]
    assert axes[0, 1].get_ylabel() == "held-out PCC, mean over genes"


def test_without_held_out_regions(model):
    rows = [{key: row[key] for key in ("epoch", "loss")} for row in ROWS]
    ax = ps.pl.history(model(rows, best=None), show=False)
    assert ax.get_ylabel() == "training loss"
    assert len(ax.lines) == 1


def test_one_column_on_given_axes(model, tmp_path):
    _, ax = plt.subplots()
    assert ps.pl.history(model(ROWS), keys="lr", ax=ax, save=tmp_path / "lr.png") is ax
    assert ax.get_ylabel() == "learning rate"
    assert (tmp_path / "lr.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [(ROWS, "val_loss", "no 'val_loss'. It has 5 epochs, and of each 'loss', 'val_pcc'"), ([], None, "no epochs")],
)
def test_what_is_not_there(model, rows, keys, message):
    with pytest.raises(PixNetError, match=message):
        ps.pl.history(model(rows), keys=keys, show=False)
