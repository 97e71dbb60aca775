"""What is drawn before a training is what the training takes."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color
from tests.slide.conftest import make_visium, make_visium_hd

import pixnet_sd as ps
from pixnet_sd.errors import DataError, PixNetError

BLUE, ORANGE = "#0072b2", "#d55e00"
SMALL = {"genes": 3, "max_epochs": 1, "batch_size": 2, "device": "cpu", "show_progress_bar": False}
NETWORK = {"encoder": "test_resnet", "encoder_weights": None, "decoder_width": 16, "working_mpp": 1.0}


def boxes(ax: plt.Axes, colour: str) -> np.ndarray:
    """Outlines of tiles of a colour, (n, 4): x0, y0, x1, y1 in µm."""
    collections = [drawn for drawn in ax.collections if same_color(drawn.get_edgecolor()[:1], [colour])]
    found = [path.get_extents().extents for drawn in collections for path in drawn.get_paths()]
    return np.array(found).reshape(-1, 4)


def legend(ax: plt.Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def draw(slides: Any, **options: Any) -> np.ndarray:
    options = {"train_params": {"tile_px": 64}, "model_params": {"working_mpp": 1.0}, "objective": "mse_pcc"} | options
    return ps.pl.training_regions(slides, **options, show=False)


def test_tiles_and_regions_are_those_of_fit() -> None:
    sdata = make_visium_hd()
    counts = sdata.tables["square_016um"].X
    counts.data[: counts.indptr[3]] = 0  # regions without counts are left out
    arguments = {"validation": 0.3, "train_params": {"tile_px": 64}}
    tiles, regions = draw(sdata, **arguments)[0]
    small = {**SMALL, "model_params": NETWORK, "objective": "mse_pcc"}
    with pytest.warns(UserWarning, match="square_016um") as warned:
        model = ps.tl.fit(sdata, **arguments, **small, record_model=False)
    # of the first caller outside the package
    assert {w.filename for w in warned if "square_016um" in str(w.message)} == {__file__}
    trained, held_out = (model.record.slides["slide"][f"{use}_regions"] for use in ("training", "held_out"))
    total = {"square_008um": sdata.tables["square_008um"].n_obs, "square_016um": sdata.tables["square_016um"].n_obs - 3}
    left = {name: total[name] - trained[name] - held_out[name] for name in total}
    assert legend(regions) == [
        f"{use}: {n['square_008um']} (square_008um), {n['square_016um']} (square_016um)"
        for use, n in (("training", trained), ("held out", held_out), ("in neither", left))
    ]
    drawn = [int(np.isfinite(np.ma.filled(i.get_array(), np.nan)).sum()) for i in regions.get_images()[1:]]
    assert drawn == [n["square_016um"] for n in (total, trained, held_out)]
    for colour in (BLUE, ORANGE):
        x0, y0, x1, y1 = boxes(tiles, colour).T
        assert len(x0)
        np.testing.assert_array_equal([x1 - x0, y1 - y0], 64)
    assert tiles.get_xlim() == (0, 160)
    title = " ".join(tiles.get_title().split())
    assert title.startswith("0.5 µm/px, seen at 1 µm/px")
    assert all(word in title for word in ("'sample_full_image'", "r, g, b", "'sample'", "'sample_square_016um'"))
    assert "'sample_square_016um' of table 'square_016um'" in " ".join(regions.get_title().split())


def test_tissue_is_outlined() -> None:
    """In the left half of an image."""
    sdata = make_visium_hd(small_images=False)
    for level in sdata.images["sample_full_image"].children.values():
        level["image"][..., level.sizes["x"] // 2 :] = 240  # glass
    ax = draw(sdata, validation=None)[0, 0]
    (outline,) = (drawn for drawn in ax.collections if len(drawn.get_paths()[0]) > 10)
    np.testing.assert_allclose(outline.get_paths()[0].get_extents().extents, [0, 0, 80, 120], atol=6)
    assert not len(boxes(ax, ORANGE))


def test_slides_are_rows() -> None:
    slides = {"a": make_visium_hd(bins=(16,)), "b": make_visium()}
    slides["b"].attrs["pixnet_sd"] = {"mpp": {"tissue_full_image": 0.5}}  # to measure spots takes squidpy, and seconds
    axes = draw(slides, train_params={"tile_px": 256}, objective="nb_pcc", validation=["b"])
    assert axes.shape == (2, 2)
    assert [(len(boxes(ax, BLUE)) > 0, len(boxes(ax, ORANGE)) > 0) for ax in axes[:, 0]] == [(1, 0), (0, 1)]
    assert [legend(ax)[0].split(":")[0] for ax in axes[:, 1]] == ["training", "held out"]
    assert [ax.get_title().split(":")[0] for ax in axes[:, 0]] == ["a", "b"]
    circles = axes[1, 1].collections[-1]
    assert len(circles.get_offsets()) == slides["b"].tables["table"].n_obs
    assert set(circles.get_widths()) == {65.0}


def test_bad_input() -> None:
    sdata = make_visium_hd(bins=(16,))
    with pytest.raises(PixNetError, match="tile_px"):
        draw(sdata, model_params=None)
    sdata.tables["square_016um"].X *= 0
    with pytest.raises(DataError, match="square_016um"):
        draw(sdata)
    assert not plt.get_fignums()
