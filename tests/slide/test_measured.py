"""Tables with measured expression, which rows go with which regions, and which features are genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Scale, Translation, set_transformation
from tests.slide.conftest import make_image, make_table

from pixnet_sd.errors import DataError, ElementError, ResolutionError
from pixnet_sd.geometry import Lattice
from pixnet_sd.slide.elements import table_link
from pixnet_sd.slide.tables import Measured, choose_genes, measured, select_tables, targets_of

XY = np.array([[20, 30], [60, 80], [200, 100], [300, 220]])
X = np.array([[1, 2, 0], [3, 0, 4], [5, 5, 5], [0, 7, 1]], dtype=np.float32)


@pytest.fixture
def spots(circles, table, frame):
    """Four spots p, q, r and s that a table measures whose rows come in the given order, on a slide."""

    def make(order: str = "pqrs", xy=XY, ids="pqrs", drop=()) -> Measured:
        shapes = circles(xy, 5.0, index=list(ids)).drop(list(drop))
        measures = table("spots", list(order), x=X[["pqrs".index(name) for name in order]])
        return measured(SpatialData(shapes={"spots": shapes}, tables={"t": measures}), frame)[0]

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
    (bins,) = measured(sdata, frame)
    sdata.shapes["sample_square_008um"] = sdata.shapes["sample_square_008um"].drop([0, 7])
    with pytest.warns(UserWarning, match="2 of 192 rows"):
        (fewer,) = measured(sdata, frame)
    assert isinstance(fewer.regions, Lattice)
    assert len(fewer) == len(fewer.regions) == 190
    for each in (bins, bins.take(np.random.default_rng(1).random(len(bins)) < 0.3), fewer):
        rows = pd.Index(table.obs["location_id"]).get_indexer(each.instances)
        np.testing.assert_array_equal(dense(each), table.X.toarray()[rows])


TYPES = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression", "Custom"]
GENES = ["GENE0", "GENE2", "GENE3"]


def typed(name="feature_types", values=TYPES, kind=None):
    return lambda table: table.var.insert(0, name, pd.Series(values, index=table.var_names, dtype=kind))


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


@pytest.mark.parametrize(("dataset_id", "labels"), [("sample", False), ("", True)])
def test_all_bins_by_size_and_no_cells(visium_hd, circles, table, dataset_id: str, labels: bool) -> None:
    sdata = visium_hd(dataset_id=dataset_id, bins=(16, 8), labels=labels)
    sdata["cells"] = circles([[1, 2], [3, 4]], system=dataset_id)
    sdata["cell_table"] = table("cells", [0, 1])
    for where in ({}, {"coordinate_system": dataset_id}):
        assert select_tables(sdata, **where) == ["square_008um", "square_016um"]
    for named in (["square_016um"], ["square_016um", "square_008um"]):
        assert select_tables(sdata, table_key=named) == named
    assert select_tables(sdata, table_key="square_016um") == ["square_016um"]
    for missing in (["square_016um", "other"], [], ["square_016um", "square_016um"]):
        with pytest.raises(ElementError, match="'square_016um'.*table_key="):
            select_tables(sdata, table_key=missing)


def test_no_table_or_only_of_another_slide_and_none_of_ours(circles, table) -> None:
    with pytest.raises(ElementError, match="'free', 'lost'"):
        select_tables(SpatialData(tables={"free": ad.AnnData(np.ones((2, 2))), "lost": table("gone", [0])}))
    shapes = {"a": circles([[1, 2]], system="A"), "b": circles([[1, 2]], system="B")}
    tables = {"ta": table("a", [0]), "tb": table("b", [0]), "pixnet": table("b", [0])}
    tables["pixnet"].uns["pixnet_sd"] = {}
    sdata = SpatialData(shapes=shapes, tables=tables)
    assert select_tables(sdata, coordinate_system="B") == ["tb"]
    with pytest.raises(ElementError, match="'C'.*coordinate_system='A'"):
        select_tables(sdata, coordinate_system="C")


def test_link(circles, table) -> None:
    shapes = {"a": circles([[1, 2], [5, 6]], system="A", index=["u", "v"]), "b": circles([[1, 2]], system="B")}
    sdata = SpatialData(shapes=shapes, tables={"t": table(["a", "b", "a"], ["v", "w", "u"])})
    link = table_link(sdata, table_key="t", coordinate_system="A")
    assert (link.table_key, link.element_key, list(link.instances)) == ("t", "a", ["v", "u"])
    np.testing.assert_array_equal(link.rows, [0, 2])
    with pytest.raises(ElementError, match="'a', 'b'"):
        table_link(sdata, table_key="t")
    with pytest.raises(ElementError, match="'C'"):
        table_link(sdata, table_key="t", coordinate_system="C")


UNLINKED = {
    "no region": (ad.AnnData(np.ones((2, 2))), {}, ElementError, "'t'"),
    "region is gone": (make_table("gone", [0]), {}, ElementError, "'t'.*'gone'"),
    "no rows": (ad.AnnData(np.ones((0, 5))), {}, DataError, "'t'.*0 rows x 5 genes"),
    "no genes": (make_table("spots", [0], genes=0), {}, DataError, "'t'.*1 rows x 0 genes"),
    "no row": (make_table("spots", [0]), {"region": pd.Categorical(["other"])}, DataError, "'t'.*'spots'"),
    "id twice": (make_table("spots", [0, 1]), {"location_id": [1, 1]}, DataError, "'t'.*1"),
    "no id": (make_table("spots", [0, 1]), {"location_id": [0.0, np.nan]}, DataError, "'t'.*1"),
    "bytes": (make_table("spots", [0, 1]), {"location_id": [b"a", b"b"]}, DataError, "'t'"),
}


@pytest.mark.parametrize(("made", "obs", "error", "names"), UNLINKED.values(), ids=UNLINKED)
def test_tables_that_cannot_be_linked(circles, made, obs, error, names) -> None:
    sdata = SpatialData(shapes={"spots": circles([[1, 2], [3, 4]])}, tables={"t": made})
    for name, values in obs.items():
        sdata.tables["t"].obs[name] = values
    with pytest.raises(error, match=names):
        table_link(sdata, table_key="t")


@pytest.mark.parametrize(
    ("bins", "change"),
    [(True, lambda x: x * 500.3), (False, lambda x: x - 1), (True, lambda x: x * 0), (False, np.log)],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_counts_before_a_normalised_copy(visium_hd, circles, table, bins: bool, change, caplog) -> None:
    """R8: one table for the same regions, that with counts; it is said which was left out."""
    caplog.set_level("INFO", "pixnet_sd")
    sdata = visium_hd(bins=(8,)) if bins else SpatialData(shapes={"cells": circles([[1, 2], [3, 4]])})
    key, region = ("square_008um", "sample_square_008um") if bins else ("table", "cells")
    if not bins:
        sdata["table"] = table("cells", [0, 1])
    for name in ("a_copy", "b_copy"):
        sdata[name] = sdata[key].copy()
        sdata[name].X = change(sdata[key].X.toarray())
    assert select_tables(sdata) == [key]
    assert "'a_copy'" in caplog.text
    assert select_tables(sdata, table_key="a_copy") == ["a_copy"]
    sdata["second"] = sdata[key].copy()
    with pytest.raises(ElementError, match=rf"'{region}'.*'second'.*table_key="):
        select_tables(sdata)
    with pytest.raises(ElementError, match=rf"'second' and '{key}'.*table_key=.*'{region}'"):
        select_tables(sdata, table_key=["second", key])
    del sdata.tables["second"], sdata.tables[key]
    with pytest.raises(ElementError, match=f"'{region}': 'a_copy', 'b_copy'.*table_key="):
        select_tables(sdata)  # none has counts


@pytest.mark.parametrize("size", [8, 16, 2])
def test_bins_of_two_samples_in_one_system(visium_hd, size: int) -> None:
    """R7: of one size, or of two sizes with two images; by name they can be taken."""
    one, other = visium_hd(bins=(8,)), visium_hd(dataset_id="b", bins=(size,))
    sdata = SpatialData(images={"he": one["sample_full_image"]}, shapes=one.shapes, tables=one.tables)
    regions = f"b_square_{size:03}um"
    sdata[regions], sdata["b_table"] = other[regions], other[f"square_{size:03}um"]
    set_transformation(sdata[regions], {"sample": Identity()}, set_all=True)
    where = {"coordinate_system": "sample", "image_key": "he"}
    if size != 8:
        assert set(select_tables(sdata, **where)) == {"square_008um", "b_table"}  # as if they were of one
        sdata["b_he"] = make_image(400, 500, seed=1)
    with pytest.raises(ElementError, match="('square_008um'.*'b_table'|'b_table'.*'square_008um').*table_key="):
        select_tables(sdata, **where)
    assert select_tables(sdata, table_key="b_table", **where) == ["b_table"]
    set_transformation(sdata[regions], Scale([0.5, 0.5], axes=("x", "y")), "sample")
    sdata.images.pop("b_he", None)
    with pytest.raises(ElementError, match="'b_table'.*table_key="):  # another resolution
        select_tables(sdata, **where)
    far = Translation([5000, 0], axes=("x", "y"))
    set_transformation(sdata[regions], far, "sample")
    assert select_tables(sdata, **where) == ["square_008um"]  # what lies beside the image is not of it
