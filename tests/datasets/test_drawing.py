from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.datasets.drawn import Grid, Source, draw, integrate_disks, integrate_on_grid
from pixnet_sd.datasets.drawn._expression import _CELL_UM, DIFFUSION_UM, gene_panel, integrate_squares, sources
from pixnet_sd.datasets.drawn._noise import Noise, hash_unit
from pixnet_sd.datasets.drawn._slide import Lattice
from pixnet_sd.datasets.drawn._tissue import NucleusKind, Tissue, draw_window

NOISE = Noise(0)


@settings(max_examples=25, deadline=None)
@given(
    row0=st.integers(-500, 500), col0=st.integers(-500, 500), period_um=st.floats(1, 300), channel=st.integers(0, 63)
)
def test_noise_on_a_grid_is_noise_at_its_points(row0, col0, period_um, channel):
    grid = Grid(row0, col0, 7, 5, 0.5)
    x, y = np.meshgrid(grid.x_um, grid.y_um)
    np.testing.assert_allclose(NOISE.grid(grid, period_um, channel), NOISE.at(x, y, period_um, channel), atol=2e-3)


def test_noise_is_standardised():
    drawn = NOISE.grid(Grid(0, 0, 1024, 1024, 1.0), 4, 3)
    assert drawn.mean() == pytest.approx(0, abs=0.02)
    assert drawn.std() == pytest.approx(1, abs=0.02)


def test_hash_is_uniform_and_keeps_sites_apart():
    row, col = (part.ravel() for part in np.meshgrid(np.arange(-100, 100), np.arange(-100, 100)))
    one, two = hash_unit(0, row, col, 1), hash_unit(0, row, col, 2)
    assert len(np.unique(one)) == len(one)
    np.testing.assert_allclose(np.histogram(one, bins=4, range=(0, 1))[0] / len(one), 0.25, atol=0.02)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert abs(np.corrcoef(one, hash_unit(0, row + 1, col, 1))[0, 1]) < 0.03


def test_windows_fit_without_a_seam():
    tissue = Tissue(200, 4)
    ((_, whole),) = draw(tissue, 400, 0.5)
    np.testing.assert_array_equal(draw_window(tissue, Grid(130, 90, 120, 150, 0.5)), whole[130:250, 90:240])


def test_nuclei_do_not_depend_on_the_box():
    tissue = Tissue(300, 1)
    inner = tissue.nuclei((80, 90, 220, 210))
    every = tissue.nuclei((0, 0, 300, 300))
    keep = (every.x_um >= 80) & (every.x_um < 220) & (every.y_um >= 90) & (every.y_um < 210)
    expected = every.subset(keep)
    assert len(inner) > 100
    np.testing.assert_allclose(np.sort(inner.x_um), np.sort(expected.x_um))
    np.testing.assert_array_equal(np.bincount(inner.source), np.bincount(expected.source))


