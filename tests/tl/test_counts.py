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
    return np.concatenate(
        [table.layers["expected_counts"], table.obs["expected_total_counts"].to_numpy()[:, None]], axis=1
    )


@pytest.mark.parametrize("backed", [True, False])
def test_tables_say_what_they_hold(counted, predict, backed) -> None:
    sdata = (
        counted
        if backed
        else sd.SpatialData.init_from_elements(
            {name: element for _, name, element in counted.gen_elements()}, attrs=counted.attrs
        )
    )
    predict(sdata, shapes_key=BINS)
    table = sdata.tables[f"pixnet_{BINS}"]
    expected = counts(table)
    assert (expected > 0).all()
    np.testing.assert_allclose(table.X, np.log1p(1e4 * expected[:, :-1] / expected[:, -1:]), rtol=1e-5)
    said = table.uns["pixnet_sd"]
    assert said["objective"] == "poisson"
    assert "log1p(10000 * expected_counts / sum)" in said["X"]
    assert list(said["layers"]) == ["expected_counts"]
    assert "add up" in said["layers"]["expected_counts"]
    assert sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"]["units"] == "counts per µm²"
    again = sd.read_zarr(counted.path).tables[f"pixnet_{BINS}"] if backed else table
    np.testing.assert_array_equal(again.layers["expected_counts"], table.layers["expected_counts"])


def test_totals_are_those_measured_and_scores_like_logarithms(counted, predict) -> None:
    """Not of each bin after two epochs, but of all together."""
    predict(counted, shapes_key=BINS, write=None)
    table, observed = counted.tables[f"pixnet_{BINS}"], counted.tables[TABLE].X.sum()
    assert table.obs["expected_total_counts"].sum() == pytest.approx(observed, rel=0.25)
    scores = ps.tl.evaluate(counted, table_key=TABLE, predicted_key=f"pixnet_{BINS}")
    assert scores.attrs["n_genes"] == 6
    assert scores.attrs["MSE"] < 20
    genes = list(table.var_names[[4, 1]])
    predict(counted, shapes_key=BINS, write=None, genes=genes, overwrite=True)
    np.testing.assert_allclose(counted.tables[f"pixnet_{BINS}"].X, table[:, genes].X, rtol=1e-5)


def test_bins_add_up(counted, predict) -> None:
    """The sixteen 2 µm bins of an 8 µm bin have its expected counts; of bins of 8 µm all of whose parts are there."""
    for size in (2, 8):
        predict(counted, bin_um=size)
    small, large = (counted.tables[f"pixnet_bins_{size}um"] for size in (2, 8))
    parent = (np.floor(small.obsm["spatial"] / 8) @ [1, 1000]).astype(int)
    mine = (np.floor(large.obsm["spatial"] / 8) @ [1, 1000]).astype(int)
    n_parts = np.bincount(parent, minlength=mine.max() + 1)
    whole = (n_parts[mine] == 16) & np.isclose(large.obs["tissue_area_um2"], 64)
    assert whole.sum() > 100
    found = np.stack([np.bincount(parent, column, len(n_parts))[mine] for column in counts(small).T], axis=1)
    expected = counts(large)
    np.testing.assert_allclose(found[whole], expected[whole], rtol=1e-5, atol=1e-5 * expected.max())


def test_the_map_has_densities_per_um2(counted, predict) -> None:
    predict(counted, bin_um=200)  # the whole slide
    (table,) = (counted.tables[key] for key in counted.tables if "bins" in key)
    level = counted.images["pixnet_map"]["scale0"]["image"]
    assert list(level.c.values) == [*table.var_names, "total_counts"]
    density = level.transpose("c", "y", "x").values
    assert (density >= 0).all()
    np.testing.assert_allclose(density.sum(axis=(1, 2)) * 4.0**2, counts(table)[0], rtol=1e-4)  # 4 px of 1 µm


def test_the_map_is_reused(counted, predict, forward_passes) -> None:
    predict(counted, shapes_key=BINS, write=None)
    direct = counts(counted.tables[f"pixnet_{BINS}"])
    del counted.tables[f"pixnet_{BINS}"]
    counted.delete_element_from_disk(f"pixnet_{BINS}")
    predict(counted)
    del forward_passes[:]
    predict(counted, shapes_key=BINS)
    assert not forward_passes
    np.testing.assert_allclose(counts(counted.tables[f"pixnet_{BINS}"]), direct, rtol=1e-4, atol=1e-5 * direct.max())
