from __future__ import annotations

import numpy as np
import pytest
import shapely

from pixnet_sd import datasets
from pixnet_sd.datasets.drawn import BASE_UM, CellCounts, DrawnSlide, _cells, _slide, find_cells

MPP = 0.5


@pytest.fixture(scope="module")
def slide() -> DrawnSlide:
    return DrawnSlide.of(size_um=250, mpp=MPP, n_genes=20, seed=1)


@pytest.fixture(scope="module")
def cells(slide):
    return find_cells(slide)


@pytest.fixture(scope="module")
def on_tissue(slide):
    return np.concatenate([band.on_tissue for band in slide.bands(slide.density)])


@pytest.fixture(scope="module")
def bins(slide, cells, on_tissue):
    """Owner, whether in the nucleus, and centres in pixels of every bin on tissue."""
    base = slide.lattice.bins_on(BASE_UM, on_tissue)
    return *cells.of_bins(0, on_tissue), shapely.points(base.x_um / MPP, base.y_um / MPP)


def outlines(cells, *, nucleus: bool) -> np.ndarray:
    return shapely.polygons(cells.outlines_px(np.arange(len(cells)), MPP, nucleus=nucleus))


def test_cells_are_all_the_nuclei_on_the_lattice(slide, cells):
    nuclei = slide.tissue.nuclei((0, 0, 250, 250))
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


def test_bins_lie_in_the_outline_that_owns_them(cells, bins):
    owner, in_nucleus, centre = bins
    owned = owner >= 0
    assert 0.2 < owned.mean() < 0.9
    # outlines have straight sides between their corners
    distance = shapely.distance(outlines(cells, nucleus=False)[owner[owned]], centre[owned]) * MPP
    assert (distance < 0.2).mean() > 0.97
    assert distance.max() < 1.5
    distance = shapely.distance(outlines(cells, nucleus=True)[owner[in_nucleus]], centre[in_nucleus]) * MPP
    assert distance.max() < 0.2
    assert not in_nucleus[~owned].any()


def test_bins_outside_every_cell_have_none(cells, bins):
    owner, _, centre = bins
    everything = shapely.unary_union(shapely.buffer(outlines(cells, nucleus=False), -1.5))
    assert not shapely.intersects(everything, centre[owner < 0]).any()


@pytest.mark.parametrize("rows", [8, 24])
def test_bins_have_the_same_cell_whichever_rows_are_asked(cells, bins, on_tissue, rows):
    parts = [cells.of_bins(row, on_tissue[row : row + rows]) for row in range(0, len(on_tissue), rows)]
    np.testing.assert_array_equal(np.concatenate([owner for owner, _ in parts]), bins[0])
    np.testing.assert_array_equal(np.concatenate([nucleus for _, nucleus in parts]), bins[1])


def test_counts_are_sums_of_bins(monkeypatch, slide, cells):
    monkeypatch.setattr(_slide, "BLOCK", 16)
    monkeypatch.setattr(_cells, "BLOCK", 16)
    bands = list(slide.bands(slide.density))
    assert len(bands) > 5
    owners = [cells.of_bins(band.first_row, band.on_tissue)[0] for band in bands]
    sums = CellCounts(cells, 20)
    parts = [sums.add(band, owner) for band, owner in zip(bands, owners, strict=True)] + [sums.rest()]
    which = np.concatenate([part.which for part in parts])
    expected = np.zeros((len(cells), 20))
    for band, owner in zip(bands, owners, strict=True):
        np.add.at(expected, owner[owner >= 0], band.counts.toarray()[owner >= 0])
    np.testing.assert_array_equal(which, np.unique(np.concatenate(owners)[np.concatenate(owners) >= 0]))
    np.testing.assert_array_equal(np.concatenate([part.counts.toarray() for part in parts]), expected[which])


def test_sample_with_cells():
    sdata = datasets.sample(size_um=150, bin_um=(8,), cells=True)
    table, shapes = sdata.tables["cell_segmentations"], sdata.shapes["sample_cell_segmentations"]
    assert list(table.obs_names) == list(shapes.index)
    assert table.uns["spatialdata_attrs"]["region"] == "sample_cell_segmentations"
    assert table.X.sum() > 0
