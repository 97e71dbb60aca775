"""Regions that have counts, joined by id, and which of their features are genes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData

from pixnet_sd.errors import DataError, ResolutionError
from pixnet_sd.geometry import Lattice
from pixnet_sd.slide.tables import Measured, choose_genes, measured, targets_of

XY = np.array([[20, 30], [60, 80], [200, 100], [300, 220]])
X = np.array([[1, 2, 0], [3, 0, 4], [5, 5, 5], [0, 7, 1]], dtype=np.float32)


@pytest.fixture
def spots(circles, table, frame):
    """Four spots p, q, r and s that a table measures whose rows come in the given order, on a slide."""

    def make(order: str = "pqrs", xy=XY, ids="pqrs", drop=()) -> Measured:
        shapes = circles(xy, 5.0, index=list(ids)).drop(list(drop))
        measures = table("spots", list(order), x=X[["pqrs".index(name) for name in order]])
        return measured(SpatialData(shapes={"spots": shapes}, tables={"t": measures}), frame())[0]

    return make


def assert_joined(table: Measured, ids: str, is_complete: bool) -> None:
    place = ["pqrs".index(name) for name in ids]
    assert (list(table.instances), table.is_complete) == (list(ids), is_complete)
    np.testing.assert_array_equal(table.regions.centre_xy, XY[place])
    np.testing.assert_array_equal(dense(table), X[place])


def dense(table: Measured) -> np.ndarray:
    return table.counts.to_csr().toarray()


def test_rows_are_joined_by_id(spots) -> None:
    """Regions without a row are left out silently, rows without a region or with one off the image are warned of."""
    for order in ("pqrs", "sprq", "qs"):
        assert_joined(spots(order), order, is_complete=True)
    every = spots("sprq")
    assert (every.table_key, every.element_key, list(every.var_names)) == ("t", "spots", ["GENE0", "GENE1", "GENE2"])
    assert every.take(np.ones(4, bool)) is every
    assert_joined(every.take(np.array([False, True, True, False])), "pr", is_complete=False)
    with (
        pytest.warns(UserWarning, match="1 of 4 rows .*'spots'.*'q'"),
        pytest.warns(UserWarning, match="1 of 3 regions"),
    ):
        assert_joined(spots("sqpr", xy=[*XY[:2], [900, 900], XY[3]], drop="q"), "sp", is_complete=False)


def test_regions_that_do_not_fit(spots) -> None:
    with pytest.raises(DataError, match="'t'.*'p'"):
        spots(ids=range(4))
    with pytest.raises(ResolutionError, match="'t', element 'spots'.*x and y"):
        spots(xy=[[30, 250], [80, 260], [100, 300], [220, 310]])


def test_bins_in_another_order_than_the_table_and_without_a_shape(visium_hd, frame) -> None:
    sdata = visium_hd(bins=(8,))
    order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
    table = sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    (bins,) = measured(sdata, frame())
    sdata.shapes["sample_square_008um"] = sdata.shapes["sample_square_008um"].drop([0, 7])
    with pytest.warns(UserWarning, match="2 of 192 rows"):
        (fewer,) = measured(sdata, frame())
    assert isinstance(fewer.regions, Lattice)
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
    values = dense(table)
    assert values.shape == (len(table), 3)
    assert values.max() < 70
    total = values.sum(axis=1)
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
