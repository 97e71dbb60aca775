"""A slide of two by two blocks, so that bands and blocks have to fit together."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from pixnet_sd.datasets.drawn import (
    BASE_UM,
    DrawnSlide,
    bin_barcodes,
    cell_barcodes,
    integrate_shapes,
    library_size,
    spot_barcodes,
)

MPP = 0.5


@pytest.fixture(scope="module")
def slide() -> DrawnSlide:
    return DrawnSlide.of(size_um=560, mpp=MPP, n_genes=8, seed=1)


@pytest.fixture(scope="module")
def cells(slide):
    return slide.cells()


@pytest.fixture(scope="module")
def on_tissue(slide):
    return slide.expected(library=False)[0]


@pytest.fixture(scope="module")
def owners(cells, on_tissue):
    """Owner of every bin on tissue, and whether it lies in the nucleus."""
    return cells.of_bins(0, on_tissue)


def outlines(cells, *, nucleus: bool) -> np.ndarray:
    return shapely.polygons(cells.outlines_px(np.arange(len(cells)), MPP, nucleus=nucleus))


def test_barcodes_of_the_format():
    row, col = np.array([0, 12]), np.array([345, 3349])
    assert bin_barcodes(2, row, col).tolist() == [b"s_002um_00000_00345-1", b"s_002um_00012_03349-1"]
    assert cell_barcodes(np.array([0, 123456788])).tolist() == [b"cellid_000000001-1", b"cellid_123456789-1"]
    assert len(bin_barcodes(2, row[:0], col[:0])) == 0
    names = spot_barcodes(np.arange(5000)).tolist()
    assert len(set(names)) == 5000
    assert all(len(name) == 18 and set(name[:16]) <= set(b"ACGT") and name.endswith(b"-1") for name in names)


@pytest.mark.parametrize("library", [False, True])
def test_expectations_of_blocks_are_those_of_the_whole_lattice(slide, on_tissue, library):
    mask, caught = slide.expected(library=library)
    np.testing.assert_array_equal(mask, on_tissue)
    bins = slide.lattice.bins(BASE_UM, mask)
    x, y = bins["x_um"].to_numpy(), bins["y_um"].to_numpy()
    expected = integrate_shapes(slide.density.astype(np.float32), x, y, BASE_UM, angle=slide.lattice.angle)
    if library:
        row, col = bins["array_row"].to_numpy(), bins["array_col"].to_numpy()
        expected *= library_size(slide.tissue, row, col, x, y)[:, None]
    np.testing.assert_allclose(caught, expected, rtol=1e-5, atol=1e-7)


def test_counts_of_blocks_follow_the_expectations_in_their_order(slide, on_tissue):
    bands = list(slide.bands(slide.density))
    np.testing.assert_array_equal(np.concatenate([band.on_tissue for band in bands]), on_tissue)
    assert [band.first_row for band in bands] == [0, 256]
    counts = np.concatenate([band.counts.toarray() for band in bands])
    means = slide.expected(library=True)[1] @ slide.panel.profile
    corner = np.concatenate([np.nonzero(band.on_tissue)[1] >= 256 for band in bands])
    for block in (corner, ~corner):  # counts of another order would scatter more than Poisson draws do
        scatter = ((counts[block] - means[block]) ** 2).sum() / means[block].sum()
        assert scatter == pytest.approx(1, abs=0.05)


def test_cells_are_all_the_nuclei_on_the_lattice(slide, cells):
    nuclei = slide.tissue.nuclei((0, 0, 560, 560))
    row, col = slide.lattice.base_at(nuclei.x_um, nuclei.y_um)
    n_base = slide.lattice.n_base
    assert len(cells) == ((row >= 0) & (row < n_base) & (col >= 0) & (col < n_base)).sum() > 100
    assert (np.diff(cells.row) >= 0).all()


def test_outlines_are_sound(cells):
    cell, nucleus = outlines(cells, nucleus=False), outlines(cells, nucleus=True)
    assert shapely.is_valid(cell).all()
    assert shapely.is_valid(nucleus).all()
    # sides between corners cut a little off
    assert (shapely.area(shapely.difference(nucleus, cell)) < 0.05 * shapely.area(nucleus)).all()
    assert (shapely.area(cell) > 1.2 * shapely.area(nucleus)).mean() > 0.95


def test_bins_lie_in_the_outline_that_owns_them_and_others_in_none(slide, cells, owners, on_tissue):
    owner, in_nucleus = owners
    centre = shapely.points(slide.lattice.bins(BASE_UM, on_tissue)[["x_um", "y_um"]] / MPP)
    owned = owner >= 0
    assert 0.2 < owned.mean() < 0.9
    # outlines have straight sides between their corners
    distance = shapely.distance(outlines(cells, nucleus=False)[owner[owned]], centre[owned]) * MPP
    assert (distance < 0.2).mean() > 0.97
    assert distance.max() < 2
    distance = shapely.distance(outlines(cells, nucleus=True)[owner[in_nucleus]], centre[in_nucleus]) * MPP
    assert distance.max() < 0.2
    assert not in_nucleus[~owned].any()
    covered = shapely.unary_union(shapely.buffer(outlines(cells, nucleus=False), -1.5))
    shapely.prepare(covered)
    assert not shapely.intersects(covered, centre[~owned]).any()


@pytest.mark.parametrize("rows", [8, 24])
def test_bins_have_the_same_cell_whichever_rows_are_asked(cells, owners, on_tissue, rows):
    parts = [cells.of_bins(row, on_tissue[row : row + rows]) for row in range(0, len(on_tissue), rows)]
    for whole, pieces in zip(owners, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
