"""`tl.fit`: what it takes, what it leaves, and when it does nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from safetensors.torch import save_file
from scipy import sparse

import pixnet_sd as ps
from pixnet_sd.engine.train import _batches as targets
from pixnet_sd.errors import CheckpointError, DataError, PixNetError
from pixnet_sd.model import PixNet, build_encoder
from pixnet_sd.tl import _fit

FULL, BINS, TABLE = "sample_full_image", "sample_square_008um", "square_008um"


@pytest.fixture(scope="session")
def drawn_pair() -> dict[str, sd.SpatialData]:
    """Two slides of other tissue, the second with bins of two sizes and a gene of its own."""
    pair = {
        "a": ps.datasets.sample(size_um=150, mpp=1.0, bin_um=(8,), seed=1),
        "b": ps.datasets.sample(size_um=150, mpp=1.0, bin_um=(8, 16), seed=2),
    }
    for table in pair["b"].tables.values():
        table.var_names = [name.replace("ACTB", "OTHER") for name in table.var_names]
    return pair


@pytest.fixture
def pair(drawn_pair) -> dict[str, sd.SpatialData]:
    """Objects of a test's own, over the same elements."""
    return {name: sd.SpatialData.init_from_elements(dict(_elements(sdata))) for name, sdata in drawn_pair.items()}


def _elements(sdata: sd.SpatialData):
    return ((name, element) for _, name, element in sdata.gen_elements())


def test_what_it_leaves(slide, fit, tmp_path, user_files):
    before = user_files(slide.path)
    model = fit(slide, checkpoint_dir=tmp_path / "model", validation=0.25)
    assert sorted(path.name for path in (tmp_path / "model").rglob("*") if path.is_file()) == [
        "checksums.json",
        "config.json",
        "model.safetensors",
    ]
    assert slide.attrs["pixnet_sd"]["model"] == str(tmp_path / "model")
    again = sd.read_zarr(slide.path)
    assert again.attrs["pixnet_sd"] == slide.attrs["pixnet_sd"]
    assert {name for _, name, _ in again.gen_elements()} == {name for _, name, _ in slide.gen_elements()}
    assert user_files(slide.path) == before
    assert model.genes == model.record.genes
    assert len(model.genes) == 6
    assert not model.network.training


def test_genes_are_the_highest(slide, model):
    counts = slide.tables[TABLE].to_df()
    mean = np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0)).mean().sort_values(ascending=False)
    assert model.genes == list(mean.index[:6])


def test_config_is_plain_json(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["format"] == "pixnet_sd/2"
    assert config["log_base"] == "e"
    assert config["target_sum"] == 1e4
    assert config["slides"]["slide"]["image"] == FULL
    assert config["slides"]["slide"]["mpp"] == 1.0
    assert config["slides"]["slide"]["tables"] == {TABLE: BINS}
    split = [config["slides"]["slide"][f"{part}_regions"][TABLE] for part in ("training", "held_out")]
    assert min(split) > 30
    assert sum(split) <= 408
    assert config["training"]["seed"] == 0
    assert len(config["held_out_pcc"]) == 6


def test_history(model):
    history = model.history
    assert isinstance(history, pd.DataFrame)
    assert list(history.index) == [1, 2]
    assert {"loss", "val_pcc", "val_mse", "lr", "seconds"} <= set(history.columns)
    assert np.isfinite(history.to_numpy()).all()
    best = int(history["val_pcc"].idxmax())
    assert model.record.training["best_epoch"] == best
    assert np.nanmean(np.array(model.record.held_out_pcc, float)) == pytest.approx(history["val_pcc"][best], abs=1e-6)


def test_same_call_returns_the_finished_model(slide, fit, tmp_path, caplog, monkeypatch):
    first = fit(slide, checkpoint_dir=tmp_path / "model")
    monkeypatch.setattr("pixnet_sd.tl._fit.train", None)
    caplog.set_level("INFO", "pixnet_sd")
    second = fit(sd.read_zarr(slide.path), checkpoint_dir=tmp_path / "model")
    assert "the same run has finished before" in caplog.text
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key])


@pytest.mark.parametrize("other", [{"lr": 1e-3}, {"seed": 1}, {"aggregation": "sum"}, {"target_sum": 1e3}])
def test_other_settings_into_the_same_folder(slide, fit, checkpoint, other, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=f"already holds .* {next(iter(other))}'"):
        fit(slide, checkpoint_dir=tmp_path / "model", validation=0.25, **other)
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_predicting_does_not_change_what_is_trained(fitted, fit, predict, checkpoint, monkeypatch):
    """Results of ours beside the counts are not taken for counts."""
    predict(fitted, shapes_key=BINS)
    monkeypatch.setattr("pixnet_sd.tl._fit.train", None)
    fit(fitted, checkpoint_dir=checkpoint, validation=0.25)


