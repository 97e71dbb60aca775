"""`tl.fit`: what it takes, what it leaves, and when it does nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
import torch
from safetensors.torch import save_file
from scipy import sparse
from tests.tl.conftest import BINS, TABLE, user_files

import pixnet_sd as ps
from pixnet_sd.errors import DataError, PixNetError
from pixnet_sd.model import PixNet, build_encoder


@pytest.fixture
def pair() -> dict[str, sd.SpatialData]:
    """Two slides of other tissue, the second with bins of two sizes and a gene of its own."""
    pair = {
        "a": ps.datasets.sample(size_um=150, mpp=1.0, bin_um=(8,), seed=1),
        "b": ps.datasets.sample(size_um=150, mpp=1.0, bin_um=(8, 16), seed=2),
    }
    for table in pair["b"].tables.values():
        table.var_names = [name.replace("ACTB", "OTHER") for name in table.var_names]
    return pair


def test_what_it_leaves(slide, fitted, checkpoint):
    """A model's files, its name in the slide, and nothing else."""
    assert {path.name for path in checkpoint.rglob("*")} == {"checksums.json", "config.json", "model.safetensors"}
    assert fitted.attrs["pixnet_sd"]["model"] == str(checkpoint)
    assert user_files(fitted.path) == user_files(slide.path)
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["format"], config["log_base"], config["target_sum"]) == ("pixnet_sd/3", "e", 1e4)
    split = [config["slides"]["slide"][f"{part}_regions"][TABLE] for part in ("training", "held_out")]
    assert min(split) > 30
    assert sum(split) <= 408


def test_genes_and_history(slide, model):
    counts = slide.tables[TABLE].to_df()
    mean = np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0)).mean().sort_values(ascending=False)
    assert model.genes == model.record.genes == list(mean.index[:6])
    history = model.history
    assert list(history.index) == [1, 2]
    assert {"loss", "val_pcc", "val_mse", "lr", "seconds"} <= set(history.columns)
    assert np.isfinite(history.to_numpy()).all()
    best, said = int(history["val_pcc"].idxmax()), model.record.training
    assert (said["best_epoch"], said["scored_on"]) == (best, "held_out")
    assert (said["mse"], said["pcc"]) == tuple(history.loc[best, ["val_mse", "val_pcc"]])
    assert 0.5 < said["mse"] / said["gene_mean_mse"] < 1.5
    assert np.nanmean(np.array(model.record.held_out_pcc, float)) == pytest.approx(history["val_pcc"][best], abs=1e-6)


def test_the_same_call_takes_the_finished_model(
    fitted, fit, predict, model, checkpoint, no_training, tmp_path, monkeypatch, caplog
):
    """Whatever was predicted since (ours is not taken for counts), and with other versions of libraries."""
    predict(fitted, shapes_key=BINS)
    for name in ("torch", "anndata"):
        metadata = tmp_path / "site" / f"{name}-9.9.9.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    again = fit(fitted, checkpoint_dir=checkpoint, validation=0.25).network.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.network.state_dict().items())
    assert [record.levelname for record in caplog.records if "9.9.9" in record.getMessage()] == ["WARNING"]
    assert "anndata" not in caplog.text


def test_two_slides(pair, fit, tmp_path):
    """One held out; a gene that it lacks cannot be scored there."""
    model = fit(pair, checkpoint_dir=tmp_path / "model", validation=["b"], max_epochs=1)
    assert "ACTB" not in model.genes
    slides = model.record.slides
    assert slides["a"]["held_out_regions"] == slides["b"]["training_regions"] == {}
    assert set(slides["b"]["held_out_regions"]) == {"square_008um", "square_016um"}
    assert {sdata.attrs["pixnet_sd"]["model"] for sdata in pair.values()} == {str(tmp_path / "model")}
    with pytest.raises(DataError, match="'b'.*'ACTB'"):
        fit(pair, checkpoint_dir=tmp_path / "named", validation=["b"], genes=["ACTB", "CD68"])


def test_named_tables_and_genes_in_order_without_validation(pair, fit, tmp_path, monkeypatch):
    """Run twice, once in the default folder of a slide in memory, it ends with the same weights."""
    monkeypatch.chdir(tmp_path)
    options = {"table_key": ["square_008um", "square_016um"], "genes": ["OTHER", "CD68"], "validation": None}
    model, again = (fit(pair["b"], checkpoint_dir=folder, max_epochs=1, **options) for folder in ("model", None))
    assert Path(pair["b"].attrs["pixnet_sd"]["model"]).parent == tmp_path.resolve() / "pixnet_sd_models"
    assert model.genes == options["genes"]
    assert list(model.record.slides["slide"]["training_regions"]) == options["table_key"]
    assert model.record.held_out_pcc == []
    assert {"loss", "lr", "seconds"} == set(model.history.columns)
    one, other = (each.network.state_dict() for each in (model, again))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.filterwarnings("ignore:.*common divisor")
def test_depth_of_slides_is_relative(pair, run_of):
    pair["b"].tables[TABLE].X *= 3
    depths = [slide.depth for slide in run_of(pair, objective="nb_pcc", validation=None).training]
    assert sum(depths) == pytest.approx(2)
    assert depths[1] > 2 * depths[0]


def test_the_papers_parameters(slide, tmp_path):
    network = ps.ModelParams.paper(encoder="test_resnet", encoder_weights=None, decoder_width=16, working_mpp=1.0)
    options = {"model_params": network, "train_params": ps.TrainParams.paper(tile_px=128), "device": "cpu"}
    options["objective"] = "mse_pcc"
    record = ps.tl.fit(slide, checkpoint_dir=tmp_path / "model", genes=6, max_epochs=1, **options).record
    said = [record.training[name] for name in ("optimizer", "anneal", "patience", "pcc_weight", "keep_best")]
    assert said == ["adam", False, None, 0.5, False]
    assert (record.aggregation, record.decoder.widths, record.decoder.hidden) == ("sum", None, (16, 16, 16))


