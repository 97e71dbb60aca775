"""What a record says of a model, and that one which is worse than the genes' means is not used unasked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.tl.conftest import BINS

import pixnet_sd as ps
from pixnet_sd.errors import CheckpointError, DataError, DivergenceError


def rated(model, **said) -> ps.PixNet:
    training = {name: value for name, value in (model.record.training | said).items() if value != "unknown"}
    return ps.PixNet(model.network, replace(model.record, training=training))


@pytest.mark.parametrize(
    ("mse", "gene_mean_mse", "pcc", "is_poor"),
    [
        (2.5, 1.0, 0.0, True),
        (2.5, 1.0, None, True),
        (11.0, 1.0, 0.5, True),
        (1.3, 1.0, -0.1, False),  # not more than chance does
        (4.0, 1.0, 0.4, False),  # off, and yet it knows where
        (1e16, None, None, False),
        (1.0, 0.0, None, False),  # nothing varies
        ("unknown", "unknown", "unknown", False),  # of an older record
    ],
)
def test_only_a_poor_model_is_refused(slide, model, predict, mse, gene_mean_mse, pcc, is_poor):
    other = rated(model, mse=mse, gene_mean_mse=gene_mean_mse, pcc=pcc)
    error, names = (CheckpointError, "allow_poor_model") if is_poor else (DataError, "NONE_SUCH")
    with pytest.raises(error, match=names):  # the model is looked at before the genes are
        predict(slide, other, genes=["NONE_SUCH"])


def test_a_poor_model_predicts_when_told(slide, model, predict, caplog):
    predict(slide, rated(model, mse=1e16, gene_mean_mse=1.0), shapes_key=BINS, write=None, allow_poor_model=True)
    assert f"pixnet_{BINS}" in slide.tables
    assert "worse than none" in caplog.text


@pytest.mark.parametrize("options", [{"validation": 0.25}, {"validation": None, "objective": "nb_pcc"}])
def test_divergence_saves_nothing(slide, fit, tmp_path, options):
    with pytest.raises(DivergenceError, match=r"now 0.3\), for instance to 0.03"):
        fit(slide, checkpoint_dir=tmp_path / "model", lr=0.3, max_epochs=1, **options)
    assert not (tmp_path / "model" / "config.json").exists()
    assert "model" not in slide.attrs.get("pixnet_sd", {})