def test_folder_beside_the_store(slide, fit):
    fit(slide, max_epochs=1)
    folder = Path(slide.attrs["pixnet_sd"]["model"])
    assert folder.parent == Path(slide.path).parent.resolve() / "pixnet_sd_models"
    assert (folder / "model.safetensors").is_file()


def test_object_in_memory(pair, fit, predict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(pair["a"], max_epochs=1)
    assert Path(pair["a"].attrs["pixnet_sd"]["model"]).parent == tmp_path.resolve() / "pixnet_sd_models"
    predict(pair["a"], bin_um=16)
    assert "pixnet_bins_16um" in pair["a"].tables


def test_two_slides(pair, fit, tmp_path):
    model = fit(pair, checkpoint_dir=tmp_path / "model", validation=["b"])
    assert "ACTB" not in model.genes
    slides = model.record.slides
    assert slides["a"]["held_out_regions"] == {}
    assert slides["b"]["training_regions"] == {}
    assert set(slides["b"]["held_out_regions"]) == {"square_008um", "square_016um"}
    for sdata in pair.values():
        assert sdata.attrs["pixnet_sd"]["model"] == str(tmp_path / "model")


def test_genes_come_from_training_slides(pair, fit, tmp_path):
    """A gene that the held-out slide lacks cannot be scored there."""
    with pytest.raises(DataError, match=r"genes are not in table 'square_008um' of slide 'b': 'ACTB'"):
        fit(pair, checkpoint_dir=tmp_path / "model", validation=["b"], genes=["ACTB", "CD68"])


def test_several_tables(pair, fit, tmp_path):
    keys = ["square_008um", "square_016um"]
    model = fit(pair["b"], checkpoint_dir=tmp_path / "model", table_key=keys, validation=None)
    assert set(model.record.slides["slide"]["training_regions"]) == set(keys)
    assert model.record.held_out_pcc == []
    assert "held_out_pcc" not in model.record.var
    assert {"loss", "lr", "seconds"} == set(model.history.columns)


def test_named_genes_in_order(slide, fit, tmp_path):
    model = fit(slide, checkpoint_dir=tmp_path / "model", genes=["CD68", "ACTB"], max_epochs=1)
    assert model.genes == ["CD68", "ACTB"]


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_aggregation_starts_at_the_mean(slide, fit, predict, tmp_path, aggregation):
    """With either, predictions are on the scale of the targets from the start."""
    model = fit(slide, checkpoint_dir=tmp_path / "model", aggregation=aggregation, max_epochs=1, lr=1e-5)
    assert model.record.aggregation == aggregation
    predict(slide, shapes_key=BINS, write=None)
    scores = ps.tl.evaluate(slide, table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    counts = slide.tables[TABLE].to_df()
    target = np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0))[model.genes]
    assert scores.attrs["MSE"] < 2 * target.var(ddof=0).mean()


def test_few_regions(slide, fit, tmp_path):
    few = slide.tables.pop(TABLE)[:6].copy()
    slide.tables[TABLE] = few
    with pytest.warns(UserWarning, match="Only 6 regions to learn from"):
        fit(slide, checkpoint_dir=tmp_path / "model", validation=None, max_epochs=1)


def test_paper_preset(slide, fit, predict, tmp_path):
    paper = {**vars(ps.ModelParams.paper()), **vars(ps.TrainParams.paper())}
    own = {k: v for k, v in paper.items() if k in ("decoder", "aggregation", *vars(ps.TrainParams()))}
    model = fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1, **{**own, "tile_px": 128})
    settings = model.record.training
    assert (settings["optimizer"], settings["anneal"], settings["patience"]) == ("adam", False, None)
    assert settings["pcc_weight"] == 0.5
    assert model.record.decoder.widths is None
    assert model.record.decoder.hidden == (16, 16, 16)
    predict(slide, bin_um=16, write=None)
    assert np.isfinite(slide.tables["pixnet_bins_16um"].X).all()


@pytest.mark.parametrize("objective", ["poisson", "nb"])
def test_counts(slide, fit, tmp_path, objective):
    """One output more than genes, densities that are never negative, and the mean of the slide at the start."""
    model = fit(slide, checkpoint_dir=tmp_path / "model", objective=objective, max_epochs=1, lr=1e-5)
    assert model.record.objective == objective
    assert model.record.aggregation == "sum"
    assert model.record.outputs == [*model.genes, "total_counts"]
    assert len(model.record.held_out_pcc) == len(model.genes)
    found = PixNet.load(tmp_path / "model").network
    with torch.inference_mode():
        density = found.gene_map(found(torch.full((1, 3, 64, 64), 180.0)))
    assert density.shape[1] == 7
    assert (density > 0).all()
    counts = slide.tables[TABLE].X.sum() / (slide.tables[TABLE].n_obs * 8**2)
    assert found.head.unit[-1] == pytest.approx(counts, rel=0.1)


