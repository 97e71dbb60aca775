"""Slides left out in turn: what is trained on, what is scored, and that a second call trains nothing."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch

import pixnet_sd as ps
from pixnet_sd.errors import CheckpointError, PixNetError
from pixnet_sd.model._objectives import pearson_per_gene
from pixnet_sd.tl._evaluate import METRICS, moments, pooled

TABLE, BINS = "square_008um", "sample_square_008um"


def hashes(store: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def stores(_drawn: Path, tmp_path_factory) -> dict[str, Path]:
    """Three slides with the same image; in the third, other genes are the most expressed."""
    folder = tmp_path_factory.mktemp("slides")
    found = {name: folder / f"{name}.zarr" for name in "ABC"}
    for store in found.values():
        shutil.copytree(_drawn, store)
    other = sd.read_zarr(_drawn)
    table = other.tables[TABLE]
    other.tables[TABLE] = ad.AnnData(table.X[:, ::-1], obs=table.obs, var=table.var, obsm=table.obsm, uns=table.uns)
    shutil.rmtree(found["C"])
    other.write(found["C"])
    return found


@pytest.fixture(scope="module")
def finished(stores, fast, tmp_path_factory):
    """Result for two groups, {A, B} and {C}, its folder, and hashes of the stores before."""
    before = {name: hashes(store) for name, store in stores.items()}
    folder = tmp_path_factory.mktemp("folds") / "cv"
    return run(stores, fast, folder), folder, before


def run(stores, fast, folder, **arguments):
    slides = {name: sd.read_zarr(store) for name, store in stores.items()}
    groups = {"A": "one", "B": "one", "C": "two"}
    options = fast | {"validation": 0.25, "checkpoint_dir": folder, "groups": groups, "max_epochs": 1} | arguments
    return ps.tl.cross_validate(slides, **options)


def test_a_fold_knows_nothing_of_what_it_leaves_out(finished, stores):
    result, _, _ = finished
    models = {fold: ps.PixNet.load(folder) for fold, folder in result.folders.items()}
    assert {fold: set(model.record.slides) for fold, model in models.items()} == {"one": {"C"}, "two": {"A", "B"}}
    for fold, slide in {"one": "C", "two": "A"}.items():
        table = sd.read_zarr(stores[slide]).tables[TABLE]
        counts = table.X.toarray()
        counts = counts[counts.sum(axis=1) > 0]
        top = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).mean(axis=0).argsort()[-6:]
        assert set(models[fold].genes) == set(table.var_names[top])


def test_slides_are_not_changed(finished, stores):
    _, _, before = finished
    assert {name: hashes(store) for name, store in stores.items()} == before


def test_scores_are_those_of_predict_and_evaluate(finished, stores, predict, tmp_path):
    result, folder, _ = finished
    store = shutil.copytree(stores["A"], tmp_path / "A.zarr")
    sdata = sd.read_zarr(store)
    predict(sdata, folder / "one", shapes_key=BINS, write=None)
    expected = ps.tl.evaluate(sdata, table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    found = result.per_gene.query("slide == 'A'").set_index("gene")
    pd.testing.assert_frame_equal(found[["pcc", "mse", "mae"]], expected.loc[found.index], rtol=1e-4, atol=1e-5)
    row = result.per_slide.set_index("slide").loc["A"]
    assert row[[*METRICS, "n_regions", "n_genes"]].to_dict() == pytest.approx(expected.attrs, rel=1e-4, abs=1e-5)


def test_summary(finished):
    result, folder, _ = finished
    assert list(result.per_slide["slide"]) == ["A", "B", "C"]
    rows = result.summary.set_index("how")
    assert set(rows.index) == {"mean per slide", "pooled"}
    for name in METRICS:
        assert rows.loc["mean per slide", name] == pytest.approx(result.per_slide[name].mean())
    shared = set.intersection(*(set(ps.PixNet.load(f).genes) for f in result.folders.values()))
    assert rows.loc["pooled", "n_genes"] == len(shared)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "summary.csv"), result.summary)


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a finished fold was trained or predicted again")

    monkeypatch.setattr("pixnet_sd.tl._fit.train", refuse)
    monkeypatch.setattr("pixnet_sd.tl._cross_validate.predict", refuse)


def test_finished_folds_are_taken_as_they_are(finished, stores, fast, no_work):
    result, folder, _ = finished
    again = run(stores, fast, folder)
    for name in ("per_gene", "per_slide", "summary"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(result, name))
    one = run(stores, fast, folder, folds="two")
    assert list(one.per_slide["slide"]) == ["C"]


def test_a_damaged_score_is_made_anew(finished, stores, fast, tmp_path):
    result, folder, _ = finished
    copy = shutil.copytree(folder, tmp_path / "cv")
    (copy / "two" / "scores.json").write_text("{")
    again = run(stores, fast, copy, folds=["two"])
    pd.testing.assert_frame_equal(again.per_slide, result.per_slide.query("fold == 'two'").reset_index(drop=True))


def test_folder_of_other_options(finished, stores, fast):
    _, folder, _ = finished
    with pytest.raises(CheckpointError, match="already holds a model of another run"):
        run(stores, fast, folder, lr=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": {"A": "x"}}, r"no group for the slides \['B', 'C'\]"),
        ({"groups": dict.fromkeys("ABC", "x")}, "All slides are in group 'x': nothing would be left"),
        ({"groups": {"A": "a/b", "B": "b", "C": "c"}}, r"Folds become folders, and \['a/b'\] cannot"),
        ({"folds": ["three"]}, r"folds=\['three'\]: folds are called after what they leave out, \['one', 'two'\]"),
        ({"n_gene": 3}, "'n_gene' is no option .* Did you mean 'n_genes'?"),
        ({"record_model": True}, "'record_model' is no option"),
        ({"validation": ["C"]}, "validation="),
        ({"score_table_key": "cells"}, "score_table_key=.*'cells'"),
    ],
)
def test_refused(stores, fast, tmp_path, arguments, message):
    with pytest.raises(PixNetError, match=message):
        run(stores, fast, tmp_path / "cv", **arguments)
    assert not (tmp_path / "cv").exists()


def test_one_slide(slide):
    for given in (slide, {"A": slide}):
        with pytest.raises(PixNetError, match=r"with one slide, fit\(sdata, validation=0.2\) holds out blocks"):
            ps.tl.cross_validate(given)


def test_pooled_of_one_slide_is_its_score():
    rng = np.random.default_rng(0)
    genes = pd.Index([f"G{k}" for k in range(70)])
    target = rng.normal(5, 1, (40, 70)).astype(np.float32)
    predicted = (0.5 * target + rng.normal(0, 1, target.shape)).astype(np.float32)
    target[:, 3], predicted[:, 66] = 1.7, 0.3
    p, t = predicted.astype(np.float64), target.astype(np.float64)
    pcc = pearson_per_gene(torch.from_numpy(p), torch.from_numpy(t)).numpy()
    expected = pd.DataFrame({"pcc": pcc, "mse": ((p - t) ** 2).mean(0), "mae": np.abs(p - t).mean(0)}, index=genes)
    pd.testing.assert_frame_equal(pooled([moments(predicted, target, genes)]), expected, check_names=False)
    parts = [moments(predicted[rows], target[rows], genes) for rows in (slice(0, 5), slice(5, 40))]
    shuffled = [parts[0], parts[1][::-1]]
    pd.testing.assert_frame_equal(pooled(shuffled), expected, check_names=False)
    assert pooled(parts)["pcc"].isna().sum() == 1
    assert pooled(parts).loc["G66", "pcc"] == 0
