"""Only gene expression is learnt from: other features neither are genes nor count into the sum over all of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse

from pixnet_sd.errors import DataError
from pixnet_sd.slide.tables import checked_totals, choose_genes, measured, targets_of

TYPES = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression", "Custom"]
GENES = ["GENE0", "GENE2", "GENE3"]


@pytest.fixture(params=["memory", "store"])
def opened(request, visium_hd, frame, tmp_path):
    """The only table of a slide, in memory or in a store, after a change."""

    def make(change):
        sdata = visium_hd(bins=(8,))
        table = sdata.tables["square_008um"]
        table.X = sparse.csr_matrix(table.X.toarray() * [1, 500, 1, 1, 70])
        change(table)
        if request.param == "store":
            sdata.write(tmp_path / "slide.zarr")
            sdata = sd.read_zarr(tmp_path / "slide.zarr", selection=("images",))
        return measured(sdata, frame())[0]

    return make


def typed(name="feature_types", values=TYPES, kind=None):
    def change(table):
        table.var[name] = pd.Series(values, index=table.var_names, dtype=kind)

    return change


@pytest.mark.parametrize(
    "change",
    [
        typed(),
        typed("feature_type"),
        typed("Feature_Types", kind="category"),
        typed(values=[t.lower().replace(" ", "_") for t in TYPES]),
        typed(values=["Gene Expression", None, "Gene Expression", "Gene Expression", "Negative Control Codeword"]),
        lambda table: table.var.rename(index={"GENE1": "NegControlProbe_00042", "GENE4": "BLANK_0100"}, inplace=True),
    ],
    ids=["10x", "singular", "capitals", "underscores", "missing", "by name"],
)
def test_only_genes_are_measured(opened, change, caplog) -> None:
    table = opened(change)
    assert list(table.var_names) == GENES
    assert table.counts.n_genes == 3
    values = table.rows(np.arange(len(table))).toarray()
    assert values.shape == (len(table), 3)
    assert values.max() < 70
    np.testing.assert_array_equal(checked_totals(table.counts, table.var_names, "x"), values.sum(axis=1))
    assert set(choose_genes({"a": [table]})) == set(GENES)
    (line,) = [r.getMessage() for r in caplog.records if "not genes" in r.getMessage()]
    assert "2 of 5" in line


def test_targets_are_shares_of_genes(opened, tmp_path) -> None:
    table = opened(typed())
    (found,) = targets_of({"a": [table]}, ["GENE2"], 100.0, tmp_path)["a"]
    values = table.rows(np.arange(len(table))).toarray()
    share = values[:, 1] / np.maximum(values.sum(axis=1), 1)
    np.testing.assert_allclose(found.values[:, 0], np.log1p(100 * share[values.sum(axis=1) > 0]), rtol=1e-5)


def test_named_features_that_are_no_genes(opened) -> None:
    table = opened(typed())
    with pytest.raises(DataError, match=r"'GENE1' \('Antibody Capture'\)"):
        choose_genes({"a": [table]}, genes=["GENE0", "GENE1"])


def test_no_gene_at_all(opened) -> None:
    with pytest.raises(DataError, match="feature_types"):
        opened(typed(values=["Antibody Capture"] * 5))


def test_an_antibody_may_be_called_like_a_gene(opened) -> None:
    def change(table):
        typed()(table)
        table.var_names = ["GENE0", "GENE0", "GENE2", "GENE3", "GENE3"]

    assert list(opened(change).var_names) == GENES


@pytest.mark.parametrize(
    "names", [["NEGR1", "BLNK", "FALSE1X", "SYS1", "NEGATIVE"], ["A1", "B2", "Blank", "Neg", "x-1"]]
)
def test_names_that_only_resemble_controls_are_genes(opened, names) -> None:
    assert list(opened(lambda table: setattr(table, "var_names", names)).var_names) == names
