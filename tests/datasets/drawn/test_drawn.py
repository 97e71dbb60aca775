"""A slide of two by two windows and blocks, which have to fit together."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.datasets import drawn

SIZE_UM, MPP = 560, 0.5
PLACE_SIGMA, FIELD_SIGMA = 0.5, 0.25  # as `datasets.sample` documents
DIFFUSION_UM, TUMOUR_CELL_UM = 2.0, 3.9


@pytest.fixture(scope="module")
def slide() -> drawn.DrawnSlide:
    return drawn.DrawnSlide.of(size_um=SIZE_UM, mpp=MPP, n_genes=8, seed=1)


@pytest.fixture(scope="module")
def segmented(slide):
    """All cells, where bins are on tissue, and of each of these its cell and whether it lies in the nucleus."""
    cells, (on_tissue, _) = slide.cells(), slide.expected(library=False)
    return cells, on_tissue, *cells.of_bins(0, on_tissue)


@settings(max_examples=25, deadline=None)
@given(
    row0=st.integers(-500, 500), col0=st.integers(-500, 500), period_um=st.floats(1, 300), channel=st.integers(0, 63)
)
def test_noise_on_a_grid_is_noise_at_its_points(slide, row0, col0, period_um, channel):
    grid, noise = drawn.Grid(row0, col0, 7, 5, 0.5), slide.tissue.noise
    x, y = np.meshgrid(grid.x_um, grid.y_um)
    np.testing.assert_allclose(noise.grid(grid, period_um, channel), noise.at(x, y, period_um, channel), atol=2e-3)


def test_hash_is_uniform_and_keeps_sites_and_channels_apart():
    row, col = (index.ravel() - 100 for index in np.indices((200, 200)))
    here = drawn.hash_unit(0, row, col, 1)
    assert len(np.unique(here)) == len(here)
    np.testing.assert_allclose(np.histogram(here, bins=4, range=(0, 1))[0] / len(here), 0.25, atol=0.02)
    for other in (drawn.hash_unit(0, row, col, 2), drawn.hash_unit(0, row + 1, col, 1)):
        assert abs(np.corrcoef(here, other)[0, 1]) < 0.03


def test_threads_work_at_the_same_time_not_far_ahead_and_in_order():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(drawn.in_order(lambda _: meeting.wait(), range(2), 2))) == 2
    started = []
    next(drawn.in_order(lambda k: started.append(k), iter(range(1000)), 2))
    assert len(started) <= 4
    assert list(drawn.in_order(lambda k: k * k, range(50), 3)) == [k * k for k in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(drawn.in_order(lambda k: 1 // k, [1, 0, 1], 2))


def test_windows_fit_without_a_seam(slide):
    whole = np.zeros((1120, 1120, 3), np.uint8)
    for grid, pixels in drawn.draw(slide.tissue, 1120, MPP):
        whole[grid.slices] = pixels
    window = drawn.Grid(950, 990, 120, 110, MPP)
    np.testing.assert_array_equal(drawn.draw_window(slide.tissue, window), whole[window.slices])
    window = drawn.Grid(490, 480, 50, 60)
    expected = drawn.draw_density(slide.tissue, window).astype(np.float16)
    np.testing.assert_allclose(slide.density[:, *window.slices], expected, rtol=2e-3, atol=1e-6)


def test_a_large_slide_is_nearly_all_tissue():
    slide, grid = drawn.DrawnSlide.of(size_um=4500, mpp=MPP, n_genes=5, seed=0), drawn.Grid(0, 0, 451, 451, 10.0)
    step = np.arange(0, slide.lattice.n_base, 8)
    x, y = slide.lattice.centres_um(drawn.BASE_UM, *np.meshgrid(step, step, indexing="ij"))
    on_tissue = slide.tissue.edge_um(grid)[grid.pixel(x, y)] > 0
    assert on_tissue.mean() > 0.9
    assert on_tissue.mean() * slide.lattice.n_base**2 > 4e6


@settings(max_examples=3, deadline=None)
@given(size_px=st.integers(290, 1300), window=st.integers(300, 1400), seed=st.integers(0, 99))
def test_previews_of_windows_are_means_over_boxes(size_px, window, seed):
    image = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    previews = drawn.Previews(size_px)
    for row, col in np.ndindex(-(-size_px // window), -(-size_px // window)):
        pixels = image[row * window :, col * window :][:window, :window]
        previews.add(drawn.Grid(row * window, col * window, *pixels.shape[:2], 1.0), pixels)
    for most, preview in zip((1000, 300), previews.pixels().values(), strict=True):
        px = min(most, size_px)
        low, pixel = np.arange(px)[:, None] * size_px / px, np.arange(size_px)
        share = (np.minimum(low + size_px / px, pixel + 1) - np.maximum(low, pixel)).clip(0) * px / size_px
        means = np.einsum("ri,ijc,sj->rsc", share, image, share, optimize=True)
        assert np.abs(preview - means).max() < 0.5 + 1e-6  # they are rounded


def test_densities_count_nuclei_of_every_source(slide):
    counts = np.bincount(slide.tissue.nuclei((0, 0, SIZE_UM, SIZE_UM)).source)
    assert len(counts) == drawn.Source.MATRIX
    assert counts.min() > 5
    np.testing.assert_allclose(slide.density[: drawn.Source.MATRIX].sum(axis=(1, 2), dtype=float), counts, rtol=1e-3)


def test_transcripts_spread_over_the_cell_and_then_diffuse(slide, monkeypatch):
    alone = slide.tissue.nuclei((0, 0, 200, 200)).subset(slice(1))
    alone = replace(alone, x_um=np.array([100.5]), y_um=np.array([100.5]), source=np.array([drawn.Source.TUMOUR_CORE]))
    monkeypatch.setattr(slide.tissue, "nuclei", lambda _: alone)
    spread = drawn.draw_density(slide.tissue, drawn.Grid(0, 0, 200, 200))[drawn.Source.TUMOUR_CORE].astype(float)
    assert spread.sum() == pytest.approx(1, abs=1e-3)
    for axis in (0, 1):
        variance = spread.sum(axis=axis) @ (np.arange(200) - 100.0) ** 2
        assert variance == pytest.approx(TUMOUR_CELL_UM**2 + DIFFUSION_UM**2, rel=0.02)


def test_integrals_of_a_plane_are_areas_times_its_value_at_the_centre():
    x, y = np.array([20.2, 33.3]), np.array([25.0, 40.1])
    down, right = np.indices((60, 60)) + 0.5
    plane, value = (3 + right + 0.2 * down).astype(np.float32), 3 + x + 0.2 * y
    squares = drawn.integrate_shapes(plane[None], x, y, 7.5, angle=0.3)
    disks = drawn.integrate_shapes(plane[None], x, y, 15, disk=True)
    np.testing.assert_allclose(squares[:, 0], value * 7.5**2, rtol=1e-5)
    np.testing.assert_allclose(disks[:, 0], value * np.pi * 7.5**2, rtol=1e-5)
    for um, n in ((2, 30), (8, 8)):  # the last pixels of 8 µm reach beyond the slide
        pixels = np.pad(plane, (0, n * um - 60)).reshape(n, um, n, um).sum(axis=(1, 3))
        integrals = drawn.integrate_on_grid(plane[None], 60, um, range(n), range(n))
        np.testing.assert_allclose(integrals[0], pixels, rtol=1e-5)


def test_library_sizes_are_log_normal_with_mean_one_and_smooth_but_for_each_bin(slide):
    row, col = (index.ravel() for index in np.indices((600, 600)))  # over many periods of the field
    sizes = drawn.library_size(slide.tissue, row, col, 10.0 * col, 10.0 * row)
    assert sizes.mean() == pytest.approx(1, abs=0.06)
    assert np.log(sizes).std() == pytest.approx(np.hypot(FIELD_SIGMA, PLACE_SIGMA), rel=0.05)
    log = np.log(sizes).reshape(60, 10, 60, 10)
    within, between = (log - log.mean(axis=(1, 3), keepdims=True)).std(), log.mean(axis=(1, 3)).std()
    assert within == pytest.approx(PLACE_SIGMA, rel=0.1)
    assert between == pytest.approx(FIELD_SIGMA, rel=0.25)


def test_cells_are_all_the_nuclei_on_the_lattice(slide, segmented):
    cells, nuclei = segmented[0], slide.tissue.nuclei((0, 0, SIZE_UM, SIZE_UM))
    at, n_base = np.stack(slide.lattice.base_at(nuclei.x_um, nuclei.y_um)), slide.lattice.n_base
    assert len(cells) == ((at >= 0) & (at < n_base)).all(axis=0).sum() > 100
    assert (np.diff(cells.row) >= 0).all()


def test_outlines_are_sound_and_hold_the_bins_that_they_own_and_no_others(slide, segmented):
    cells, on_tissue, owner, in_nucleus = segmented
    every = np.arange(len(cells))
    cell, nucleus = (shapely.polygons(cells.outlines_px(every, MPP, nucleus=nucleus)) for nucleus in (False, True))
    assert shapely.is_valid([cell, nucleus]).all()
    # outlines have straight sides between their corners, which cut a little off
    assert (shapely.area(shapely.difference(nucleus, cell)) < 0.05 * shapely.area(nucleus)).all()
    assert (shapely.area(cell) > 1.2 * shapely.area(nucleus)).mean() > 0.95
    centre = shapely.points(slide.lattice.bins(drawn.BASE_UM, on_tissue)[["x_um", "y_um"]] / MPP)
    owned = owner >= 0
    assert 0.2 < owned.mean() < 0.9
    distance = shapely.distance(cell[owner[owned]], centre[owned]) * MPP
    assert (distance < 0.2).mean() > 0.97
    assert distance.max() < 2
    assert (shapely.distance(nucleus[owner[in_nucleus]], centre[in_nucleus]) * MPP).max() < 0.2
    assert not in_nucleus[~owned].any()
    covered = shapely.unary_union(shapely.buffer(cell, -1.5))
    shapely.prepare(covered)
    assert not shapely.intersects(covered, centre[~owned]).any()


def test_bins_have_the_same_cell_whichever_rows_are_asked(segmented):
    cells, on_tissue, *whole = segmented
    parts = [cells.of_bins(row, on_tissue[row : row + 8]) for row in range(0, len(on_tissue), 8)]
    for expected, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
