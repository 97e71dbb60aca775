"""The tissue, what it expresses, and the pictures of it."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.datasets.drawn import (
    DrawnSlide,
    Grid,
    Previews,
    Source,
    draw,
    draw_counts,
    draw_density,
    draw_window,
    hash_unit,
    in_order,
    integrate_on_grid,
    integrate_shapes,
    library_size,
)

GRID = Grid(0, 0, 200, 200, 1.0)
PLACE_SIGMA, FIELD_SIGMA = 0.5, 0.25  # as `datasets.sample` documents
DIFFUSION_UM, TUMOUR_CELL_UM = 2.0, 3.9


def slide_of(size_um: float, seed: int, n_genes: int = 5) -> DrawnSlide:
    return DrawnSlide.of(size_um=size_um, mpp=0.5, n_genes=n_genes, seed=seed)


TISSUE = slide_of(200, 4).tissue


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
    slide, grid = slide_of(4500, 0), Grid(0, 0, 451, 451, 10.0)
    step = np.arange(0, slide.lattice.n_base, 8)
    x, y = slide.lattice.centres_um(2, *np.meshgrid(step, step, indexing="ij"))
    on_tissue = slide.tissue.edge_um(grid)[grid.pixel(x, y)] > 0
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


def test_densities_do_not_depend_on_the_window_and_count_nuclei():
    density, part = draw_density(TISSUE, GRID), draw_density(TISSUE, Grid(60, 40, 50, 70, 1.0))
    np.testing.assert_allclose(part, density[:, 60:110, 40:110], atol=1e-5)
    nuclei = TISSUE.nuclei((0, 0, 200, 200))
    counts = np.bincount(nuclei.source, minlength=Source.MATRIX)
    np.testing.assert_allclose(density[: Source.MATRIX].sum(axis=(1, 2)), counts, rtol=1e-3)


def test_transcripts_spread_over_the_cell_and_then_diffuse(monkeypatch):
    alone = TISSUE.nuclei((0, 0, 200, 200)).subset(slice(1))
    alone = replace(alone, x_um=np.array([100.5]), y_um=np.array([100.5]), source=np.array([Source.TUMOUR_CORE]))
    monkeypatch.setattr(TISSUE, "nuclei", lambda _: alone)
    spread = draw_density(TISSUE, GRID)[Source.TUMOUR_CORE].astype(float)
    assert spread.sum() == pytest.approx(1, abs=1e-3)
    for axis in (0, 1):
        variance = spread.sum(axis=axis) @ (np.arange(200) - 100.0) ** 2
        assert variance == pytest.approx(TUMOUR_CELL_UM**2 + DIFFUSION_UM**2, rel=0.02)


def test_integrals_of_a_constant_are_areas_and_a_slope_is_read_at_the_centre():
    constant, x, y = np.full((1, 60, 60), 3.0, dtype=np.float32), np.array([20.0, 33.3]), np.array([25.0, 40.1])
    np.testing.assert_allclose(integrate_shapes(constant, x, y, 7.5, angle=0.3)[:, 0], 3 * 7.5**2, rtol=1e-6)
    np.testing.assert_allclose(integrate_shapes(constant, x, y, 15, disk=True)[:, 0], 3 * np.pi * 7.5**2, rtol=1e-6)
    grid = integrate_on_grid(constant, 60, 8, range(8), range(8))
    np.testing.assert_allclose(grid[0, :7, :7], 3 * 64, rtol=1e-6)
    np.testing.assert_allclose(grid[0, 7, 7], 3 * 16, rtol=1e-6)
    slope = np.broadcast_to(np.arange(60) + 0.5, (1, 60, 60)).astype(np.float32)
    squares = integrate_shapes(slope, np.array([20.2]), np.array([30.0]), 4, angle=np.deg2rad(10))
    np.testing.assert_allclose(squares, 20.2 * 16, rtol=1e-5)
    grid = integrate_on_grid(slope, 60, 2, range(30), range(30))
    np.testing.assert_allclose(grid[0, 0, :3], [4.0, 12.0, 20.0], rtol=1e-5)


@pytest.mark.parametrize("n_genes", [1, 34, 40, 300])
def test_panel(n_genes):
    panel = slide_of(200, 4, n_genes).panel
    assert len(set(panel.names)) == n_genes
    assert panel.profile.shape == (len(Source), n_genes)
    assert (panel.profile >= 0).all()
    np.testing.assert_array_equal(panel.profile[: Source.TISSUE].any(axis=0), panel.varying)


def test_library_sizes_are_log_normal_with_mean_one_and_smooth_but_for_each_bin():
    row, col = (index.ravel() for index in np.indices((600, 600)))  # over many periods of the field
    sizes = library_size(TISSUE, row, col, 10.0 * col, 10.0 * row)
    assert sizes.mean() == pytest.approx(1, abs=0.06)
    assert np.log(sizes).std() == pytest.approx(np.hypot(FIELD_SIGMA, PLACE_SIGMA), rel=0.05)
    log = np.log(sizes).reshape(60, 10, 60, 10)
    within, between = (log - log.mean(axis=(1, 3), keepdims=True)).std(), log.mean(axis=(1, 3)).std()
    assert within == pytest.approx(PLACE_SIGMA, rel=0.1)
    assert between == pytest.approx(FIELD_SIGMA, rel=0.25)


def test_counts_are_poisson_of_every_gene():
    panel = slide_of(200, 4, 60).panel
    caught = np.tile(np.random.default_rng(0).random(len(Source)) / 20, (20000, 1))
    counts = draw_counts(caught, panel, (0, 7)).toarray()
    expected = caught[0] @ panel.profile
    assert (np.abs(counts.mean(axis=0) - expected) / np.sqrt(expected / len(counts))).max() < 4.5
    seen = np.flatnonzero(expected > 0.05)
    assert len(seen) > 10
    np.testing.assert_allclose(counts.var(axis=0)[seen], expected[seen], rtol=0.1)
    # genes of one place do not know of one another
    assert np.abs(np.corrcoef(counts[:, seen].T) - np.eye(len(seen))).max() < 0.04
