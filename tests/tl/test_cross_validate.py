"""Slides left out in turn: what is trained on, what is scored, and that a second call trains nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
import torch
from tests.tl.conftest import BINS, FAST, FIT, TABLE, content, grouped

import pixnet_sd as ps
from pixnet_sd.engine.train import Moments
from pixnet_sd.errors import CheckpointError, PixNetError
from pixnet_sd.tl import pooled, read_scores, write_scores

METRICS = ["MSE", "MAE", "PCC@F", "PCC@S", "PCC@M"]


@pytest.fixture(scope="module")
def slides(_drawn: Path, tmp_path_factory) -> dict[str, sd.SpatialData]:
    """Three slides with the same image; a bin of the first is on glass, in the third other genes are expressed most."""
    folder = tmp_path_factory.mktemp("slides")
    paths = {name: folder / f"{name}.zarr" for name in "ABC"}
    shutil.copytree(_drawn, paths["B"])
    first, other = sd.read_zarr(_drawn), sd.read_zarr(_drawn)
    place = ["array_row", "array_col"]
    row, col = first.tables[TABLE].obs.iloc[200][place]
    first.tables[TABLE].obs.loc[first.tables[TABLE].obs_names[200], place] = 0
    bins = first.shapes[BINS].geometry
    bins.iloc[200] = shapely.affinity.translate(bins.iloc[200], -8 * col, -8 * row)
    first.write(paths["A"])
    table = other.tables[TABLE]
    other.tables[TABLE] = ad.AnnData(table.X[:, ::-1], obs=table.obs, var=table.var, obsm=table.obsm, uns=table.uns)
    other.write(paths["C"])
    return {name: sd.read_zarr(path) for name, path in paths.items()}


def run(slides, folder, fit_params=None, **arguments):
    params = grouped(FIT, **FAST) | {"validation": 0.25, "max_epochs": 1, "objective": "nb_pcc"} | (fit_params or {})
    del params["show_progress_bar"]
    arguments = {"groups": {"A": "one", "B": "one", "C": "two"}, "checkpoint_dir": folder} | arguments
    options = {"predict_tile_px": 256, "show_progress_bar": False}
    return ps.tl.cross_validate(slides, fit_params=params, **options, **arguments)


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory):
    """Result for two groups, {A, B} and {C}, its folder, and the stores' content before."""
    before, folder = [content(slide.path) for slide in slides.values()], tmp_path_factory.mktemp("folds") / "cv"
    return run(slides, folder), folder, before


def test_a_fold_knows_nothing_of_what_it_leaves_out(finished, slides):
    result, _, before = finished
    models = {fold: ps.PixNet.load(folder) for fold, folder in result.folders.items()}
    assert {fold: set(model.record.slides) for fold, model in models.items()} == {"one": {"C"}, "two": {"A", "B"}}
    for fold, slide in {"one": "C", "two": "A"}.items():
        table = slides[slide].tables[TABLE]
        counts = table.X.toarray()
        counts = counts[counts.sum(axis=1) > 0]
        top = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).mean(axis=0).argsort()[-6:]
        assert set(models[fold].genes) == set(table.var_names[top])
    assert [content(slide.path) for slide in slides.values()] == before  # slides are not changed


def test_scores_are_those_of_predict_and_evaluate(finished, slides, predict, tmp_path):
    result, folder, _ = finished
    sdata = sd.read_zarr(shutil.copytree(slides["A"].path, tmp_path / "A.zarr"))
    predict(sdata, folder / "one", shapes_key=BINS, write=None)
    expected = ps.tl.evaluate(sdata, table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    of_genes = result.per_gene.query("slide == 'A'").set_index("gene")
    pd.testing.assert_frame_equal(of_genes[expected.columns], expected.loc[of_genes.index], rtol=1e-4, atol=1e-5)
    row = result.per_slide.set_index("slide").loc["A"]
    assert row[[*METRICS, "coverage", "n_regions", "n_genes"]].to_dict() == pytest.approx(
        expected.attrs, rel=1e-4, abs=1e-5
    )


def test_summary(finished):
    result, folder, _ = finished
    assert list(result.per_slide["slide"]) == ["A", "B", "C"]
    rows = result.summary.set_index("how")
    assert rows.loc["mean per slide", METRICS].to_dict() == pytest.approx(result.per_slide[METRICS].mean().to_dict())
    one, two = (set(ps.PixNet.load(folder / fold).genes) for fold in ("one", "two"))
    n_regions = result.per_slide["n_regions"].sum()
    assert rows.loc["pooled", ["n_genes", "n_regions"]].tolist() == [len(one & two), n_regions]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "summary.csv"), result.summary)