def test_densities_do_not_depend_on_the_window():
    tissue = Tissue(200, 4)
    whole = sources(tissue, Grid(0, 0, 200, 200, 1.0))
    part = sources(tissue, Grid(60, 40, 50, 70, 1.0))
    np.testing.assert_allclose(part, whole[:, 60:110, 40:110], atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_compartment_is_there(seed):
    tissue = Tissue(1000, seed)
    nuclei = tissue.nuclei((0, 0, 1000, 1000))
    assert np.bincount(nuclei.kind, minlength=len(NucleusKind)).min() > 100
    assert np.bincount(nuclei.source, minlength=Source.MATRIX).min() > 20


def test_density_of_nuclei_counts_them():
    tissue = Tissue(200, 4)
    density = sources(tissue, Grid(0, 0, 200, 200, 1.0))
    nuclei = tissue.nuclei((0, 0, 200, 200))
    np.testing.assert_allclose(
        density[: Source.MATRIX].sum(axis=(1, 2)), np.bincount(nuclei.source, minlength=Source.MATRIX), rtol=1e-3
    )


class OneNucleus(Tissue):
    def nuclei(self, box_um):
        every = super().nuclei(box_um)
        alone = every.subset(np.arange(1))
        return replace(alone, x_um=np.array([100.5]), y_um=np.array([100.5]), source=np.array([Source.TUMOUR_CORE]))


def test_transcripts_spread_over_the_cell_and_then_diffuse():
    density = sources(OneNucleus(200, 4), Grid(0, 0, 200, 200, 1.0))[Source.TUMOUR_CORE].astype(float)
    distance = np.arange(200) - 100.0
    assert density.sum() == pytest.approx(1, abs=1e-3)
    for axis in (0, 1):
        spread = density.sum(axis=axis) @ distance**2
        assert spread == pytest.approx(_CELL_UM[Source.TUMOUR_CORE] ** 2 + DIFFUSION_UM**2, rel=0.02)
    assert 1 <= DIFFUSION_UM <= 5


def test_borders_of_areas_diffuse():
    tissue, grid = Tissue(200, 4), Grid(0, 0, 200, 200, 1.0)
    beside = (tissue.compartments(grid).lumen < 0.01) & (sources(tissue, grid)[Source.LUMEN] > 0.2)
    assert beside.any()


@pytest.mark.parametrize("size_um", [4500, 6700])
def test_a_large_slide_is_nearly_all_tissue(size_um):
    tissue, lattice = Tissue(size_um, 0), Lattice(size_um, np.deg2rad(0.5))
    step = np.arange(0, lattice.n_base, 8)
    row, col = np.meshgrid(step, step, indexing="ij")
    x, y = lattice.centres_um(2, row, col)
    edge_um = tissue.edge_um(Grid(0, 0, size_um // 10 + 1, size_um // 10 + 1, 10.0))
    on_tissue = edge_um[(y // 10).astype(int), (x // 10).astype(int)] > 0
    assert on_tissue.mean() > 0.9
    assert on_tissue.mean() * lattice.n_base**2 > 4e6


def test_integrals_of_a_constant_are_areas():
    density = np.full((1, 60, 60), 3.0, dtype=np.float32)
    squares = integrate_squares(density, np.array([20.0, 33.3]), np.array([25.0, 40.1]), 7.5, 0.3)
    np.testing.assert_allclose(squares[:, 0], 3 * 7.5**2, rtol=1e-6)
    disks = integrate_disks(density, np.array([20.0, 33.3]), np.array([25.0, 40.1]), 7.5)
    np.testing.assert_allclose(disks[:, 0], 3 * np.pi * 7.5**2, rtol=1e-6)
    grid = integrate_on_grid(density, 60, 8, range(8), range(8))
    np.testing.assert_allclose(grid[0, :7, :7], 3 * 64, rtol=1e-6)
    np.testing.assert_allclose(grid[0, 7, 7], 3 * 16, rtol=1e-6)


def test_integral_of_a_slope_is_read_at_the_centre():
    x = np.arange(60) + 0.5
    density = np.broadcast_to(x, (1, 60, 60)).astype(np.float32)
    squares = integrate_squares(density, np.array([20.2]), np.array([30.0]), 4, np.deg2rad(10))
    np.testing.assert_allclose(squares, 20.2 * 16, rtol=1e-5)
    np.testing.assert_allclose(
        integrate_on_grid(density, 60, 2, range(30), range(30))[0, 0, :3], [4.0, 12.0, 20.0], rtol=1e-5
    )


def test_a_window_of_a_grid_is_part_of_the_whole():
    density = np.random.default_rng(0).random((2, 60, 60)).astype(np.float16)
    whole = integrate_on_grid(density, 60, 7, range(9), range(9))
    np.testing.assert_array_equal(integrate_on_grid(density, 60, 7, range(2, 9), range(3, 5)), whole[:, 2:, 3:5])


@pytest.mark.parametrize("n_genes", [1, 34, 40, 300])
def test_panel(n_genes):
    panel = gene_panel(n_genes)
    assert len(set(panel.names)) == n_genes
    assert panel.profile.shape == (len(Source), n_genes)
    assert (panel.profile >= 0).all()
    areas_and_nuclei = panel.profile[: Source.TISSUE]
    np.testing.assert_array_equal(areas_and_nuclei.any(axis=0), panel.varying)