def test_counts(slide, fit, tmp_path):
    """All genes with 10 counts; one output more, positive densities, and the mean of the slide at the start."""
    table = slide.tables[TABLE]
    model = fit(slide, checkpoint_dir=tmp_path / "model", objective="nb_pcc", genes="all", max_epochs=1, lr=1e-5)
    assert set(model.genes) == set(table.var_names[np.asarray(table.X.sum(axis=0)).ravel() >= 10])
    assert (model.record.objective, model.record.aggregation) == ("nb_pcc", "sum")
    assert model.record.outputs == [*model.genes, "total_counts"]
    found = PixNet.load(tmp_path / "model").network
    with torch.inference_mode():
        density = found.gene_map(found(torch.full((1, 3, 64, 64), 180.0)))
    assert density.shape[1] == len(model.genes) + 1
    assert (density > 0).all()
    assert found.head.unit[-1] == pytest.approx(table.X.sum() / (table.n_obs * 8**2), rel=0.1)


def test_frozen_encoder(slide, fit, tmp_path):
    weights, path = build_encoder("test_resnet", None).body.state_dict(), tmp_path / "encoder.safetensors"
    save_file(weights, path)
    model = fit(slide, checkpoint_dir=tmp_path / "model", freeze_encoder=True, encoder_weights=path, max_epochs=1)
    kept = model.network.encoder.body.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in weights.items())
    assert (model.record.encoder_weights, model.record.freeze_encoder) == ("encoder.safetensors", True)
    assert not (tmp_path / "model" / "training").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": ["b"]}, r"\['b'\].*slide"),
        ({"tile_px": 2**20}, "tile_px=1048576"),
        ({"batch_size": 2**16}, "batch_size=65536"),
        ({"decoder_width": 2**16}, "decoder_width=65536"),
        ({"working_mpp": 1e-6}, "working_mpp=1e-06"),
        ({"working_mpp": 50.0}, "working_mpp=50"),
        ({"encoder": "resnet19"}, "'resnet19'.*encoder="),
        ({"genes": ["actb", "CD68"]}, "'actb'.*'ACTB'"),
        ({"table_key": "counts"}, "'counts'.*'square_008um'.*table_key="),
        ({"image_key": "he"}, "image_key="),
        ({"coordinate_system": "microns"}, "coordinate_system="),
        ({"checkpoint_dir": __file__}, "checkpoint_dir="),
        ({"checkpoint_dir": f"{__file__}/model"}, "checkpoint_dir="),
        ({"objective": "nb_pcc", "aggregation": "mean"}, "objective='nb_pcc'.*aggregation="),
    ],
)
def test_arguments_that_do_not_fit(slide, fit, tmp_path, monkeypatch, arguments, message):
    """Of what does not fit into memory, on a machine that has 4 GiB left."""
    read = Path.read_text
    memory = {"/proc/meminfo": "MemAvailable: 4194304 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: memory.get(str(self)) or read(self, *a, **k))
    with pytest.raises(PixNetError, match=message):
        fit(slide, **({"checkpoint_dir": tmp_path / "new" / "model"} | arguments))
    assert not (tmp_path / "new").exists()
    assert "pixnet_sd" not in slide.attrs


@pytest.mark.parametrize(
    ("first", "change", "message", "n_regions"),
    [
        (slice(6), lambda x: x, "Only 6 regions", 6),
        (slice(None), lambda x: sparse.vstack([0 * x[:40], x[40:]], format="csr"), "40 of 408 regions", 368),
        (slice(None), lambda x: x.log1p(), f"'{TABLE}'.*logarithms", 408),
    ],
)
def test_counts_that_are_warned_of_once(slide, fit, tmp_path, first, change, message, n_regions):
    slide.tables[TABLE] = slide.tables.pop(TABLE)[first].copy()
    slide.tables[TABLE].X = change(slide.tables[TABLE].X)
    with pytest.warns(UserWarning, match=message) as caught:
        model = fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1, validation=None)
    assert model.record.slides["slide"]["training_regions"] == {TABLE: n_regions}
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1


def test_gene_without_counts(slide, fit, tmp_path):
    """One that is named is learnt as zero and has no correlation."""
    table = slide.tables[TABLE]
    table.X = table.X.multiply(table.var_names != "GENE004").tocsr()
    with pytest.warns(UserWarning, match="'GENE004'"):
        model = fit(slide, checkpoint_dir=tmp_path / "model", genes=["CD68", "GENE004"], max_epochs=1)
    assert [pcc is None for pcc in model.record.held_out_pcc] == [False, True]


def test_store_that_cannot_be_written(slide, fit, tmp_path, monkeypatch, caplog):
    """A slide on a read-only disk can be trained on; the model is then noted in memory only."""
    notes, replace = Path(slide.path) / "zarr.json", Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == notes:
            raise OSError(errno.EROFS, "Read-only file system")
        return replace(self, target)

    before = notes.read_bytes()
    monkeypatch.setattr(Path, "replace", refuse)
    model = fit(slide, checkpoint_dir=tmp_path / "model", max_epochs=1)
    assert "Read-only file system" in caplog.text
    assert slide.attrs["pixnet_sd"]["model"] == str(tmp_path / "model")
    assert ps.PixNet.load(tmp_path / "model").record == model.record
    assert notes.read_bytes() == before