def test_finished_folds_are_taken_as_they_are_and_damaged_scores_made_anew(finished, slides, tmp_path, caplog):
    result, folder, _ = finished
    caplog.set_level("INFO", "pixnet_sd")
    copy = shutil.copytree(folder, tmp_path / "cv")
    (copy / "two" / "scores.json").write_text("{")
    again = run(slides, copy)
    assert caplog.text.count("has finished before") == 2
    assert caplog.text.count("scores taken from") == 1
    for name in ("per_gene", "per_slide", "summary"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(result, name))
    one = run(slides, copy, folds="two")
    assert caplog.text.count("scores taken from") == 2
    pd.testing.assert_frame_equal(one.per_slide, result.per_slide.query("fold == 'two'").reset_index(drop=True))
    other, fresh = (run(slides | {"A": slides["C"]}, place, folds="one") for place in (copy, tmp_path / "fresh"))
    assert other.per_gene.equals(fresh.per_gene)  # scores of a slide that was another
    assert not other.per_gene.equals(result.per_gene.query("fold == 'one'"))
    with pytest.raises(CheckpointError):  # of other options
        run(slides, copy, {"train_params": {"lr": 1e-3}})


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"groups": {"A": "x"}}, PixNetError, r"groups= .*\['B', 'C'\]"),
        ({"groups": dict.fromkeys("ABC", "x")}, PixNetError, "groups=.*'x'"),
        ({"groups": {"A": "a/b", "B": "b", "C": "c"}}, PixNetError, r"\['a/b'\]"),
        ({"folds": ["three"]}, PixNetError, r"folds=\['three'\].*\['one', 'two'\]"),
        ({"fit_params": {"n_gene": 3}}, TypeError, "n_gene"),
        ({"fit_params": {"record_model": True}}, PixNetError, "fit_params=.*'record_model'"),
        ({"fit_params": {"validation": ["C"]}}, PixNetError, "validation="),
        ({"fit_params": {"mpp": "half"}}, PixNetError, "mpp="),
        ({"score_table_key": "cells"}, PixNetError, "score_table_key=.*'cells'"),
        ({}, PixNetError, "sdatas="),  # of one slide
    ],
)
def test_refused(slides, tmp_path, arguments, error, names):
    with pytest.raises(error, match=names):
        run(slides if arguments else {"A": slides["A"]}, tmp_path / "cv", **arguments)
    assert not (tmp_path / "cv").exists()


def moments(predicted: np.ndarray, measured: np.ndarray, genes: pd.Index) -> pd.DataFrame:
    of_genes = Moments.of(*map(torch.from_numpy, (predicted, measured)))._asdict()
    return pd.DataFrame(of_genes | {"coverage": (measured > 0).mean(axis=0)}, index=genes)


def test_pooled_regions_are_scored_as_those_of_one_slide():
    """Over the genes of both, in whichever order each has them."""
    rng, genes = np.random.default_rng(0), pd.Index([f"G{k}" for k in range(70)], name="gene")
    target = rng.normal(5, 1, (40, 70)).astype(np.float32)
    predicted = (0.5 * target + rng.normal(0, 1, target.shape)).astype(np.float32)
    parts = [moments(predicted[rows], target[rows], genes) for rows in (slice(0, 5), slice(5, 40))]
    expected = pooled([moments(predicted, target, genes)])
    assert expected["pcc"].mean() > 0.3
    pd.testing.assert_frame_equal(pooled([parts[0], parts[1][::-1][1:]]), expected[:-1])


def test_scores_come_back_whole_or_are_not_taken_and_go_through_no_link(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 9, 3)).astype(np.float32)
    values[0, :, 1] = np.nan
    scores = {("slide", "table"): moments(*values, pd.Index(["A", "B", "µ"], name="gene"))}
    path, other = tmp_path / "scores.json", tmp_path / "mine"
    other.write_text("years of work")
    for name in ("scores.json", "scores.json.partial"):
        (tmp_path / name).symlink_to(other)
    write_scores(tmp_path, {"weights": "a"}, scores)
    assert other.read_text() == "years of work"
    assert read_scores(tmp_path, {"weights": "b"}) is None
    whole = path.read_bytes()
    flips = [(bit // 8, 1 << bit % 8) for bit in range(0, 8 * len(whole), 8 * len(whole) // 80)]
    for place, flip in [(0, 0), *flips]:
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        read = read_scores(tmp_path, {"weights": "a"})
        assert flip or read is not None
        if read is not None:  # 1E-5 is the same as 1e-5
            pd.testing.assert_frame_equal(read["slide", "table"], scores["slide", "table"], check_exact=True)
    for text in (b"", whole[:-2], b"[" * 10_000, b"{}", json.dumps({"identity": {"weights": "a"}}).encode()):
        path.write_bytes(text)
        assert read_scores(tmp_path, {"weights": "a"}) is None
