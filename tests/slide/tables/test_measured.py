"""Regions that have counts, joined by id, and which of their features are genes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData

from pixnet_sd.errors import DataError, ResolutionError
from pixnet_sd.geometry import Lattice
from pixnet_sd.slide.tables import checked_totals, choose_genes, measured, targets_of

XY = [[20, 30], [60, 80], [200, 100], [300, 220]]
X = np.array([[1, 2, 0], [3, 0, 4], [5, 5, 5], [0, 7, 1]], dtype=np.float32)
IDS = ["p", "q", "r", "s"]


@pytest.fixture
def spots(circles, table):
    """Four spots with a table whose rows come in the given order of ids."""

    def make(order=("p", "q", "r", "s"), xy=XY, ids=IDS) -> SpatialData:
        x = X[[IDS.index(i) for i in order]]
        return SpatialData(shapes={"spots": circles(xy, 5.0, index=ids)}, tables={"t": table("spots", order, x=x)})

    return make


def dense(table) -> np.ndarray:
    return table.counts.to_csr().toarray()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("order", [("p", "q", "r", "s"), ("s", "p", "r", "q"), ("q", "s")])
def test_rows_are_joined_by_id(spots, frame, order) -> None:
    (table,) = measured(spots(order), frame())
    place = [IDS.index(i) for i in order]
    assert (table.table_key, table.element_key, len(table)) == ("t", "spots", len(order))
    assert tuple(table.instances) == order
    assert list(table.var_names) == ["GENE0", "GENE1", "GENE2"]
    np.testing.assert_array_equal(table.regions.centre_xy, np.array(XY)[place])
    np.testing.assert_array_equal(dense(table), X[place])
    assert table.is_complete
    assert table.take(np.ones(len(order), bool)) is table
    kept = table.take(np.arange(len(order)) % 2 == 1)
    np.testing.assert_array_equal(kept.regions.centre_xy, np.array(XY)[place[1::2]])
    np.testing.assert_array_equal(dense(kept), X[place[1::2]])


def test_rows_without_region_and_spots_off_the_image_are_left_out(spots, frame) -> None:
    sdata = spots(("s", "q", "p", "r"), xy=[*XY[:2], [900, 900], XY[3]])
    sdata.shapes["spots"] = sdata.shapes["spots"].drop("q")
    with (
        pytest.warns(UserWarning, match="1 of 4 rows .*'spots'.*'q'"),
        pytest.warns(UserWarning, match="1 of 3 regions"),
    ):
        (table,) = measured(sdata, frame())
    assert list(table.instances) == ["s", "p"]
    assert not table.is_complete
    np.testing.assert_array_equal(table.regions.centre_xy, [XY[3], XY[0]])
    np.testing.assert_array_equal(dense(table), X[[3, 0]])


def test_regions_that_do_not_fit(spots, frame) -> None:
    with pytest.raises(DataError, match="'t'.*'p'"):
        measured(spots(ids=[0, 1, 2, 3]), frame())
    with pytest.raises(ResolutionError, match="'t', element 'spots'.*x and y"):
        measured(spots(xy=[[30, 250], [80, 260], [100, 300], [220, 310]]), frame())


def test_bins_in_another_order_than_the_table_and_without_a_shape(visium_hd, frame) -> None:
    sdata = visium_hd(bins=(8,))
    order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
    table = sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    (bins,) = measured(sdata, frame())
    sdata.shapes["sample_square_008um"] = sdata.shapes["sample_square_008um"].drop([0, 7])
    with pytest.warns(UserWarning, match="2 of 192 rows"):
        (fewer,) = measured(sdata, frame())
    assert isinstance(fewer.regions, Lattice)
    assert not {0, 7} & set(fewer.instances)
    assert len(fewer) == len(fewer.regions) == 190
    for each in (bins, bins.take(np.random.default_rng(1).random(len(bins)) < 0.3), fewer):
        rows = pd.Index(table.obs["location_id"]).get_indexer(each.instances)
        np.testing.assert_array_equal(dense(each), table.X.toarray()[rows])


TYPES = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression", "Custom"]
GENES = ["GENE0", "GENE2", "GENE3"]


def typed(name="feature_types", values=TYPES, kind=None):
    return lambda table: setattr(
        table, "var", table.var.assign(**{name: pd.Series(values, index=table.var_names, dtype=kind)})
    )


def renamed(names):
    return lambda table: setattr(table, "var_names", names)


@pytest.mark.parametrize(
    ("change", "is_stored"),
    [
        (typed(values=[t.lower().replace(" ", "_") for t in TYPES]), False),
        (typed("feature_type"), True),
        (typed("Feature_Types", kind="category"), True),
        (typed(values=["Gene Expression", None, *["Gene Expression"] * 2, "Negative Control Codeword"]), False),
        (renamed(["GENE0", "NegControlProbe_00042", "GENE2", "GENE3", "BLANK_0100"]), True),
    ],
    ids=["underscores", "singular", "capitals", "missing", "by name"],
)
def test_only_genes_are_measured(opened, change, is_stored, caplog, tmp_path) -> None:
    """Other features are neither learnt nor part of the sum over all genes."""
    table = opened(change, is_stored)
    assert list(table.var_names) == GENES
    assert table.counts.n_genes == 3
    values = dense(table)
    assert values.shape == (len(table), 3)
    assert values.max() < 70
    total = values.sum(axis=1)
    np.testing.assert_array_equal(checked_totals(table.counts, table.var_names, "x"), total)
    assert set(choose_genes({"a": [table]})) == set(GENES)
    (line,) = [r.getMessage() for r in caplog.records if "not genes" in r.getMessage()]
    assert "2 of 5" in line
    (targets,) = targets_of({"a": [table]}, ["GENE2"], 100.0, tmp_path)["a"]
    np.testing.assert_allclose(targets.values[:, 0], np.log1p(100 * values[:, 1] / total)[total > 0], rtol=1e-5)


def test_features_that_are_no_genes(opened) -> None:
    with pytest.raises(DataError, match=r"'GENE1' \('Antibody Capture'\)"):
        choose_genes({"a": [opened(typed())]}, genes=["GENE0", "GENE1"])
    with pytest.raises(DataError, match="feature_types"):
        opened(typed(values=["Antibody Capture"] * 5))
    with pytest.raises(DataError, match="'B'"):
        opened(renamed(list("ABBCD")))

    def alike(table) -> None:
        typed()(table)
        table.var_names = ["GENE0", "GENE0", "GENE2", "GENE3", "GENE3"]

    assert list(opened(alike).var_names) == GENES  # an antibody may be called like a gene
    for like_controls in (["NEGR1", "BLNK", "FALSE1X", "SYS1", "NEGATIVE"], ["A1", "Blank", "Neg", "x-1", "B"]):
        assert list(opened(renamed(like_controls)).var_names) == like_controls
