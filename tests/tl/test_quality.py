"""What a record says of a model, and that one which is worse than the genes' means is not used unasked."""

from __future__ import annotations

from dataclasses import replace

import pytest

import pixnet_sd as ps
from pixnet_sd.errors import CheckpointError, DivergenceError

BINS = "sample_square_008um"


def rated(model, **said) -> ps.PixNet:
    return ps.PixNet(model.network, replace(model.record, training=model.record.training | said))


def test_the_record_says_what_a_model_is_worth(model):
    said = model.record.training
    assert said["scored_on"] == "held_out"
    (row,) = [row for row in model.record.history if row["epoch"] == said["best_epoch"]]
    assert said["mse"] == row["val_mse"]
    assert said["pcc"] == row["val_pcc"]
    assert 0.5 < said["mse"] / said["gene_mean_mse"] < 1.5


@pytest.mark.parametrize(("mse", "pcc"), [(2.5, 0.0), (2.5, None), (1e16, 0.9), (11.0, 0.5)])
def test_a_poor_model_is_refused_unless_told(fitted, model, predict, forward_passes, mse, pcc, caplog):
    poor = rated(model, mse=mse, gene_mean_mse=1.0, pcc=pcc)
    with pytest.raises(CheckpointError, match="allow_poor_model"):
        predict(fitted, poor, shapes_key=BINS)
    assert not forward_passes
    predict(fitted, poor, shapes_key=BINS, write=None, allow_poor_model=True)
    assert f"pixnet_{BINS}" in fitted.tables
    assert "worse than none" in caplog.text


@pytest.mark.parametrize(
    "said",
    [
        {"mse": 1.3, "gene_mean_mse": 1.0, "pcc": -0.1},  # not more than chance does
        {"mse": 4.0, "gene_mean_mse": 1.0, "pcc": 0.4},  # off, and yet it knows where
        {"mse": 1e16, "gene_mean_mse": None, "pcc": None},
        {"mse": 1.0, "gene_mean_mse": 0.0, "pcc": None},  # nothing varies
        None,  # of an older record
    ],
)
def test_another_is_not(fitted, model, predict, said):
    training = dict(model.record.training) | (said or {})
    for name in () if said else ("mse", "gene_mean_mse", "pcc", "scored_on"):
        del training[name]
    other = ps.PixNet(model.network, replace(model.record, training=training))
    predict(fitted, other, shapes_key=BINS, write=None)


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "nb"}, {"optimizer": "adam", "keep_best": False, "decoder": "paper", "aggregation": "sum"}],
    ids=str,
)
def test_divergence_saves_nothing(slide, fit, tmp_path, options):
    for validation in (None, 0.25):
        folder = tmp_path / f"model{validation}"
        with pytest.raises(DivergenceError, match=r"now 0.3\), for instance to 0.03"):
            fit(slide, checkpoint_dir=folder, lr=0.3, validation=validation, max_epochs=1, **options)
        assert not (folder / "config.json").exists()
    assert "model" not in slide.attrs.get("pixnet_sd", {})
