from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.datasets.drawn import DrawnSlide, Grid, Previews, Source, draw, draw_window, hash_unit, in_order


def slide_of(size_um: float, seed: int = 4) -> DrawnSlide:
    return DrawnSlide.of(size_um=size_um, mpp=0.5, n_genes=5, seed=seed)


TISSUE = slide_of(200).tissue


@settings(max_examples=25, deadline=None)
@given(
    row0=st.integers(-500, 500), col0=st.integers(-500, 500), period_um=st.floats(1, 300), channel=st.integers(0, 63)
)
def test_noise_on_a_grid_is_noise_at_its_points(row0, col0, period_um, channel):
    grid, noise = Grid(row0, col0, 7, 5, 0.5), TISSUE.noise
    x, y = np.meshgrid(grid.x_um, grid.y_um)
    np.testing.assert_allclose(noise.grid(grid, period_um, channel), noise.at(x, y, period_um, channel), atol=2e-3)


def test_hash_is_uniform_and_keeps_sites_apart():
    row, col = (index.ravel() for index in np.meshgrid(np.arange(-100, 100), np.arange(-100, 100)))
    one, two = hash_unit(0, row, col, 1), hash_unit(0, row, col, 2)
    assert len(np.unique(one)) == len(one)
    np.testing.assert_allclose(np.histogram(one, bins=4, range=(0, 1))[0] / len(one), 0.25, atol=0.02)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert abs(np.corrcoef(one, hash_unit(0, row + 1, col, 1))[0, 1]) < 0.03


def test_threads_work_at_the_same_time_not_far_ahead_and_in_order():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(in_order(lambda _: meeting.wait(), range(2), 2))) == 2
    started = []
    next(in_order(lambda k: started.append(k), iter(range(1000)), 2))
    assert len(started) <= 4
    assert list(in_order(lambda k: k * k, range(50), 3)) == [k * k for k in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda k: 1 // k, [1, 0, 1], 2))


def test_windows_fit_without_a_seam():
    ((_, whole),) = draw(TISSUE, 400, 0.5)
    np.testing.assert_array_equal(draw_window(TISSUE, Grid(130, 90, 120, 150, 0.5)), whole[130:250, 90:240])


def test_every_compartment_is_there():
    nuclei = slide_of(1000, 0).tissue.nuclei((0, 0, 1000, 1000))
    assert np.bincount(nuclei.kind, minlength=4).min() > 100
    assert np.bincount(nuclei.source, minlength=Source.MATRIX).min() > 20


def test_a_large_slide_is_nearly_all_tissue():
    size_um = 4500
    slide = slide_of(size_um, 0)
    step = np.arange(0, slide.lattice.n_base, 8)
    x, y = slide.lattice.centres_um(2, *np.meshgrid(step, step, indexing="ij"))
    edge_um = slide.tissue.edge_um(Grid(0, 0, size_um // 10 + 1, size_um // 10 + 1, 10.0))
    on_tissue = edge_um[(y // 10).astype(int), (x // 10).astype(int)] > 0
    assert on_tissue.mean() > 0.9
    assert on_tissue.mean() * slide.lattice.n_base**2 > 4e6


@settings(max_examples=3, deadline=None)
@given(size_px=st.integers(290, 1300), window=st.integers(300, 1400), seed=st.integers(0, 99))
def test_previews_of_windows_are_means_over_boxes(size_px, window, seed):
    image = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    previews = Previews(size_px)
    for row in range(0, size_px, window):
        for col in range(0, size_px, window):
            pixels = image[row : row + window, col : col + window]
            previews.add(Grid(row, col, *pixels.shape[:2], 1.0), pixels)
    for most, preview in zip((1000, 300), previews.pixels().values(), strict=True):
        px = min(most, size_px)
        low, pixel = np.arange(px)[:, None] * size_px / px, np.arange(size_px)
        share = (np.minimum(low + size_px / px, pixel + 1) - np.maximum(low, pixel)).clip(0) * px / size_px
        means = np.einsum("ri,ijc,sj->rsc", share, image, share, optimize=True)
        assert np.abs(preview - means).max() < 0.5 + 1e-6  # they are rounded
