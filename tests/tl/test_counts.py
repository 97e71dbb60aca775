"""A model of counts: what `predict` leaves adds up, is in the units that it says, and compares with logarithms."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData

import pixnet_sd as ps

BINS, TABLE = "sample_square_008um", "square_008um"


def counts(table: AnnData) -> np.ndarray:
    """Expected counts of the genes, and of all."""
    return np.column_stack([table.layers["expected_counts"], table.obs["expected_total_counts"]])


def test_what_tables_hold(counted, predict) -> None:
    """The same on disk and in memory; totals not of each bin after two epochs, but of all together."""
    elements = {name: element for _, name, element in counted.gen_elements()}
    in_memory = sd.SpatialData.init_from_elements(elements, attrs=counted.attrs)
    for sdata in (counted, in_memory):
        predict(sdata, shapes_key=BINS, write=None)
    key = f"pixnet_{BINS}"
    table = in_memory.tables[key]
    for other in (counted.tables[key], sd.read_zarr(counted.path).tables[key]):
        np.testing.assert_allclose(counts(other), counts(table), rtol=1e-6)
    expected = counts(table)
    assert (expected > 0).all()
    np.testing.assert_allclose(table.X, np.log1p(1e4 * expected[:, :-1] / expected[:, -1:]), rtol=1e-5)
    said = table.uns["pixnet_sd"]
    assert said["objective"] == "poisson"
    assert "log1p(10000 * expected_counts / sum)" in said["X"]
    assert "add up" in said["layers"]["expected_counts"]
    assert expected[:, -1].sum() == pytest.approx(counted.tables[TABLE].X.sum(), rel=0.25)
    scores = ps.tl.evaluate(counted, table_key=TABLE, predicted_key=key)
    assert scores.attrs["MSE"] < 20
    genes = list(table.var_names[[4, 1]])
    predict(in_memory, shapes_key=BINS, write=None, genes=genes, overwrite=True)
    np.testing.assert_allclose(in_memory.tables[key].X, table[:, genes].X, rtol=1e-5)


def test_bins_and_map_add_up(counted, predict, forward_passes) -> None:
    """The four 4 µm bins of an 8 µm bin have its expected counts; the map has densities, and is reused."""
    predict(counted, shapes_key=BINS, write=None)
    direct = counts(counted.tables.pop(f"pixnet_{BINS}"))
    counted.delete_element_from_disk(f"pixnet_{BINS}")
    predict(counted, bin_um=4)
    del forward_passes[:]
    predict(counted, bin_um=8)
    predict(counted, bin_um=200)  # the whole slide
    predict(counted, shapes_key=BINS)
    assert not forward_passes
    reused = counts(counted.tables[f"pixnet_{BINS}"])
    np.testing.assert_allclose(reused, direct, rtol=1e-4, atol=1e-5 * direct.max())

    small, large, whole = (counted.tables[f"pixnet_bins_{size}um"] for size in (4, 8, 200))
    parent, mine = ((np.floor(table.obsm["spatial"] / 8) @ [1, 1000]).astype(int) for table in (small, large))
    n_parts = np.bincount(parent, minlength=mine.max() + 1)
    full = (n_parts[mine] == 4) & np.isclose(large.obs["tissue_area_um2"], 64)
    assert full.sum() > 100
    sums = np.stack([np.bincount(parent, column, len(n_parts))[mine] for column in counts(small).T], axis=1)
    expected = counts(large)
    np.testing.assert_allclose(sums[full], expected[full], rtol=1e-5, atol=1e-5 * expected.max())

    level = counted.images["pixnet_map"]["scale0"]["image"]
    assert counted.attrs["pixnet_sd"]["maps"]["pixnet_map"]["units"] == "counts per µm²"
    assert list(level.c.values) == [*whole.var_names, "total_counts"]
    density = level.transpose("c", "y", "x").values
    assert (density >= 0).all()
    np.testing.assert_allclose(density.sum(axis=(1, 2)) * 4.0**2, counts(whole)[0], rtol=1e-4)  # 4 px of 1 µm
