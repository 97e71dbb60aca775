from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pixnet_sd.datasets.drawn import (
    DrawnSlide,
    Grid,
    Panel,
    Source,
    draw_counts,
    draw_density,
    integrate_on_grid,
    integrate_shapes,
    library_size,
)

GRID = Grid(0, 0, 200, 200, 1.0)
PLACE_SIGMA, FIELD_SIGMA = 0.5, 0.25  # as `datasets.sample` documents
DIFFUSION_UM, TUMOUR_CELL_UM = 2.0, 3.9


def slide_of(n_genes: int = 5) -> DrawnSlide:
    return DrawnSlide.of(size_um=200, mpp=0.5, n_genes=n_genes, seed=4)


def panel_of(n_genes: int) -> Panel:
    return slide_of(n_genes).panel


@pytest.fixture(scope="module")
def density() -> np.ndarray:
    return draw_density(slide_of().tissue, GRID)


def test_densities_do_not_depend_on_the_window(density):
    part = draw_density(slide_of().tissue, Grid(60, 40, 50, 70, 1.0))
    np.testing.assert_allclose(part, density[:, 60:110, 40:110], atol=1e-5)


def test_density_of_nuclei_counts_them(density):
    nuclei = slide_of().tissue.nuclei((0, 0, 200, 200))
    counts = np.bincount(nuclei.source, minlength=Source.MATRIX)
    np.testing.assert_allclose(density[: Source.MATRIX].sum(axis=(1, 2)), counts, rtol=1e-3)


def test_transcripts_spread_over_the_cell_and_then_diffuse(monkeypatch):
    tissue = slide_of().tissue
    alone = tissue.nuclei((0, 0, 200, 200)).subset(slice(1))
    alone = replace(alone, x_um=np.array([100.5]), y_um=np.array([100.5]), source=np.array([Source.TUMOUR_CORE]))
    monkeypatch.setattr(tissue, "nuclei", lambda _: alone)
    spread = draw_density(tissue, GRID)[Source.TUMOUR_CORE].astype(float)
    assert spread.sum() == pytest.approx(1, abs=1e-3)
    for axis in (0, 1):
        variance = spread.sum(axis=axis) @ (np.arange(200) - 100.0) ** 2
        assert variance == pytest.approx(TUMOUR_CELL_UM**2 + DIFFUSION_UM**2, rel=0.02)


def test_integrals_of_a_constant_are_areas():
    constant, x, y = np.full((1, 60, 60), 3.0, dtype=np.float32), np.array([20.0, 33.3]), np.array([25.0, 40.1])
    np.testing.assert_allclose(integrate_shapes(constant, x, y, 7.5, angle=0.3)[:, 0], 3 * 7.5**2, rtol=1e-6)
    np.testing.assert_allclose(integrate_shapes(constant, x, y, 15, disk=True)[:, 0], 3 * np.pi * 7.5**2, rtol=1e-6)
    grid = integrate_on_grid(constant, 60, 8, range(8), range(8))
    np.testing.assert_allclose(grid[0, :7, :7], 3 * 64, rtol=1e-6)
    np.testing.assert_allclose(grid[0, 7, 7], 3 * 16, rtol=1e-6)


def test_integral_of_a_slope_is_read_at_the_centre():
    slope = np.broadcast_to(np.arange(60) + 0.5, (1, 60, 60)).astype(np.float32)
    squares = integrate_shapes(slope, np.array([20.2]), np.array([30.0]), 4, angle=np.deg2rad(10))
    np.testing.assert_allclose(squares, 20.2 * 16, rtol=1e-5)
    grid = integrate_on_grid(slope, 60, 2, range(30), range(30))
    np.testing.assert_allclose(grid[0, 0, :3], [4.0, 12.0, 20.0], rtol=1e-5)


@pytest.mark.parametrize("n_genes", [1, 34, 40, 300])
def test_panel(n_genes):
    panel = panel_of(n_genes)
    assert len(set(panel.names)) == n_genes
    assert panel.profile.shape == (len(Source), n_genes)
    assert (panel.profile >= 0).all()
    np.testing.assert_array_equal(panel.profile[: Source.TISSUE].any(axis=0), panel.varying)


def test_library_sizes_are_log_normal_with_mean_one_and_smooth_but_for_each_bin():
    row, col = (index.ravel() for index in np.indices((600, 600)))  # over many periods of the field
    sizes = library_size(slide_of().tissue, row, col, 10.0 * col, 10.0 * row)
    assert sizes.mean() == pytest.approx(1, abs=0.06)
    assert np.log(sizes).std() == pytest.approx(np.hypot(FIELD_SIGMA, PLACE_SIGMA), rel=0.05)
    log = np.log(sizes).reshape(60, 10, 60, 10)
    within, between = (log - log.mean(axis=(1, 3), keepdims=True)).std(), log.mean(axis=(1, 3)).std()
    assert within == pytest.approx(PLACE_SIGMA, rel=0.1)
    assert between == pytest.approx(FIELD_SIGMA, rel=0.25)


def test_counts_are_poisson_of_every_gene():
    panel = panel_of(60)
    caught = np.tile(np.random.default_rng(0).random(len(Source)) / 20, (20000, 1))
    counts = draw_counts(caught, panel, (0, 7)).toarray()
    expected = caught[0] @ panel.profile
    assert (np.abs(counts.mean(axis=0) - expected) / np.sqrt(expected / len(counts))).max() < 4.5
    seen = np.flatnonzero(expected > 0.05)
    assert len(seen) > 10
    np.testing.assert_allclose(counts.var(axis=0)[seen], expected[seen], rtol=0.1)
    # genes of one place do not know of one another
    assert np.abs(np.corrcoef(counts[:, seen].T) - np.eye(len(seen))).max() < 0.04
