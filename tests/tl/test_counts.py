"""A model of counts: what `predict` leaves adds up, and is in the units that it says."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from tests.tl.conftest import BINS, TABLE

import pixnet_sd as ps

KEY = f"pixnet_{BINS}"


def counts(table: AnnData) -> np.ndarray:
    """Expected counts of the genes, and of all."""
    return np.column_stack([table.layers["expected_counts"], table.obs["expected_total_counts"]])


def test_what_tables_hold(counted, predict) -> None:
    """Totals not of each bin after two epochs, but of all together."""
    predict(counted, shapes_key=BINS, write=None)
    table = counted.tables[KEY]
    expected = counts(table)
    np.testing.assert_allclose(counts(sd.read_zarr(counted.path).tables[KEY]), expected, rtol=1e-6)
    assert (expected > 0).all()
    assert expected[:, -1].sum() == pytest.approx(counted.tables[TABLE].X.sum(), rel=0.25)
    said = table.uns["pixnet_sd"]
    assert said["objective"] == "poisson"
    assert "log1p(10000 * expected_counts / sum)" in said["X"]
    assert "add up" in said["layers"]["expected_counts"]
    assert ps.tl.evaluate(counted, table_key=TABLE, predicted_key=KEY).attrs["MSE"] < 20
    genes = list(table.var_names[[4, 1]])
    predict(counted, shapes_key=BINS, write=None, genes=genes, key_added="two")
    np.testing.assert_allclose(counted.tables[f"two_{BINS}"].X, table[:, genes].X, rtol=1e-5)


def test_the_map_adds_up_to_the_regions(counted, predict, forward_passes) -> None:
    """It has densities, and is read back for one bin of the whole slide."""
    predict(counted)
    del forward_passes[:]
    predict(counted, bin_um=200)
    assert not forward_passes
    whole, level = counted.tables["pixnet_bins_200um"], counted.images["pixnet_map"]["scale0"]["image"]
    assert counted.attrs["pixnet_sd"]["maps"]["pixnet_map"]["units"] == "counts per µm²"
    assert list(level.c.values) == [*whole.var_names, "total_counts"]
    assert (level >= 0).all()
    np.testing.assert_allclose(level.sum(["y", "x"]) * 4.0**2, counts(whole)[0], rtol=1e-4)  # 4 px of 1 µm
