"""The demo, on a slide so small that little is learnt: what it writes, what it holds out, and when it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from PIL import Image

import pixnet_sd as ps
from pixnet_sd.cli import _demo as demo

pytest.importorskip("matplotlib")

SMALL = {"size_um": 200.0, "epochs": 1, "seed": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit status, where nothing is asked of the PCC, and output folder."""
    output = tmp_path_factory.mktemp("demo") / "output"
    return demo.demo(**SMALL, min_pcc=-1, output=output), output


def test_leaves_store_model_and_picture(finished: tuple[int, Path]) -> None:
    status, output = finished
    assert status == 0
    slide = sd.read_zarr(output / "sample.zarr")
    assert {"pixnet_circles_8um", "pixnet_sample_square_008um"} <= set(slide.tables)
    assert "pixnet_map" in slide.images
    assert ps.PixNet.load(output / "model").genes == list(slide.tables["square_008um"].var_names)
    picture = np.asarray(Image.open(output / "demo.png").convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 500
    assert picture.std() > 20


def test_trains_on_no_held_out_bin(finished: tuple[int, Path]) -> None:
    _, output = finished
    options = demo.Options(**SMALL, min_pcc=-1, output=output)
    slide = sd.read_zarr(output / "sample.zarr")
    (used,) = ps.PixNet.load(output / "model").record.slides.values()
    left = {key: int((demo.x_um(slide.tables[key]) < 108).sum()) for key in used["training_regions"]}
    assert options.cut_um == pytest.approx(140)
    assert used["training_regions"] == left
    assert set(left) == {"square_008um", "square_016um"}


def test_score_of_the_truth_is_one(finished: tuple[int, Path]) -> None:
    """Bins and genes are matched by name: the truth, rows in another order, correlates fully with itself."""
    _, output = finished
    options = demo.Options(**SMALL, min_pcc=-1, output=output)
    slide = sd.read_zarr(output / "sample.zarr")
    predicted = slide.tables[demo.PREDICTED]
    turned = predicted[::-1].copy()
    measured = slide.tables[demo.TABLE]
    names = dict(zip(demo.instances(measured), measured.obs_names, strict=True))
    turned.X = demo.true_bins(options).loc[[names[k] for k in demo.instances(turned)], turned.var_names].to_numpy()
    slide.tables[demo.PREDICTED] = turned
    scores = demo.score(slide, options)
    np.testing.assert_allclose(scores["truth"], 1, atol=1e-5)
    assert not (scores["counts"] >= 1).any()  # a gene without a count on the held-out part has none


def test_a_gene_predicted_constant_scores_zero(finished: tuple[int, Path]) -> None:
    _, output = finished
    options = demo.Options(**SMALL, min_pcc=-1, output=output)
    slide = sd.read_zarr(output / "sample.zarr")
    slide.tables[demo.PREDICTED].X[:] = 1
    assert demo.score(slide, options)["truth"]["mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("pcc", "status"), [(0.61, 0), (0.6, 0), (0.59, 1), (float("nan"), 1)])
def test_verdict(capsys: pytest.CaptureFixture[str], pcc: float, status: int) -> None:
    assert demo.verdict(pcc, 0.6) == status
    assert ("FAILED" in capsys.readouterr().err) == bool(status)
