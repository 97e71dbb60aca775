"""What is drawn before a training is what the training takes."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from tests.slide.conftest import make_visium, make_visium_hd

import pixnet_sd as ps
from pixnet_sd.engine import training_tiles
from pixnet_sd.errors import DataError, PixNetError
from pixnet_sd.tl import open_sources
from pixnet_sd.tl._training_data import training_data

OPEN: dict[str, Any] = {
    "image_key": None,
    "table_key": None,
    "coordinate_system": None,
    "mpp": None,
    "allow_any_mpp": False,
    "working_mpp": 1.0,
}
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f7f"


@pytest.fixture(autouse=True)
def _tissue(monkeypatch) -> None:
    """All but the right half; noise has no tissue that could be found."""

    def mask(slide):
        found = np.zeros(slide.map_shape, bool)
        found[:, : slide.map_shape[1] // 2] = True
        return found

    monkeypatch.setattr("pixnet_sd.pl._training_regions.tissue_mask", mask)


def of_fit(slides, tmp_path, **arguments):
    return training_data(
        open_sources(slides, **OPEN),
        **({"genes": None, "n_genes": 3, "target_sum": 1e4, "objective": "mse_pcc", "seed": 0} | arguments),
        cache=tmp_path,
    )


def boxes(ax, colour: str) -> set[tuple[float, ...]]:
    """Outlines of tiles of a colour: x0, y0, x1, y1 in µm."""
    import matplotlib.colors

    found = set()
    for drawn in ax.collections:
        edge = drawn.get_edgecolor()
        if len(edge) and tuple(edge[0]) == matplotlib.colors.to_rgba(colour) and len(drawn.get_paths()[0]) == 5:
            found |= {tuple(path.get_extents().extents) for path in drawn.get_paths()}
    return found


def as_boxes(tiles, um: float) -> set[tuple[float, ...]]:
    return {(t.col0 * um, t.row0 * um, (t.col0 + t.width) * um, (t.row0 + t.height) * um) for t in tiles}


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_tiles_and_regions_are_those_of_fit(tmp_path):
    slide = make_visium_hd()
    table = slide.tables["square_016um"]
    table.X[:3] = 0  # regions without counts are left out
    axes = ps.pl.training_regions(slide, working_mpp=1.0, tile_px=64, validation=0.3, show=False)
    data = of_fit({"slide": slide}, tmp_path, validation=0.3)
    assert boxes(axes[0, 0], BLUE) == as_boxes(training_tiles(data.training[0], 64).tiles, 1.0)
    assert boxes(axes[0, 0], ORANGE) == as_boxes(training_tiles(data.held_out[0], 64, once=True).tiles, 1.0)
    n = {kind: [len(m.regions) for m in part[0].measured] for kind, part in vars(data).items() if kind != "genes"}
    total = [t.n_obs for t in slide.tables.values()]
    left = [a - b - c for a, b, c in zip([total[0], total[1] - 3], n["training"], n["held_out"], strict=True)]
    assert legend(axes[0, 1]) == [
        f"{kind}: {counts[0]} (square_008um), {counts[1]} (square_016um)"
        for kind, counts in (("training", n["training"]), ("held out", n["held_out"]), ("in neither", left))
    ]
    coarse = [int(np.isfinite(np.ma.filled(i.get_array(), np.nan)).sum()) for i in axes[0, 1].get_images()[1:]]
    assert coarse == [total[1] - 3, n["training"][1], n["held_out"][1]]
    assert axes[0, 0].get_xlim() == (0, 160)
    titles = [" ".join(ax.get_title().split()) for ax in axes[0]]
    assert titles[0].startswith("0.5 µm/px, seen at 1 µm/px")
    assert all(word in titles[0] for word in ("'sample_full_image'", "r, g, b", "'sample'", "'sample_square_016um'"))
    assert titles[1] == "regions 'sample_square_016um' of table 'square_016um'"


def test_tissue_is_outlined():
    ax = ps.pl.training_regions(make_visium_hd(), working_mpp=1.0, tile_px=64, validation=None, show=False)[0, 0]
    (outline,) = (drawn for drawn in ax.collections if len(drawn.get_paths()[0]) > 10)
    extents = outline.get_paths()[0].get_extents().extents
    np.testing.assert_allclose(extents, [0, 0, 80, 120], atol=2)


def test_slides_are_rows(tmp_path):
    slides = {"a": make_visium_hd(bins=(16,)), "b": make_visium()}
    slides["b"].attrs["pixnet_sd"] = {"mpp": {"tissue_full_image": 0.5}}  # to measure spots takes squidpy, and seconds
    options = {"working_mpp": 1.0, "tile_px": 256, "objective": "poisson"}
    axes = ps.pl.training_regions(slides, validation=["b"], **options, show=False)
    assert axes.shape == (2, 2)
    data = of_fit(slides, tmp_path, validation=["b"], objective="nb")
    assert boxes(axes[0, 0], BLUE) == as_boxes(training_tiles(data.training[0], 256).tiles, 1.0)
    assert not boxes(axes[0, 0], ORANGE)
    assert boxes(axes[1, 0], ORANGE) == as_boxes(training_tiles(data.held_out[0], 256, once=True).tiles, 1.0)
    assert [legend(ax)[0].split(":")[0] for ax in axes[:, 1]] == ["training", "held out"]
    assert [ax.get_title().split(":")[0] for ax in axes[:, 0]] == ["a", "b"]
    circles = axes[1, 1].collections[-1]
    assert len(circles.get_offsets()) == slides["b"].tables["table"].n_obs
    assert set(circles.get_widths()) == {65.0}


def test_bad_input():
    slide = make_visium_hd(bins=(16,))
    with pytest.raises(PixNetError, match="none would fit"):
        ps.pl.training_regions(slide, working_mpp=0.5, tile_px=64, show=False)
    slide.tables["square_016um"].X[:] = 0
    with pytest.raises(DataError, match="no counts at all"):
        ps.pl.training_regions(slide)
    assert not plt.get_fignums()