def test_depth_of_slides_is_relative(pair, fit, tmp_path):
    deep = pair["b"].tables[TABLE].copy()
    deep.X = deep.X * 3
    pair["b"].tables[TABLE] = deep
    seen = []
    train = _fit.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _fit, "train", lambda network, slides, *a, **k: (seen.extend(slides), train(network, slides, *a, **k))[1]
        )
        fit(pair, checkpoint_dir=tmp_path / "model", objective="poisson", max_epochs=1, validation=None)
    one, other = (slide.depth for slide in seen)
    assert one + other == pytest.approx(2)
    assert other > 2 * one


def test_the_whole_transcriptome(slide, fit, tmp_path, monkeypatch):
    """All genes with 10 counts; taken some at a time they come to the same weights, but for rounding."""
    counts = slide.tables[TABLE].X.sum(axis=0).A1
    weights = []
    for name, most in (("whole", 1024), ("parts", 16)):
        monkeypatch.setattr(targets, "DENSE_OUTPUTS", most)
        monkeypatch.setattr(targets, "_BLOCK_BYTES", 0)
        monkeypatch.setattr(targets, "_FEWEST", 16)
        model = fit(slide, checkpoint_dir=tmp_path / name, genes="all", max_epochs=1, lr=1e-3)
        assert len(model.genes) == (counts >= 10).sum() > 16
        weights.append(model.network.head.weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_frozen_encoder(slide, fit, tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", None)
    save_file(encoder.body.state_dict(), tmp_path / "encoder.safetensors")
    model = fit(
        slide,
        checkpoint_dir=tmp_path / "model",
        freeze_encoder=True,
        encoder_weights=tmp_path / "encoder.safetensors",
    )
    for key, value in encoder.body.state_dict().items():
        assert torch.equal(model.network.encoder.body.state_dict()[key], value), key
    assert model.record.encoder_weights == "encoder.safetensors"
    assert model.record.freeze_encoder
    assert not (tmp_path / "model" / "training").exists() or not list((tmp_path / "model" / "training").iterdir())


def test_same_seed_same_weights(slide, fit, tmp_path):
    models = [fit(slide, checkpoint_dir=tmp_path / name, seed=seed) for name, seed in (("1", 3), ("2", 3), ("3", 4))]
    one, two, other = (m.network.head.weight for m in models)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_it_learns(slide, fit, tmp_path):
    """A few epochs on counts without noise bring the loss well below that of the first."""
    truth = ps.datasets.sample_truth_bins(8, size_um=200, mpp=1.0, library_size=False)
    slide.tables[TABLE].X = sparse.csr_matrix(np.rint(100 * truth.to_numpy()).astype(np.float32))
    model = fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=8, lr=5e-3, validation=None, patience=None)
    assert model.history["loss"].iloc[-1] < 0.8 * model.history["loss"].iloc[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": ["b"]}, r"\['b'\].*slide"),
        ({"validation": ["slide"]}, "slide"),
        ({"tile_px": 2**20}, "tile_px=1048576"),
        ({"batch_size": 2**16}, "batch_size=65536"),
        ({"decoder_width": 2**16}, "decoder_width=65536"),
        ({"working_mpp": 1e-6}, "working_mpp=1e-06"),
        ({"working_mpp": 50.0}, "working_mpp=50"),
        ({"working_mpp": 1e-300}, "working_mpp=1e-300"),
        ({"encoder": "resnet19"}, "timm knows no model named 'resnet19'.*encoder="),
        ({"encoder_weights": "/no/such.pt"}, "no weights file at '/no/such.pt'"),
        ({"genes": ["actb", "CD68"]}, r"1 of 2 genes are not in table .*'actb' \(there is 'ACTB'\)"),
        ({"table_key": "counts"}, "There is no table 'counts'. Tables: 'square_008um'.*table_key="),
        ({"image_key": "he"}, "image_key="),
        ({"coordinate_system": "microns"}, "coordinate_system="),
        ({"device": "cuda:7"}, "cuda"),
        ({"device": "gpu"}, "gpu"),
        ({"objective": "poisson", "aggregation": "mean"}, "objective='poisson' sums densities: leave out aggregation="),
    ],
)
def test_arguments_that_do_not_fit(slide, fit, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("pixnet_sd.tl._checks.available_memory", lambda: 2**32)
    with pytest.raises(PixNetError, match=message):
        fit(slide, checkpoint_dir=tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()
    assert "pixnet_sd" not in sd.read_zarr(slide.path).attrs


def test_spots_without_counts_are_left_out(slide, fit, tmp_path):
    x = slide.tables[TABLE].X.tolil()
    x[:40] = 0
    slide.tables[TABLE].X = x.tocsr()
    with pytest.warns(UserWarning, match="40 of 408 regions have no counts at all and are left out"):
        model = fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1, validation=None)
    assert model.record.slides["slide"]["training_regions"] == {TABLE: 368}


def test_gene_without_counts(slide, fit, predict, tmp_path):
    """Never chosen; one that is named is learnt as zero and has no correlation."""
    names = slide.tables[TABLE].var_names
    x = slide.tables[TABLE].X.tolil()
    x[:, names.get_loc("GENE004")] = 0
    slide.tables[TABLE].X = x.tocsr()
    assert "GENE004" not in fit(slide, checkpoint_dir=tmp_path / "chosen", max_epochs=1).genes
    with pytest.warns(UserWarning, match=r"1 of the genes named have no counts in the training slides \('GENE004'\)"):
        model = fit(slide, checkpoint_dir=tmp_path / "named", genes=["CD68", "GENE004"], max_epochs=1)
    assert model.record.held_out_pcc[1] is None
    predict(slide, shapes_key=BINS, write=None)
    assert np.isfinite(slide.tables[f"pixnet_{BINS}"].X).all()
    scores = ps.tl.evaluate(slide, table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    assert np.isnan(scores.loc["GENE004", "pcc"])
    assert scores.attrs["PCC@M"] == scores.loc["CD68", "pcc"]


def test_logged_counts_are_warned_of(slide, fit, tmp_path):
    slide.tables[TABLE].X = slide.tables[TABLE].X.log1p()
    with pytest.warns(
        UserWarning, match=r"'square_008um': X holds logarithms already.* Put raw counts there"
    ) as caught:
        fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1)
    assert len([w for w in caught if "logarithms" in str(w.message)]) == 1


@pytest.mark.parametrize("factor", [500.3, 1.3])
def test_values_that_are_not_counts(slide, fit, tmp_path, factor):
    """A likelihood of counts refuses them whatever their size; logarithms of shares do not depend on it."""
    plain = fit(slide, checkpoint_dir=tmp_path / "plain", max_epochs=1)
    slide.tables[TABLE].X = slide.tables[TABLE].X * factor
    for objective in ("poisson", "nb"):
        with pytest.raises(DataError, match=f"'{TABLE}'.*objective='{objective}'"):
            fit(slide, checkpoint_dir=tmp_path / objective, objective=objective)
        assert not (tmp_path / objective).exists()
    assert fit(slide, checkpoint_dir=tmp_path / "scaled", max_epochs=1).genes == plain.genes


def test_antibodies_are_no_genes(slide, fit, tmp_path, caplog):
    table = slide.tables[TABLE]
    top = fit(slide, checkpoint_dir=tmp_path / "all", max_epochs=1).genes
    table.var["feature_types"] = [
        "Antibody Capture" if name in top[:3] else "Gene Expression" for name in table.var_names
    ]
    model = fit(slide, checkpoint_dir=tmp_path / "genes", max_epochs=1)
    assert not set(model.genes) & set(top[:3])
    assert "3 'Antibody Capture'" in caplog.text
    with pytest.raises(DataError, match=top[0]):
        fit(slide, checkpoint_dir=tmp_path / "named", genes=top[:1])


def test_store_that_cannot_be_written(slide, fit, predict, tmp_path, monkeypatch, caplog):
    """A slide on a read-only disk can be trained on; the model is then noted in memory only."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    before = (Path(slide.path) / "zarr.json").read_bytes()
    monkeypatch.setattr("pixnet_sd.store._notes.write_json", refuse)
    model = fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1)
    assert "recorded in memory only" in caplog.text
    assert "Read-only file system" in caplog.text
    assert slide.attrs["pixnet_sd"]["model"] == str(tmp_path / "model")
    assert ps.PixNet.load(tmp_path / "model").record == model.record
    assert (Path(slide.path) / "zarr.json").read_bytes() == before


@pytest.mark.parametrize("folder", ["file", "file/model"])
def test_checkpoint_dir_that_cannot_be_made(slide, fit, tmp_path, monkeypatch, folder):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pixnet_sd.tl._fit.train", None)  # it does not come to that
    with pytest.raises(CheckpointError, match="checkpoint_dir=.*file' is no folder"):
        fit(slide, checkpoint_dir=tmp_path / folder)


def test_all_slides_held_out(pair, fit, tmp_path):
    with pytest.raises(PixNetError, match="validation"):
        fit(pair, checkpoint_dir=tmp_path / "model", validation=["a", "b"])
